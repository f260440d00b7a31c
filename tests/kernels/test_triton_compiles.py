"""The kernels compile for Hopper, and into what their tuning notes count on.

Triton compiles for a GPU that is not there. What runs is proven elsewhere; this watches what a
change of the source or of triton could lose silently: tensor core instructions and the depth of
the load pipeline.
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
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.kernels import (
    attention_tiles,
    decode_attention,
    decode_plan,
    few_row_linear,
    few_row_tiles,
    prefill_attention,
    shared_prefix,
)

HEAD_DIM, GROUP, NUM_KV_HEADS, BLOCK_SIZE = 128, 4, 8, 64
COMMON = {
    "NUM_KV_HEADS": NUM_KV_HEADS,
    "GROUP": GROUP,
    "HEAD_DIM": HEAD_DIM,
    "BLOCK_SIZE": BLOCK_SIZE,
    "WINDOW": 0,
    "HAS_SOFTCAP": False,
    "KEY_ALIGNMENT": attention_tiles.KEY_ALIGNMENT,
    "BLOCK_D": HEAD_DIM,
}


BF16S = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "x_ptr", "weight_ptr")
FLOATS = ("score_scale", "softcap", "norm_eps", "norm_weight_offset", "eps", "weight_offset")


def compile_for_hopper(
    kernel: Any, constants: dict[str, Any], num_warps: int, num_stages: int
) -> tuple[str, str]:
    """(PTX, Triton's GPU IR) of a bf16 kernel."""
    names = kernel.arg_names
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in BF16S or "norm_weight_ptr" in name:
            signature[name] = "*bf16"
        elif name in ("partial_ptr", "stats_ptr", "cos_sin_ptr") or "squares_ptr" in name:
            signature[name] = "*fp32"
        elif name in ("block_rows_ptr", "positions_ptr", "slots_ptr"):
            signature[name] = "*i64"
        elif name.endswith("_ptr"):
            signature[name] = "*i32"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    # What the launcher finds out by itself: pointers and strides are multiples of 16.
    aligned = [
        index
        for index, name in enumerate(names)
        if name not in constants and (name.endswith("_ptr") or name.startswith("stride_"))
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return compiled.asm["ptx"], compiled.asm["ttgir"]


def tile_buffers(gpu_ir: str, num_rows: int, num_cols: int = HEAD_DIM) -> list[int]:
    """Buffers of each tile of a size in shared memory."""
    pattern = rf"memdesc<(\d+)x{num_rows}x{num_cols}xbf16[^>]*mutable> loc"
    return [
        int(found)
        for line in gpu_ir.splitlines()
        if "local_alloc" in line
        for found in re.findall(pattern, line)
    ]


@pytest.mark.parametrize("has_new_tokens", [False, True])
def test_decode_keeps_two_tiles_in_flight(has_new_tokens: bool) -> None:
    tiles = decode_attention.decode_tiles(torch.bfloat16, HEAD_DIM)
    constants = {
        **COMMON,
        "MAX_SPLITS": tiles.max_splits,
        "HEADER": decode_plan.HEADER,
        "ITEM": decode_plan.ITEM,
        "MERGE_HERE": True,
        "USE_PDL": True,
        "BLOCK_M": 16,
        "BLOCK_N": tiles.block_n,
        "BLOCK_G": GROUP,
        "BLOCK_S": tiles.merge_splits,
        "HAS_NEW_TOKENS": has_new_tokens,
        "HALF_ROT": HEAD_DIM // 2 if has_new_tokens else 0,
        "HAS_Q_NORM": has_new_tokens,
        "HAS_K_NORM": has_new_tokens,
        "HAS_NORM_OFFSET": False,
    }
    del constants["KEY_ALIGNMENT"]
    ptx, gpu_ir = compile_for_hopper(
        decode_attention._split_kernel, constants, tiles.num_warps, tiles.num_stages
    )
    assert "mma.sync" in ptx
    assert "cp.async.cg" in ptx
    buffers = tile_buffers(gpu_ir, tiles.block_n)
    assert buffers
    assert min(buffers) >= tiles.num_stages - 1


def test_shared_prefixes_multiply_by_warp_groups() -> None:
    tiles = shared_prefix.prefix_tiles(torch.bfloat16, HEAD_DIM)
    constants = {
        **{
            name: value for name, value in COMMON.items() if name not in ("WINDOW", "KEY_ALIGNMENT")
        },
        "HEADER": decode_plan.HEADER,
        "ITEM": decode_plan.ITEM,
        "USE_PDL": True,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
    }
    ptx, gpu_ir = compile_for_hopper(
        shared_prefix._prefix_kernel, constants, tiles.num_warps, tiles.num_stages
    )
    assert "wgmma.mma_async" in ptx
    buffers = tile_buffers(gpu_ir, tiles.block_n)
    assert buffers
    assert min(buffers) >= tiles.num_stages


def test_prefill_multiplies_by_warp_groups() -> None:
    tiles = prefill_attention.prefill_tiles(torch.bfloat16, HEAD_DIM)
    constants = {
        **COMMON,
        "HAS_BLOCK_ROWS": True,
        "HAS_COUNTS": True,
        "BLOCK_Q": tiles.block_m // GROUP,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
    }
    ptx, gpu_ir = compile_for_hopper(
        prefill_attention._prefill_kernel, constants, tiles.num_warps, tiles.num_stages
    )
    assert "wgmma.mma_async" in ptx
    assert "mma.sync" not in ptx
    buffers = tile_buffers(gpu_ir, tiles.block_n)
    assert buffers
    assert min(buffers) >= tiles.num_stages


@pytest.mark.parametrize("kind", ["plain", "normed", "gated", "adding"])
@pytest.mark.parametrize("num_rows", [1, 16])
def test_few_rows_keep_their_stages_in_flight(kind: str, num_rows: int) -> None:
    num_inner = 4096
    x, weight = (torch.empty(n, num_inner, device="meta").bfloat16() for n in (num_rows, 4096))
    tiles = few_row_tiles.tiles_for(kind, x, weight)
    has_norm = kind in ("normed", "gated")
    missing = ["bias_ptr"]
    missing += [] if has_norm else ["norm_weight_ptr", "squares_ptr"]
    missing += [] if kind == "adding" else ["new_squares_ptr"]
    constants = {
        **dict.fromkeys(missing),
        "HAS_BIAS": False,
        "HAS_NORM": has_norm,
        "HAS_OFFSET": False,
        "ACTIVATION": "silu" if kind == "gated" else "",
        "ADDS": kind == "adding",
        "BLOCK_SQUARES": 256,
        "EVEN_K": True,
        "BLOCK_M": tiles.block_m,
        "COLS": tiles.num_cols,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "NUM_STAGES": tiles.num_stages,
        "USE_PDL": True,
        "PREFETCH_LINES": tiles.prefetch_lines,
    }
    kernel = few_row_linear._few_row_kernel
    ptx, gpu_ir = compile_for_hopper(kernel, constants, tiles.num_warps, 3)
    assert "griddepcontrol.wait" in ptx
    assert ("mma" in ptx) == (num_rows > 1)
    if tiles.num_stages > 1:
        assert "cp.async.cg" in ptx
        buffers = tile_buffers(gpu_ir, tiles.block_n, tiles.block_k)
        assert len(buffers) >= (2 if kind == "gated" else 1)
        assert min(buffers) >= tiles.num_stages - 1
