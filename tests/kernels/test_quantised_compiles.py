"""The kernels over integer codes compile for Hopper, and into what their speed rests on.

As in `test_triton_compiles.py`: what runs is proven elsewhere.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from quantised_cases import KINDS, CodeKind, random_codes
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.kernels import quantised_bytes, quantised_expand, quantised_product, quantised_vector
from engine.layers.quantised_packing import pack_codes

TYPES = {
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
}
POINTERS = {
    "x_ptr": "*bf16",
    "out_ptr": "*bf16",
    "bias_ptr": "*bf16",
    "parts_ptr": "*fp32",
    "arrivals_ptr": "*i32",
    "sums_ptr": "*i32",
    "x_scales_ptr": "*fp32",
}


def compiled(kernel: Any, kind: CodeKind | None, constants: dict[str, Any], **types: str) -> Any:
    """What Triton makes of a kernel for bf16 and a kind of weight, for an H100."""
    options = {name: constants.pop(name) for name in ("num_warps",) if name in constants}
    names = kernel.jit.arg_names
    pointers = {**POINTERS, **types}
    if kind is not None:
        planes = pack_codes(random_codes(kind, 16, 384))
        for name in ("main", "extra", "scales", "minima", "table"):
            part = getattr(planes, name)
            if part is None:
                constants[f"{name}_ptr"] = None
            else:
                pointers[f"{name}_ptr"] = TYPES[part.dtype]
        constants |= {
            "GROUP": planes.group,
            "SUB": planes.strips_per_scale,
            "MAIN_BITS": planes.main_bits,
            "EXTRA": planes.bits - planes.main_bits,
            "EXPONENT_BITS": planes.exponent_bits,
            "ZERO": planes.zero,
            "HAS_MINIMA": planes.minima is not None,
            "HAS_TABLE": planes.table is not None,
        }
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {
        name: "constexpr"
        if name in constants
        else pointers.get(name, "fp32" if name == "factor" else "i32")
        for name in names
    }
    multiples = ("num_inner", "num_cols", "num_bytes")
    aligned = [
        index
        for index, name in enumerate(names)
        if name not in constants
        and (name.endswith("_ptr") or name.startswith("stride_") or name in multiples)
    ]
    source = ASTSource(
        fn=kernel.jit,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={**options, "enable_fp_fusion": True})


def of_product(kind: CodeKind, **changes: Any) -> Any:
    constants = {
        "bias_ptr": None,
        "HAS_BIAS": False,
        "EVEN_K": True,
        "IS_SPLIT": True,
        "BLOCK_M": 16,
        "BLOCK_N": 64,
        "NUM_STAGES": 4,
        "num_warps": 4,
    }
    return compiled(quantised_product._product_kernel, kind, {**constants, **changes})


@pytest.mark.parametrize("kind", [KINDS[index] for index in (0, 2, 4, 7, 10, 12, 17)], ids=str)
def test_codes_go_from_shared_memory_straight_to_tensor_cores(kind: CodeKind) -> None:
    kernel = of_product(kind)
    gpu_ir = kernel.asm["ttgir"]
    assert gpu_ir.count("warp_group_dot ") == 8, "a product for every strip"
    # Unpacked in the registers that the tensor cores read: no weight is written back.
    assert not re.search(r"local_alloc %", gpu_ir)
    assert gpu_ir.count("async_copy_global_to_local") >= 35, "loads run ahead"
    assert kernel.asm["ptx"].count("ld.local") == 0, "no spilled registers"


def test_a_product_of_one_row_converts_nothing() -> None:
    kernel = compiled(
        quantised_vector._vector_kernel,
        KINDS[2],
        {"bias_ptr": None, "HAS_BIAS": False, "EVEN_K": True, "BLOCK_N": 8, "BLOCK_B": 32},
    )
    ptx = kernel.asm["ptx"]
    assert len(re.findall(r"fma\.rn\.f32", ptx)) >= 256
    assert "ftz" not in ptx, "codes are denormal numbers"
    # x from bf16, and scales from fp16: nothing for the 256 codes of a thread.
    assert len(re.findall(r"cvt\.", ptx)) < 80
    assert ptx.count("ld.local") == 0


def test_the_others_compile() -> None:
    compiled(quantised_expand._expand_kernel, KINDS[12], {"rows_ptr": None, "HAS_ROWS": False,
             "BLOCK_N": 4, "BLOCK_B": 8})  # fmt: skip
    for limit, dtype in ((127, "*i8"), (448, "*fp8e4nv")):
        kernel = compiled(
            quantised_bytes._quantise_kernel,
            None,
            {"LIMIT": limit, "BLOCK": 2048},
            codes_ptr=dtype,
            scales_ptr="*fp32",
        )
        assert ("e4m3x2" in kernel.asm["ptx"]) == (limit == 448)
    compiled(
        quantised_bytes._scale_sums_kernel,
        None,
        {"bias_ptr": None, "HAS_BIAS": False, "BLOCK": 2048},
        scales_ptr="*fp32",
    )
