"""The kernels over integer codes compile for Hopper, and into what their speed rests on.

As in `test_triton_compiles.py`: what runs is proven elsewhere.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
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
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from engine.kernels import (
    quantised_bytes,
    quantised_expand,
    quantised_hopper,
    quantised_linear,
    quantised_one_row,
    quantised_product,
    quantised_vector,
)
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
    "norm_ptr": "*bf16",
    "residual_ptr": "*bf16",
}


def compiled(kernel: Any, kind: CodeKind | None, constants: dict[str, Any], **types: str) -> Any:
    """What Triton makes of a kernel for bf16 and a kind of weight, for an H100."""
    options = {name: constants.pop(name) for name in ("num_warps",) if name in constants}
    names = kernel.jit.arg_names
    pointers = {**POINTERS, **types}
    gluon = kernel.jit.is_gluon()
    if kind is not None:
        planes = pack_codes(random_codes(kind, 16, 384))
        for name in ("main", "extra", "scales", "minima", "table"):
            part = getattr(planes, name)
            if part is None:
                constants[f"{name}_ptr"] = None
            else:
                pointers[f"{name}_ptr"] = TYPES[part.dtype]
        if gluon and planes.table_words is not None:
            pointers["table_ptr"] = "*i32"
        constants |= planes.constants
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {
        name: "constexpr"
        if name in constants
        else pointers.get(name, "fp32" if name in ("factor", "eps", "norm_offset") else "i32")
        for name in names
    }
    multiples = ("num_inner", "num_cols", "num_out", "num_bytes")
    aligned = [
        index
        for index, name in enumerate(names)
        if name not in constants
        and (name.endswith("_ptr") or name.startswith("stride_") or name in multiples)
    ]
    source = (GluonASTSource if gluon else ASTSource)(
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


BY_NAME = {kind.name: kind for kind in KINDS}


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "gptq-128", "mxfp4", "nf4-64", "q6_k"])
@pytest.mark.parametrize("joins", [False, True])
def test_a_product_of_one_row_exchanges_nothing_but_its_sums(name: str, joins: bool) -> None:
    constants = {"bias_ptr": None, "HAS_BIAS": False, "EVEN_K": True, "EVEN_N": True}
    constants |= {"HAS_NORM": joins, "HAS_RESIDUAL": joins}
    if not joins:
        constants |= {"norm_ptr": None, "residual_ptr": None}
    activation = "silu" if joins else None
    kernel = compiled(
        quantised_one_row._one_row_kernel,
        BY_NAME[name],
        {**constants, "ACTIVATION": activation, "BLOCK_N": 8, "NUM_WARPS": 2, "num_warps": 2},
    )
    ptx = kernel.asm["ptx"]
    loop, sums = ptx[: ptx.index("shfl")], ptx[ptx.index("shfl") :]
    assert "shared" not in re.sub(r"\.extern .*|\.shared .*", "", loop)
    assert "bar.sync" in sums, "between the warps"
    assert len(re.findall(r"fma\.rn\.f32", loop)) >= 256
    # Words of eight rows in loads of 16 bytes; q6_k has its upper bits in words half as long.
    assert len(re.findall(r"ld\.global\.v4\.b32", loop)) >= 8
    assert ptx.count("ld.local") == 0, "no spilled registers"


def of_hopper(kind: CodeKind, block_m: int, block_n: int, num_warps: int) -> Any:
    planes = pack_codes(random_codes(kind, 16, 384))
    boxes = {"x_desc": f"tensordesc<bf16[{block_m}, 128],{gl.NVMMASharedLayout(128, 16, 2)!r}>"}
    constants = {
        "bias_ptr": None,
        "HAS_BIAS": False,
        "IS_SPLIT": True,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "STAGES": 3,
        "NUM_WARPS": num_warps,
        "num_warps": num_warps,
    }
    for name, plane in (("main_desc", planes.main), ("extra_desc", planes.extra)):
        if plane is None:
            constants[name] = None
        else:
            layout = quantised_hopper._words(plane, block_n).layout
            shape = [block_n, plane.shape[2]]
            boxes[name] = f"tensordesc<{TYPES[plane.dtype][1:]}{shape},{layout!r}>"
    return compiled(quantised_hopper._hopper_kernel, kind, constants, **boxes)


@pytest.mark.parametrize(
    ("name", "block_m", "block_n", "num_warps"),
    [("q4_0", 64, 128, 8), ("q6_k", 16, 64, 4), ("nf4-64", 128, 128, 8), ("fp8-row", 256, 128, 8)],
)
def test_hopper_unpacks_a_bundle_while_it_multiplies_another(
    name: str, block_m: int, block_n: int, num_warps: int
) -> None:
    asm = of_hopper(BY_NAME[name], block_m, block_n, num_warps).asm
    assert asm["ptx"].count("ld.local") == 0, "no spilled registers"
    found = re.findall(r"HGMMA|WARPGROUP\.DEPBAR|F2FP", asm["sass"])
    runs = [(kind, len(list(run))) for kind, run in itertools.groupby(found)]
    products = [index for index, (kind, _) in enumerate(runs) if kind == "HGMMA"]
    # Two bundles of eight strips, each followed by (nearly) all of the other's 32 roundings of two
    # weights, and only then by the wait: ptxas serialises what it does not understand.
    assert [runs[index][1] for index in products] == [8, 8]
    for index in products:
        assert runs[index + 1][0] == "F2FP"
        assert runs[index + 1][1] >= 28
        assert runs[index + 2][0] == "WARPGROUP.DEPBAR"


def test_another_gluon_leaves_the_portable_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quantised_linear.gluon_kernels.cache_clear()
    found = quantised_linear.gluon_kernels()
    assert found is not None
    assert found.hopper is quantised_hopper
    quantised_linear.gluon_kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "engine.kernels.quantised_one_row", None)
    try:
        assert quantised_linear.gluon_kernels() is None
        assert quantised_linear.gluon_kernels() is None
        assert len(caplog.records) == 1
    finally:
        quantised_linear.gluon_kernels.cache_clear()
