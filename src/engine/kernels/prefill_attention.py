"""Attention of prefilling sequences: ragged queries over cached prefix and new tokens alike.

    out[t, h] = softmax_j(q[t, h] k[j, h / group] scale) v[j, h / group],  i - window < j <= i

for token t at position i of its sequence (in chunks: j >= i - i % chunk). All keys come from the
paged cache, where the step has already stored the new ones: whole prompts, chunks and suffixes of
cached prefixes are one path.

| argument            | shape, dtype                          | duty                              |
|---------------------|---------------------------------------|-----------------------------------|
| q_ptr               | [T, Hq, D] bf16, fp16 or fp32         | stride 1 along D                  |
| k_ptr, v_ptr        | [N, block_size, Hkv, D], same dtype   | equal strides, 1 along D          |
|                     | or 8 bits                             |                                   |
| k_scales_ptr,       | [N, Hkv, block_size] fp32             | of 8-bit keys and values; None:   |
| v_scales_ptr        |                                       | plain ones                        |
| sinks_ptr           | [Hq]                                  | see `attention_tiles.with_sink`   |
| block_table_ptr     | [rows, max_blocks] int32              | stride 1 along blocks             |
| plan_ptr            | [HEADER + tiles * ITEM] int32         | see `prefill_plan`                |
| out_ptr             | [T, Hq * D], q's dtype                | stride 1; rows of no sequence are |
|                     |                                       | not written                       |

Grid (programs,). A work item is one KV head of a tile: BLOCK_Q query tokens of one sequence, whose
query heads of that KV head are packed as rows token-major. One pass over the keys serves the whole
group, and few tokens (a short suffix, the diagonal) waste few rows. `prefill_plan` lists the tiles,
the longest first, once per step.

Eager, there is a program per item. In a captured step the list's length is known on the device
only: programs are then a few times what the device holds at once, each takes every n-th item, and
a step with little or nothing to prefill does not pay for the bucket's tiles.

Which keys need a mask: see `prefill_keys`.

Numerics: see `attention_tiles`. The tile shape is fixed per dtype and head size, so a token's bits
depend neither on the batch nor on how its prompt was cut into chunks (a chunk of one token is a
decode and rounds like one). Row and block offsets are int64. constexpr: what is fixed per model;
token and sequence counts are not specialised.

On Hopper, `prefill_hopper` serves most layers in this kernel's place: 16 bit, head_dim 64 or 128,
no window or chunks, no soft-cap, a plain cache. Both round alike in kind but not in every
bit; which one a layer has is fixed with the model, so a token's bits are its own either way.

Tuning (`prefill_tiles`): 128 x 64 tiles of rows and keys, two warp groups (wgmma) and three stages
for 16 bit up to D = 128. H100, triton 3.6, 16k tokens, TFLOP/s at D = 128: 481; two stages 371,
four 473; 128 keys and two stages 437; 64 rows, four warps and three stages 456.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import functools
import importlib
import logging
from dataclasses import dataclass
from types import ModuleType

import torch
import triton
import triton.language as tl

from engine.kernels.attention_tiles import (
    KEY_ALIGNMENT,
    num_multiprocessors,
    score_factors,
    with_sink,
)
from engine.kernels.compile_ahead import launchable
from engine.kernels.kv_cache import KVTensor, parts_of
from engine.kernels.metadata import AttentionMetadata
from engine.kernels.prefill_keys import attend_causally
from engine.kernels.prefill_plan import HEADER, ITEM, prefill_plan

logger = logging.getLogger(__name__)

# Programs of a captured step, per multiprocessor. One is resident at a time; several share out the
# work as they finish.
PROGRAMS_PER_PROCESSOR = 4


@dataclass(frozen=True)
class PrefillTiles:
    """Launch shape: rows per tile, keys per tile, stages, warps."""

    block_m: int
    block_n: int
    num_stages: int
    num_warps: int


def prefill_tiles(dtype: torch.dtype, head_dim: int) -> PrefillTiles:
    """Tiles for a dtype and head size: the largest that the compiler keeps free of spills.

    Read off triton 3.9 for sm_90: 128 KiB and 186 registers at head_dim 128, 64 KiB and 128 at
    64, 192 KiB and 254 at 256. float32 runs on the vector units, where 32 rows spill.
    """
    if dtype == torch.float32:
        return PrefillTiles(16, 32, 2, 8)
    if head_dim > 128:
        return PrefillTiles(128, 64, 2, 8)
    return PrefillTiles(128, 64, 3, 8)


@triton.jit
def _prefill_item(
    item,
    q_ptr,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    sinks_ptr,
    block_table_ptr,
    plan_ptr,
    out_ptr,
    score_scale,
    softcap,
    stride_q_token,
    stride_q_head,
    stride_cache_block,
    stride_cache_token,
    stride_cache_head,
    stride_scales,
    stride_table,
    stride_out,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    KEY_ALIGNMENT: tl.constexpr,
    HEADER: tl.constexpr,
    ITEM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attention of one (tile, KV head)."""
    kv_head = item % NUM_KV_HEADS
    tile_ptr = plan_ptr + HEADER + item // NUM_KV_HEADS * ITEM
    first_token = tl.load(tile_ptr)
    num_tokens = tl.load(tile_ptr + 1)
    first_position = tl.load(tile_ptr + 2)
    table_row = tl.load(tile_ptr + 4).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    queries = rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    mask = (queries < num_tokens)[:, None] & (columns < HEAD_DIM)[None, :]
    tokens = (first_token + queries).to(tl.int64)
    q_ptrs = q_ptr + (tokens * stride_q_token + heads * stride_q_head)[:, None]
    q = tl.load(q_ptrs + columns[None, :], mask=mask, other=0.0)
    if k_scales_ptr is not None:
        k_scales_ptr += kv_head * BLOCK_SIZE
        v_scales_ptr += kv_head * BLOCK_SIZE
    acc, row_max, row_sum = attend_causally(
        q,
        first_position + queries,
        first_position,
        first_position + num_tokens,
        k_ptr + kv_head * stride_cache_head,
        v_ptr + kv_head * stride_cache_head,
        k_scales_ptr,
        v_scales_ptr,
        block_table_ptr + table_row * stride_table,
        score_scale,
        softcap,
        stride_cache_block,
        stride_cache_token,
        stride_scales,
        HEAD_DIM=HEAD_DIM,
        BLOCK_SIZE=BLOCK_SIZE,
        WINDOW=WINDOW,
        CHUNK=CHUNK,
        HAS_SOFTCAP=HAS_SOFTCAP,
        KEY_ALIGNMENT=KEY_ALIGNMENT,
        BLOCK_M=BLOCK_M,
        BLOCK_D=BLOCK_D,
        BLOCK_N=BLOCK_N,
    )
    row_sum = with_sink(row_sum, row_max, sinks_ptr, heads, queries < num_tokens)
    mixed = acc / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]
    out_ptrs = out_ptr + (tokens * stride_out + heads * HEAD_DIM)[:, None]
    tl.store(out_ptrs + columns[None, :], mixed.to(out_ptr.dtype.element_ty), mask=mask)


