"""Attention of prefilling sequences: ragged queries over cached prefix and new tokens alike.

    out[t, h] = softmax_j(q[t, h] k[j, h / group] scale) v[j, h / group],  i - window < j <= i

for token t at position i of its sequence. All keys come from the paged cache, where the step has
already stored the new ones: whole prompts, chunks and suffixes of cached prefixes are one path.

| argument            | shape, dtype                          | duty                              |
|---------------------|---------------------------------------|-----------------------------------|
| q_ptr               | [T, Hq, D] bf16, fp16 or fp32         | stride 1 along D                  |
| k_ptr, v_ptr        | [N, block_size, Hkv, D], same dtype   | equal strides, 1 along D          |
| block_table_ptr     | [rows, max_blocks] int32              | stride 1 along blocks             |
| block_rows_ptr      | [B] int64                             | row of the table; None: b has b   |
| seq_lens_ptr        | [B] int32                             | KV length after the step          |
| query_start_loc_ptr | [B + 1] int32                         | first row of q of each sequence   |
| counts_ptr          | [2] int32                             | decoding and all sequences; None: |
|                     |                                       | num_decodes, num_seqs             |
| out_ptr             | [T, Hq * D], q's dtype                | stride 1; rows of no sequence are |
|                     |                                       | not written                       |

Grid (programs,), which walk the list of (tile, KV head). A tile is BLOCK_Q query tokens of one
sequence times the query heads of one KV head, packed as rows token-major: one pass over the keys
serves the whole group, and few tokens (a short suffix, the diagonal) waste few rows. A batch has
floor(tokens / BLOCK_Q) + sequences tiles; sequence s owns those from floor(start_s / BLOCK_Q) + s
on, as in vLLM's unified Triton kernel (vllm-project/vllm, Apache-2.0), and tiles past a sequence's
end are skipped. The list is walked from the last tile to the first: under the causal mask the last
are the longest.

Eager, there is a program per item. In a captured step the list's length is known on the device
only: programs are then a few times what the device holds at once, each takes every n-th item, and
a step with little or nothing to prefill does not pay for the bucket's tiles.

Keys up to the tile's first query need no mask; the one or two tiles of keys on the diagonal do. A
sliding window starts at its first visible tile, masks the tiles its edge crosses, and runs the
middle unmasked.

Numerics: see `attention_tiles`. The tile shape is fixed per dtype and head size, so a token's bits
depend neither on the batch nor on how its prompt was cut into chunks (a chunk of one token is a
decode and rounds like one). Row and block offsets are int64. constexpr: what is fixed per model;
token and sequence counts are not specialised.

Tuning (`prefill_tiles`): 128 x 64 tiles of rows and keys, two warp groups (wgmma) and three stages
for 16 bit up to D = 128; chosen from the published ones of Triton's attention tutorial, not yet
measured.
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
from engine.kernels.prefill_hopper import can_attend, prefill_on_hopper

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
def _sequence_of_tile(query_start_loc_ptr, tile, num_decodes, num_prefills, BLOCK_Q: tl.constexpr):
    """Largest s with floor(start_s / BLOCK_Q) + s <= tile, counting prefilling sequences from 0.

    All sequences are looked at, 256 at a time: one load's latency instead of a binary search's
    chain of them.
    """
    num_before = num_prefills * 0
    for first in range(0, num_prefills, 256):
        prefills = first + tl.arange(0, 256)
        is_prefill = prefills < num_prefills
        start_ptrs = query_start_loc_ptr + num_decodes + prefills
        starts = tl.load(start_ptrs, mask=is_prefill, other=0) - num_decodes
        is_before = is_prefill & (starts // BLOCK_Q + prefills <= tile)
        num_before += tl.sum(is_before.to(tl.int32), axis=0)
    return num_before - 1


@triton.jit
def _attend_causally(
    q,
    positions,
    first_position,
    end,
    k_ptr,
    v_ptr,
    block_table_ptr,
    score_scale,
    softcap,
    stride_block,
    stride_token,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    KEY_ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Normalised attention of one tile, whose queries lie at `first_position` to `end - 1`."""
    low = first_position * 0
    first_tile = low
    edge_end = low
    if WINDOW > 0:
        low = tl.maximum(first_position - WINDOW + 1, 0)
        first_tile = low - low % KEY_ALIGNMENT
        # From here on every key is within the window of the last query, hence of all.
        edge_end = tl.cdiv(tl.maximum(end - WINDOW, 0), BLOCK_N) * BLOCK_N
        edge_end = tl.minimum(tl.maximum(edge_end, first_tile), end)
    diagonal = (first_position + 1) // BLOCK_N * BLOCK_N
    diagonal = tl.maximum(diagonal, edge_end)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if WINDOW > 0:
        acc, row_max, row_sum = attend_tiles(
            acc,
            row_max,
            row_sum,
            q,
            positions,
            k_ptr,
            v_ptr,
            block_table_ptr,
            first_tile,
            low,
            edge_end,
            score_scale,
            softcap,
            stride_block,
            stride_token,
            IS_MASKED=True,
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
        k_ptr,
        v_ptr,
        block_table_ptr,
        edge_end,
        low,
        diagonal,
        score_scale,
        softcap,
        stride_block,
        stride_token,
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
        k_ptr,
        v_ptr,
        block_table_ptr,
        diagonal,
        low,
        end,
        score_scale,
        softcap,
        stride_block,
        stride_token,
        IS_MASKED=True,
        WINDOW=WINDOW,
        HAS_SOFTCAP=HAS_SOFTCAP,
        HEAD_DIM=HEAD_DIM,
        BLOCK_D=BLOCK_D,
        BLOCK_N=BLOCK_N,
        BLOCK_SIZE=BLOCK_SIZE,
    )
    return acc / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]


