"""Attention of decoding sequences: one query token each, keys split over programs.

    out[b, h] = softmax_j(q[b, h] k[j, h / group] scale) v[j, h / group],  j < seq_lens[b]

Three kernels, the idea of FlashDecoding (Dao et al., 2023) with a work list:

    _plan_kernel   grid (1,)         seq_lens -> list of (sequence, split); once per step
    _split_kernel  grid (programs,)  works through the list: one split of one KV head at a time
    _merge_kernel  grid (B, Hq)      joins the splits of sequences that have several

| argument        | shape, dtype                          | duty                                   |
|-----------------|---------------------------------------|----------------------------------------|
| q_ptr           | [B, Hq, D] bf16, fp16 or fp32         | stride 1 along D                       |
| k_ptr, v_ptr    | [N, block_size, Hkv, D], same dtype   | equal strides, 1 along D               |
| block_table_ptr | [B, max_blocks] int32                 | stride 1 along blocks                  |
| seq_lens_ptr    | [B] int32                             | 0: padding, whose output is zero       |
| plan_ptr        | [1 + B * MAX_SPLITS] int32            | count, then seq * MAX_SPLITS + split   |
| partial_ptr     | [B, splits, Hq, D] fp32               | unnormalised sums of each split        |
| stats_ptr       | [B, splits, 2, Hq] fp32               | maximum and sum of each split          |
| out_ptr         | [B, Hq * D], q's dtype                | stride 1 along Hq * D                  |

Splits. A sequence of n keys has min(ceil(n / SPLIT), about MAX_SPLITS) splits of equal size, a
multiple of SPLIT. That is a function of its own length alone, so its result is the same bits in
every batch. Programs are as many as fit the device, not as many as there are splits: the list is
short where sequences are, and a captured graph whose bound is thousands of splits launches no
empty programs for them. Neighbouring programs take the KV heads of one split, whose rows are
adjacent in memory.

The query heads of one KV head are the rows of one tile, padded to 16 for the tensor cores: the
keys are read once for all of them, and padding rows cost nothing where bandwidth is the limit.
Only the last tile of a sequence is masked (every tile under a sliding window).

Numerics: see `attention_tiles`; partial sums are fp32 and merged in the order of the splits. All
offsets that multiply a stride are int64. constexpr: everything that is fixed per model. Batch
size, list length and the number of programs are not specialised: no step compiles a kernel.

Tuning (`decode_tiles`): chosen by arithmetic for the H100, not yet measured. SPLIT 256: a program
reads 131 KB (D = 128, bf16) per item against 2 KB of partials per 4 heads, and a batch of one at
8k keys still fills 256 programs.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.attention_tiles import (
    KEY_ALIGNMENT,
    attend_tiles,
    num_multiprocessors,
    score_factors,
)
from engine.kernels.metadata import AttentionMetadata

SPLIT = 256
MAX_SPLITS = 32
_PLAN_BLOCK = 1024
_MERGE_BLOCK = 8


@dataclass(frozen=True)
class DecodeTiles:
    """Launch shape of `_split_kernel`: keys per tile, stages, warps, programs per processor."""

    block_n: int
    num_stages: int
    num_warps: int
    programs_per_processor: int


def decode_tiles(dtype: torch.dtype, head_dim: int) -> DecodeTiles:
    """Tiles for a dtype and head size.

    Programs per processor are as many as its 227 KiB of shared memory and 64 Ki registers hold,
    read off the compiler (triton 3.9, sm_90): 70 KiB and 128 registers at head_dim 128, 36 KiB
    and 96 registers at 64.
    """
    if dtype == torch.float32:
        return DecodeTiles(32, 2, 4, 2)
    if head_dim > 128:
        return DecodeTiles(32, 3, 4, 3)
    return DecodeTiles(64, 3, 4, 3 if head_dim > 64 else 5)


@triton.jit
def _split_layout(
    seq_len,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    KEY_ALIGNMENT: tl.constexpr,
):
    """(first key seen, first key of the first tile, keys per split, number of splits >= 1)."""
    low = seq_len * 0
    if WINDOW > 0:
        low = tl.maximum(seq_len - WINDOW, 0)
    first = low - low % KEY_ALIGNMENT
    num_keys = seq_len - first
    units = tl.cdiv(num_keys, SPLIT)
    size = SPLIT * tl.maximum(tl.cdiv(units, MAX_SPLITS), 1)
    return low, first, size, tl.maximum(tl.cdiv(num_keys, size), 1)


@triton.jit(do_not_specialize=["num_seqs"])
def _plan_kernel(
    seq_lens_ptr,
    plan_ptr,
    num_seqs,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    KEY_ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = 0
    for base in range(0, num_seqs, BLOCK):
        seqs = base + tl.arange(0, BLOCK)
        is_seq = seqs < num_seqs
        seq_lens = tl.load(seq_lens_ptr + seqs, mask=is_seq, other=0)
        _, _, _, num_splits = _split_layout(seq_lens, WINDOW, SPLIT, MAX_SPLITS, KEY_ALIGNMENT)
        num_splits = tl.where(is_seq, num_splits, 0)
        starts = total + tl.cumsum(num_splits, axis=0) - num_splits
        most = tl.max(num_splits, axis=0)
        for split in range(most):
            item_ptrs = plan_ptr + 1 + starts + split
            tl.store(item_ptrs, seqs * MAX_SPLITS + split, mask=split < num_splits)
        total += tl.sum(num_splits, axis=0)
    tl.store(plan_ptr, total)


@triton.jit(do_not_specialize=["max_splits_bound"])
def _split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    block_table_ptr,
    seq_lens_ptr,
    plan_ptr,
    partial_ptr,
    stats_ptr,
    out_ptr,
    score_scale,
    softcap,
    stride_q_token,
    stride_q_head,
    stride_cache_block,
    stride_cache_token,
    stride_cache_head,
    stride_table,
    stride_out,
    max_splits_bound,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    KEY_ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    num_q_heads: tl.constexpr = NUM_KV_HEADS * GROUP
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    is_row = rows < GROUP
    mask = is_row[:, None] & (columns < HEAD_DIM)[None, :]
    num_items = tl.load(plan_ptr) * NUM_KV_HEADS
    for work in range(tl.program_id(0), num_items, tl.num_programs(0)):
        item = tl.load(plan_ptr + 1 + work // NUM_KV_HEADS)
        kv_head = work % NUM_KV_HEADS
        seq = (item // MAX_SPLITS).to(tl.int64)
        split = item % MAX_SPLITS
        seq_len = tl.load(seq_lens_ptr + seq)
        low, first, size, num_splits = _split_layout(
            seq_len, WINDOW, SPLIT, MAX_SPLITS, KEY_ALIGNMENT
        )
        start = first + split * size
        end = tl.minimum(start + size, seq_len)
        heads = kv_head * GROUP + rows
        q_ptrs = q_ptr + seq * stride_q_token + (heads * stride_q_head)[:, None]
        q = tl.load(q_ptrs + columns[None, :], mask=mask, other=0.0)
        positions = tl.zeros([BLOCK_M], tl.int32) + (seq_len - 1)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        full_end = start
        if WINDOW == 0:
            full_end = tl.maximum(end - end % BLOCK_N, start)
            acc, row_max, row_sum = attend_tiles(
                acc,
                row_max,
                row_sum,
                q,
                positions,
                k_ptr + kv_head * stride_cache_head,
                v_ptr + kv_head * stride_cache_head,
                block_table_ptr + seq * stride_table,
                start,
                low,
                full_end,
                score_scale,
                softcap,
                stride_cache_block,
                stride_cache_token,
                IS_MASKED=False,
                WINDOW=WINDOW,
                HAS_SOFTCAP=HAS_SOFTCAP,
                HEAD_DIM=HEAD_DIM,
                BLOCK_D=BLOCK_D,
                BLOCK_N=BLOCK_N,
                BLOCK_SIZE=BLOCK_SIZE,
            )
        acc, row_max, row_sum = attend_tiles(
            acc,
            row_max,
            row_sum,
            q,
            positions,
            k_ptr + kv_head * stride_cache_head,
            v_ptr + kv_head * stride_cache_head,
            block_table_ptr + seq * stride_table,
            full_end,
            low,
            end,
            score_scale,
            softcap,
            stride_cache_block,
            stride_cache_token,
            IS_MASKED=True,
            WINDOW=WINDOW,
            HAS_SOFTCAP=HAS_SOFTCAP,
            HEAD_DIM=HEAD_DIM,
            BLOCK_D=BLOCK_D,
            BLOCK_N=BLOCK_N,
            BLOCK_SIZE=BLOCK_SIZE,
        )
        if num_splits == 1:
            # A padding row has no keys: sum 0, output 0.
            mixed = acc / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]
            out_ptrs = out_ptr + seq * stride_out + (heads * HEAD_DIM)[:, None]
            tl.store(out_ptrs + columns[None, :], mixed.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            place = seq * max_splits_bound + split
            partial_ptrs = partial_ptr + (place * num_q_heads + heads)[:, None] * HEAD_DIM
            tl.store(partial_ptrs + columns[None, :], acc, mask=mask)
            stats_ptrs = stats_ptr + place * (2 * num_q_heads) + heads
            tl.store(stats_ptrs, row_max, mask=is_row)
            tl.store(stats_ptrs + num_q_heads, row_sum, mask=is_row)


@triton.jit(do_not_specialize=["max_splits_bound"])
def _merge_kernel(
    seq_lens_ptr,
    partial_ptr,
    stats_ptr,
    out_ptr,
    stride_out,
    max_splits_bound,
    NUM_Q_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    KEY_ALIGNMENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    seq_len = tl.load(seq_lens_ptr + seq)
    _, _, _, num_splits = _split_layout(seq_len, WINDOW, SPLIT, MAX_SPLITS, KEY_ALIGNMENT)
    if num_splits > 1:
        columns = tl.arange(0, BLOCK_D)
        is_column = columns < HEAD_DIM
        first_place = seq * max_splits_bound
        splits = tl.arange(0, MAX_SPLITS)
        stats_ptrs = stats_ptr + (first_place + splits) * (2 * NUM_Q_HEADS) + head
        is_split = splits < num_splits
        maxima = tl.load(stats_ptrs, mask=is_split, other=float("-inf"))
        sums = tl.load(stats_ptrs + NUM_Q_HEADS, mask=is_split, other=0.0)
        highest = tl.max(maxima, axis=0)
        total = tl.sum(sums * tl.exp2(maxima - highest), axis=0)
        acc = tl.zeros([BLOCK_D], tl.float32)
        for base in range(0, num_splits, BLOCK_S):
            part = base + tl.arange(0, BLOCK_S)
            is_part = part < num_splits
            places = first_place + part
            weights = tl.load(
                stats_ptr + places * (2 * NUM_Q_HEADS) + head, mask=is_part, other=float("-inf")
            )
            partial_ptrs = partial_ptr + ((places * NUM_Q_HEADS + head) * HEAD_DIM)[:, None]
            partial = tl.load(
                partial_ptrs + columns[None, :],
                mask=is_part[:, None] & is_column[None, :],
                other=0.0,
            )
            acc += tl.sum(partial * tl.exp2(weights - highest)[:, None], axis=0)
        out_ptrs = out_ptr + seq * stride_out + head * HEAD_DIM + columns
        tl.store(out_ptrs, (acc / total).to(out_ptr.dtype.element_ty), mask=is_column)


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    metadata: AttentionMetadata,
    out: torch.Tensor,
    *,
    softmax_scale: float,
    sliding_window: int | None,
    logit_softcap: float,
    tiles: DecodeTiles | None = None,
) -> None:
    """Attention of the leading `metadata.num_decodes` sequences.

    Args:
        q: [num_decodes, Hq, D].
        k_cache: [N, block_size, Hkv, D]; block_size a power of two.
        v_cache: Likewise, with the same strides.
        metadata: Layout of the batch; `max_seq_len` bounds the workspace.
        out: [num_decodes, Hq * D], written in place; zero where `seq_lens` is 0.
        softmax_scale: Factor of the scores.
        sliding_window: Tokens a position sees, itself included; None for all.
        logit_softcap: Bound of the scores; 0 for none.
        tiles: Launch shape; default `decode_tiles`.
    """
    num_seqs, num_q_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    window = sliding_window or 0
    tiles = tiles or decode_tiles(q.dtype, head_dim)
    seen = min(metadata.max_seq_len, window + KEY_ALIGNMENT) if window else metadata.max_seq_len
    splits_bound = min(max(triton.cdiv(seen, SPLIT), 1), MAX_SPLITS)
    layout = {
        "WINDOW": window,
        "SPLIT": SPLIT,
        "MAX_SPLITS": MAX_SPLITS,
        "KEY_ALIGNMENT": KEY_ALIGNMENT,
    }

    def make_plan() -> torch.Tensor:
        plan = torch.empty(1 + num_seqs * splits_bound, dtype=torch.int32, device=q.device)
        _plan_kernel[(1,)](
            metadata.seq_lens,
            plan,
            num_seqs,
            **layout,
            BLOCK=_PLAN_BLOCK,
            num_warps=8,
            enable_fp_fusion=True,
        )
        return plan

    plan = metadata.once_per_step(("decode plan", window), make_plan)
    # Without a second split there is nothing to merge, and nothing is written here.
    shape = (num_seqs, splits_bound, num_q_heads) if splits_bound > 1 else (0, 0, 0)
    partial = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((*shape, 2), dtype=torch.float32, device=q.device)
    score_scale, softcap = score_factors(softmax_scale, logit_softcap)
    num_programs = min(
        num_seqs * splits_bound * num_kv_heads,
        num_multiprocessors(q.device) * tiles.programs_per_processor,
    )
    group = num_q_heads // num_kv_heads
    block_d = max(triton.next_power_of_2(head_dim), 16)
    _split_kernel[(num_programs,)](
        q,
        k_cache,
        v_cache,
        metadata.block_table,
        metadata.seq_lens,
        plan,
        partial,
        stats,
        out,
        score_scale,
        softcap,
        q.stride(0),
        q.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        metadata.block_table.stride(0),
        out.stride(0),
        splits_bound,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        HAS_SOFTCAP=logit_softcap != 0.0,
        **layout,
        BLOCK_M=max(16, triton.next_power_of_2(group)),
        BLOCK_D=block_d,
        BLOCK_N=tiles.block_n,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
    )
    if splits_bound > 1:
        _merge_kernel[(num_seqs, num_q_heads)](
            metadata.seq_lens,
            partial,
            stats,
            out,
            out.stride(0),
            splits_bound,
            NUM_Q_HEADS=num_q_heads,
            HEAD_DIM=head_dim,
            **layout,
            BLOCK_D=block_d,
            BLOCK_S=_MERGE_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
