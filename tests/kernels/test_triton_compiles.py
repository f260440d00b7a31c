"""The attention kernels compile for Hopper, and into what their tuning notes count on.

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


FLOATS = ("score_scale", "softcap", "norm_eps", "norm_weight_offset")


def compile_for_hopper(
    kernel: Any, constants: dict[str, Any], num_warps: int, num_stages: int
) -> tuple[str, str]:
    """(PTX, Triton's GPU IR) of a bf16 attention kernel."""
    names = kernel.arg_names
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("q_ptr", "k_ptr", "v_ptr", "out_ptr") or "norm_weight_ptr" in name:
            signature[name] = "*bf16"
        elif name in ("partial_ptr", "stats_ptr", "cos_sin_ptr"):
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


def key_tile_buffers(gpu_ir: str, block_n: int) -> list[int]:
    """Buffers of each K or V tile in shared memory."""
    pattern = rf"memdesc<(\d+)x{block_n}x{HEAD_DIM}xbf16[^>]*mutable> loc"
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
    buffers = key_tile_buffers(gpu_ir, tiles.block_n)
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
    buffers = key_tile_buffers(gpu_ir, tiles.block_n)
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
    buffers = key_tile_buffers(gpu_ir, tiles.block_n)
    assert buffers
    assert min(buffers) >= tiles.num_stages