@triton.jit
def _prefill_item(
    item,
    num_decodes,
    num_prefills,
    num_tiles,
    q_ptr,
    k_ptr,
    v_ptr,
    block_table_ptr,
    block_rows_ptr,
    seq_lens_ptr,
    query_start_loc_ptr,
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
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_BLOCK_ROWS: tl.constexpr,
    KEY_ALIGNMENT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attention of one (tile, KV head), or nothing where the tile is past its sequence's end."""
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    tile = num_tiles - 1 - item // NUM_KV_HEADS
    kv_head = item % NUM_KV_HEADS
    prefill = _sequence_of_tile(query_start_loc_ptr, tile, num_decodes, num_prefills, BLOCK_Q)
    seq = (num_decodes + prefill).to(tl.int64)
    first_row = tl.load(query_start_loc_ptr + seq)
    query_len = tl.load(query_start_loc_ptr + seq + 1) - first_row
    first_query = (tile - (first_row - num_decodes) // BLOCK_Q - prefill) * BLOCK_Q
    if first_query < query_len:
        seq_len = tl.load(seq_lens_ptr + seq)
        table_row = seq
        if HAS_BLOCK_ROWS:
            table_row = tl.load(block_rows_ptr + seq)
        queries = first_query + rows // GROUP
        heads = kv_head * GROUP + rows % GROUP
        is_row = (rows < BLOCK_Q * GROUP) & (queries < query_len)
        mask = is_row[:, None] & (columns < HEAD_DIM)[None, :]
        tokens = (first_row + queries).to(tl.int64)
        q_ptrs = q_ptr + (tokens * stride_q_token + heads * stride_q_head)[:, None]
        q = tl.load(q_ptrs + columns[None, :], mask=mask, other=0.0)
        mixed = _attend_causally(
            q,
            seq_len - query_len + queries,
            seq_len - query_len + first_query,
            tl.minimum(seq_len - query_len + first_query + BLOCK_Q, seq_len),
            k_ptr + kv_head * stride_cache_head,
            v_ptr + kv_head * stride_cache_head,
            block_table_ptr + table_row * stride_table,
            score_scale,
            softcap,
            stride_cache_block,
            stride_cache_token,
            HEAD_DIM=HEAD_DIM,
            BLOCK_SIZE=BLOCK_SIZE,
            WINDOW=WINDOW,
            HAS_SOFTCAP=HAS_SOFTCAP,
            KEY_ALIGNMENT=KEY_ALIGNMENT,
            BLOCK_M=BLOCK_M,
            BLOCK_D=BLOCK_D,
            BLOCK_N=BLOCK_N,
        )
        out_ptrs = out_ptr + (tokens * stride_out + heads * HEAD_DIM)[:, None]
        tl.store(out_ptrs + columns[None, :], mixed.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_decodes", "num_seqs"])
def _prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    block_table_ptr,
    block_rows_ptr,
    seq_lens_ptr,
    query_start_loc_ptr,
    counts_ptr,
    out_ptr,
    num_decodes,
    num_seqs,
    score_scale,
    softcap,
    stride_q_token,
    stride_q_head,
    stride_cache_block,
    stride_cache_token,
    stride_cache_head,
    stride_table,
    stride_out,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_BLOCK_ROWS: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    KEY_ALIGNMENT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    if HAS_COUNTS:
        num_decodes = tl.load(counts_ptr)
        num_seqs = tl.load(counts_ptr + 1)
    num_prefills = num_seqs - num_decodes
    num_tokens = tl.load(query_start_loc_ptr + num_seqs) - num_decodes
    num_tiles = tl.where(num_prefills > 0, num_tokens // BLOCK_Q + num_prefills, 0)
    program = tl.program_id(0)
    num_items = num_tiles * NUM_KV_HEADS
    # A loop costs registers, at head_dim 64 enough of them to halve the resident programs: 317
    # instead of 406 TFLOP/s. Eager launches have a program for every item and go without.
    if HAS_COUNTS:
        for item in range(program, num_items, tl.num_programs(0)):
            _prefill_item(
                item,
                num_decodes,
                num_prefills,
                num_tiles,
                q_ptr,
                k_ptr,
                v_ptr,
                block_table_ptr,
                block_rows_ptr,
                seq_lens_ptr,
                query_start_loc_ptr,
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
                NUM_KV_HEADS=NUM_KV_HEADS,
                GROUP=GROUP,
                HEAD_DIM=HEAD_DIM,
                BLOCK_SIZE=BLOCK_SIZE,
                WINDOW=WINDOW,
                HAS_SOFTCAP=HAS_SOFTCAP,
                HAS_BLOCK_ROWS=HAS_BLOCK_ROWS,
                KEY_ALIGNMENT=KEY_ALIGNMENT,
                BLOCK_Q=BLOCK_Q,
                BLOCK_M=BLOCK_M,
                BLOCK_D=BLOCK_D,
                BLOCK_N=BLOCK_N,
            )
    elif program < num_items:
        _prefill_item(
            program,
            num_decodes,
            num_prefills,
            num_tiles,
            q_ptr,
            k_ptr,
            v_ptr,
            block_table_ptr,
            block_rows_ptr,
            seq_lens_ptr,
            query_start_loc_ptr,
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
            NUM_KV_HEADS=NUM_KV_HEADS,
            GROUP=GROUP,
            HEAD_DIM=HEAD_DIM,
            BLOCK_SIZE=BLOCK_SIZE,
            WINDOW=WINDOW,
            HAS_SOFTCAP=HAS_SOFTCAP,
            HAS_BLOCK_ROWS=HAS_BLOCK_ROWS,
            KEY_ALIGNMENT=KEY_ALIGNMENT,
            BLOCK_Q=BLOCK_Q,
            BLOCK_M=BLOCK_M,
            BLOCK_D=BLOCK_D,
            BLOCK_N=BLOCK_N,
        )


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    metadata: AttentionMetadata,
    out: torch.Tensor,
    *,
    softmax_scale: float,
    sliding_window: int | None,
    logit_softcap: float,
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
        tiles: Launch shape of this file's kernel; default: `prefill_hopper` where it serves the
            layer, else `prefill_tiles`.
    """
    if tiles is None and can_attend(q, k_cache, v_cache, sliding_window, logit_softcap):
        prefill_on_hopper(q, k_cache, v_cache, metadata, out, softmax_scale=softmax_scale)
        return
    num_tokens, num_q_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = num_q_heads // num_kv_heads
    tiles = tiles or prefill_tiles(q.dtype, head_dim)
    block_m = max(tiles.block_m, triton.next_power_of_2(group))
    block_q = block_m // group
    counts = metadata.device_counts
    if counts is None:
        num_prefills = metadata.num_seqs - metadata.num_decodes
        num_programs = (
            (num_tokens - metadata.num_decodes) // block_q + num_prefills
        ) * num_kv_heads
    else:
        num_programs = (num_tokens // block_q + metadata.max_prefills) * num_kv_heads
        num_programs = min(num_programs, PROGRAMS_PER_PROCESSOR * num_multiprocessors(q.device))
    if not num_programs:
        return
    score_scale, softcap = score_factors(softmax_scale, logit_softcap)
    _prefill_kernel[(num_programs,)](
        q,
        k_cache,
        v_cache,
        metadata.block_table,
        metadata.block_rows,
        metadata.seq_lens,
        metadata.query_start_loc,
        counts,
        out,
        metadata.num_decodes,
        metadata.num_seqs,
        score_scale,
        softcap,
        q.stride(0),
        q.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        metadata.block_table.stride(0),
        out.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        WINDOW=sliding_window or 0,
        HAS_SOFTCAP=logit_softcap != 0.0,
        HAS_BLOCK_ROWS=metadata.block_rows is not None,
        HAS_COUNTS=counts is not None,
        KEY_ALIGNMENT=KEY_ALIGNMENT,
        BLOCK_Q=block_q,
        BLOCK_M=block_m,
        BLOCK_D=max(triton.next_power_of_2(head_dim), 16),
        BLOCK_N=tiles.block_n,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
    )