@launchable
@triton.jit
def _prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    sinks_ptr,
    block_table_ptr,
    plan_ptr,
    out_ptr,
    score_scale,
    softcap,
    stride_q_token,
    stride_q_head,
    stride_cache_block,
    stride_cache_token,
    stride_cache_head,
    stride_scales,
    stride_table,
    stride_out,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_PERSISTENT: tl.constexpr,
    KEY_ALIGNMENT: tl.constexpr,
    HEADER: tl.constexpr,
    ITEM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0)
    num_items = tl.load(plan_ptr) * NUM_KV_HEADS
    # A loop costs registers, at head_dim 64 enough of them to halve the resident programs: 317
    # instead of 406 TFLOP/s. Where every item has a program there is one round, and no loop.
    for nth in (tl.range if IS_PERSISTENT else tl.static_range)(
        program if IS_PERSISTENT else 0,
        num_items if IS_PERSISTENT else 1,
        tl.num_programs(0) if IS_PERSISTENT else 1,
    ):
        item = nth if IS_PERSISTENT else program
        if IS_PERSISTENT or item < num_items:
            _prefill_item(
                item,
                q_ptr,
                k_ptr,
                v_ptr,
                k_scales_ptr,
                v_scales_ptr,
                sinks_ptr,
                block_table_ptr,
                plan_ptr,
                out_ptr,
                score_scale,
                softcap,
                stride_q_token,
                stride_q_head,
                stride_cache_block,
                stride_cache_token,
                stride_cache_head,
                stride_scales,
                stride_table,
                stride_out,
                NUM_KV_HEADS=NUM_KV_HEADS,
                GROUP=GROUP,
                HEAD_DIM=HEAD_DIM,
                BLOCK_SIZE=BLOCK_SIZE,
                WINDOW=WINDOW,
                CHUNK=CHUNK,
                HAS_SOFTCAP=HAS_SOFTCAP,
                KEY_ALIGNMENT=KEY_ALIGNMENT,
                HEADER=HEADER,
                ITEM=ITEM,
                BLOCK_Q=BLOCK_Q,
                BLOCK_M=BLOCK_M,
                BLOCK_D=BLOCK_D,
                BLOCK_N=BLOCK_N,
            )


