"""Joining the splits of decode attention: partial sums of one sequence, in their order.

    m = max_s m_s;  out = (sum_s 2^(m_s - m) acc_s) / (sum_s 2^(m_s - m) l_s)

| argument    | shape, dtype           | duty                                                      |
|-------------|------------------------|-----------------------------------------------------------|
| places_ptr  | [B, 2] int32           | first place and number of splits, see `decode_plan`       |
| counts_ptr  | int32                  | sequences that are planned; None: all                     |
| partial_ptr | [places, Hq, D] fp32   | unnormalised sums of each split                           |
| stats_ptr   | [places, 2, Hq] fp32   | maximum and sum of each split                             |
| out_ptr     | [B, Hq * D]            | written where a sequence has several splits               |

Grid (B, Hkv): one program joins the splits of one KV head's query heads. The split kernel may do
the same by itself, so everything is read past the first-level cache: other processors wrote it.

Numerics: fp32; BLOCK_S splits are added as a tree, rounds of BLOCK_S in order. int64: places.
constexpr: what is fixed per model.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.attention_tiles import follow_kernel_before
from engine.kernels.compile_ahead import launchable


@triton.jit
def merge_splits(
    partial_ptr,
    stats_ptr,
    out_row_ptr,
    first_place,
    num_splits,
    kv_head,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Join the splits of one sequence and KV head, in their order."""
    num_q_heads: tl.constexpr = NUM_KV_HEADS * GROUP
    members = tl.arange(0, BLOCK_G)
    columns = tl.arange(0, BLOCK_D)
    splits = tl.arange(0, MAX_SPLITS)
    is_member = members < GROUP
    is_column = columns < HEAD_DIM
    heads = kv_head * GROUP + members
    stats_ptrs = stats_ptr + (first_place + splits)[:, None] * (2 * num_q_heads) + heads[None, :]
    is_stat = (splits < num_splits)[:, None] & is_member[None, :]
    maxima = tl.load(stats_ptrs, mask=is_stat, other=float("-inf"), cache_modifier=".cg")
    sums = tl.load(stats_ptrs + num_q_heads, mask=is_stat, other=0.0, cache_modifier=".cg")
    # The first sums are on their way before anybody waits for the maxima.
    in_round = tl.arange(0, BLOCK_S)
    partial_ptrs = partial_ptr + columns[None, None, :]
    partial_ptrs += ((first_place + in_round)[:, None] * num_q_heads + heads[None, :])[
        :, :, None
    ] * HEAD_DIM
    weight_ptrs = stats_ptr + (first_place + in_round)[:, None] * (2 * num_q_heads) + heads[None, :]
    is_value = (is_member[:, None] & is_column[None, :])[None, :, :]
    is_part = in_round < num_splits
    is_weight = is_part[:, None] & is_member[None, :]
    partial = tl.load(
        partial_ptrs,
        mask=is_part[:, None, None] & is_value,
        other=0.0,
        cache_modifier=".cg",
    )
    weights = tl.load(weight_ptrs, mask=is_weight, other=float("-inf"), cache_modifier=".cg")
    # Rows of padding heads have no maximum; 0 keeps NaN out of them.
    highest = tl.where(is_member, tl.max(maxima, axis=0), 0.0)
    total = tl.sum(sums * tl.exp2(maxima - highest[None, :]), axis=0)
    acc = tl.sum(partial * tl.exp2(weights - highest[None, :])[:, :, None], axis=0)
    for base in tl.range(BLOCK_S, num_splits, BLOCK_S, num_stages=1):
        partial_ptrs += BLOCK_S * num_q_heads * HEAD_DIM
        weight_ptrs += BLOCK_S * 2 * num_q_heads
        is_part = base + in_round < num_splits
        is_weight = is_part[:, None] & is_member[None, :]
        partial = tl.load(
            partial_ptrs,
            mask=is_part[:, None, None] & is_value,
            other=0.0,
            cache_modifier=".cg",
        )
        weights = tl.load(weight_ptrs, mask=is_weight, other=float("-inf"), cache_modifier=".cg")
        acc += tl.sum(partial * tl.exp2(weights - highest[None, :])[:, :, None], axis=0)
    mixed = acc / tl.where(is_member, total, 1.0)[:, None]
    out_ptrs = out_row_ptr + (heads * HEAD_DIM)[:, None] + columns[None, :]
    mask = is_member[:, None] & is_column[None, :]
    tl.store(out_ptrs, mixed.to(out_row_ptr.dtype.element_ty), mask=mask)


@launchable
@triton.jit
def merge_kernel(
    places_ptr,
    counts_ptr,
    partial_ptr,
    stats_ptr,
    out_ptr,
    stride_out,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Join the splits of sequence program_id(0) and KV head program_id(1)."""
    if USE_PDL:
        follow_kernel_before()
    seq = tl.program_id(0).to(tl.int64)
    num_planned = seq + 1
    if counts_ptr is not None:
        num_planned = tl.load(counts_ptr).to(tl.int64)
    if seq < num_planned:
        num_splits = tl.load(places_ptr + seq * 2 + 1)
        if num_splits > 1:
            merge_splits(
                partial_ptr,
                stats_ptr,
                out_ptr + seq * stride_out,
                tl.load(places_ptr + seq * 2).to(tl.int64),
                num_splits,
                tl.program_id(1),
                NUM_KV_HEADS,
                GROUP,
                HEAD_DIM,
                MAX_SPLITS,
                BLOCK_G,
                BLOCK_D,
                BLOCK_S,
            )