@functools.cache
def hopper_kernel() -> ModuleType | None:
    """`prefill_hopper`; None, with a warning, where triton has another Gluon than it is written in.

    Gluon is experimental and renames things from release to release; the kernel of this file
    computes the same.
    """
    try:
        return importlib.import_module("engine.kernels.prefill_hopper")
    except (ImportError, AttributeError):
        logger.warning(
            "triton %s lacks what the Hopper prefill kernel needs; prompts run 20 to 30 %% slower",
            triton.__version__,
            exc_info=True,
        )
        return None


def prefill_attention(
    q: torch.Tensor,
    k_cache: KVTensor,
    v_cache: KVTensor,
    metadata: AttentionMetadata,
    out: torch.Tensor,
    *,
    softmax_scale: float,
    sliding_window: int | None,
    logit_softcap: float,
    sinks: torch.Tensor | None = None,
    chunk_size: int | None = None,
    tiles: PrefillTiles | None = None,
) -> None:
    """Attention of the sequences after the decoding ones, of a padded batch before its padding.

    Args:
        q: [T, Hq, D], all tokens of the step (`query_start_loc` counts from its first row).
        k_cache: [N, block_size, Hkv, D]; block_size a power of two.
        v_cache: Likewise, with the same strides.
        metadata: Layout of the batch.
        out: [T, Hq * D]; rows of prefilling sequences are written in place, others untouched.
        softmax_scale: Factor of the scores.
        sliding_window: Tokens a position sees, itself included; None for all.
        logit_softcap: Bound of the scores; 0 for none.
        sinks: As in `decode_attention`.
        chunk_size: Likewise.
        tiles: Launch shape of this file's kernel; default: `prefill_hopper` where it serves the
            layer, else `prefill_tiles`.
    """
    hopper = hopper_kernel() if tiles is None else None
    sees_all = not (sliding_window or chunk_size or logit_softcap)
    is_plain = isinstance(k_cache, torch.Tensor) and isinstance(v_cache, torch.Tensor)
    if hopper and sees_all and is_plain and hopper.can_attend(q, k_cache, v_cache):
        hopper.prefill_on_hopper(
            q, k_cache, v_cache, metadata, out, softmax_scale=softmax_scale, sinks=sinks
        )
        return
    num_tokens, num_q_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = num_q_heads // num_kv_heads
    (keys, k_scales), (values, v_scales) = parts_of(k_cache), parts_of(v_cache)
    tiles = tiles or prefill_tiles(q.dtype, head_dim)
    block_m = max(tiles.block_m, triton.next_power_of_2(group))
    block_q = block_m // group
    plan, max_tiles = prefill_plan(metadata, num_tokens, block_q)
    num_programs = max_tiles * num_kv_heads
    is_persistent = metadata.device_counts is not None
    if is_persistent:
        num_programs = min(num_programs, PROGRAMS_PER_PROCESSOR * num_multiprocessors(q.device))
    if not num_programs:
        return
    score_scale, softcap = score_factors(softmax_scale, logit_softcap)
    _prefill_kernel[(num_programs,)](
        q,
        keys,
        values,
        k_scales,
        v_scales,
        sinks,
        metadata.block_table,
        plan,
        out,
        score_scale,
        softcap,
        q.stride(0),
        q.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        0 if k_scales is None else k_scales.stride(0),
        metadata.block_table.stride(0),
        out.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        WINDOW=sliding_window or 0,
        CHUNK=chunk_size or 0,
        HAS_SOFTCAP=logit_softcap != 0.0,
        IS_PERSISTENT=is_persistent,
        KEY_ALIGNMENT=KEY_ALIGNMENT,
        HEADER=HEADER,
        ITEM=ITEM,
        BLOCK_Q=block_q,
        BLOCK_M=block_m,
        BLOCK_D=max(triton.next_power_of_2(head_dim), 16),
        BLOCK_N=tiles.block_n,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
    )
