"""Attention of prefilling sequences: ragged queries over cached prefix and new tokens alike.

    out[t, h] = softmax_j(q[t, h] k[j, h / group] scale) v[j, h / group],  i - window < j <= i

for token t at position i of its sequence. All keys come from the paged cache, where the step has
already stored the new ones: whole prompts, chunks and suffixes of cached prefixes are one path.

| argument            | shape, dtype                          | duty                              |
|---------------------|---------------------------------------|-----------------------------------|
| q_ptr               | [T, Hq, D] bf16, fp16 or fp32         | stride 1 along D                  |
| k_ptr, v_ptr        | [N, block_size, Hkv, D], same dtype   | equal strides, 1 along D          |
| block_table_ptr     | [B, max_blocks] int32                 | stride 1 along blocks             |
| seq_lens_ptr        | [B] int32                             | KV length after the step          |
| query_start_loc_ptr | [B + 1] int32                         | first row of q of each sequence   |
| out_ptr             | [T, Hq * D], q's dtype                | stride 1; rows of no sequence are |
|                     |                                       | not written                       |

Grid (tiles * Hkv,). A tile is BLOCK_Q query tokens of one sequence times the query heads of one
KV head, packed as rows token-major: one pass over the keys serves the whole group, and few tokens
(a short suffix, the diagonal) waste few rows. The number of tiles is bounded by
floor(tokens / BLOCK_Q) + sequences, so the grid needs no lengths from the device; sequence s owns
tiles from floor(start_s / BLOCK_Q) + s on, found by binary search, as in vLLM's unified Triton
kernel (vllm-project/vllm, Apache-2.0); tiles past a sequence's end return at once. Tiles run from
the last to the first: under the causal mask the last are the longest.

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

from engine.kernels.attention_tiles import KEY_ALIGNMENT, attend_tiles, score_factors
from engine.kernels.metadata import AttentionMetadata


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
    """Largest s with floor(start_s / BLOCK_Q) + s <= tile, counting prefilling sequences from 0."""
    low = num_decodes * 0
    high = num_prefills
    while high - low > 1:
        middle = (low + high) // 2
        start = tl.load(query_start_loc_ptr + num_decodes + middle) - num_decodes
        if start // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["num_decodes", "num_prefills", "num_tiles"])
def _prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    block_table_ptr,
    seq_lens_ptr,
    query_start_loc_ptr,
    out_ptr,
    num_decodes,
    num_prefills,
    num_tiles,
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
    KEY_ALIGNMENT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0)
    tile = num_tiles - 1 - program // NUM_KV_HEADS
    kv_head = program % NUM_KV_HEADS
    prefill = _sequence_of_tile(query_start_loc_ptr, tile, num_decodes, num_prefills, BLOCK_Q)
    seq = (num_decodes + prefill).to(tl.int64)
    first_row = tl.load(query_start_loc_ptr + seq)
    query_len = tl.load(query_start_loc_ptr + seq + 1) - first_row
    first_query = (tile - (first_row - num_decodes) // BLOCK_Q - prefill) * BLOCK_Q
    if first_query < query_len:
        seq_len = tl.load(seq_lens_ptr + seq)
        rows = tl.arange(0, BLOCK_M)
        columns = tl.arange(0, BLOCK_D)
        queries = first_query + rows // GROUP
        heads = kv_head * GROUP + rows % GROUP
        is_row = (rows < BLOCK_Q * GROUP) & (queries < query_len)
        mask = is_row[:, None] & (columns < HEAD_DIM)[None, :]
        tokens = (first_row + queries).to(tl.int64)
        q_ptrs = q_ptr + (tokens * stride_q_token + heads * stride_q_head)[:, None]
        q = tl.load(q_ptrs + columns[None, :], mask=mask, other=0.0)

        first_position = seq_len - query_len + first_query
        positions = seq_len - query_len + queries
        last_position = tl.minimum(first_position + BLOCK_Q, seq_len) - 1
        end = last_position + 1
        low = first_position * 0
        first_tile = low
        edge_end = low
        if WINDOW > 0:
            low = tl.maximum(first_position - WINDOW + 1, 0)
            first_tile = low - low % KEY_ALIGNMENT
            # From here on every key is within the window of the last query, hence of all.
            edge_end = tl.cdiv(tl.maximum(last_position - WINDOW + 1, 0), BLOCK_N) * BLOCK_N
            edge_end = tl.minimum(tl.maximum(edge_end, first_tile), end)
        diagonal = (first_position + 1) // BLOCK_N * BLOCK_N
        diagonal = tl.maximum(diagonal, edge_end)

        k_head_ptr = k_ptr + kv_head * stride_cache_head
        v_head_ptr = v_ptr + kv_head * stride_cache_head
        table_ptr = block_table_ptr + seq * stride_table
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
                k_head_ptr,
                v_head_ptr,
                table_ptr,
                first_tile,
                low,
                edge_end,
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
        acc, row_max, row_sum = attend_tiles(
            acc,
            row_max,
            row_sum,
            q,
            positions,
            k_head_ptr,
            v_head_ptr,
            table_ptr,
            edge_end,
            low,
            diagonal,
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
            k_head_ptr,
            v_head_ptr,
            table_ptr,
            diagonal,
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
        mixed = acc / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]
        out_ptrs = out_ptr + (tokens * stride_out + heads * HEAD_DIM)[:, None]
        tl.store(out_ptrs + columns[None, :], mixed.to(out_ptr.dtype.element_ty), mask=mask)


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
    """Attention of the sequences after the leading `metadata.num_decodes`.

    Args:
        q: [T, Hq, D], all tokens of the step (`query_start_loc` counts from its first row).
        k_cache: [N, block_size, Hkv, D]; block_size a power of two.
        v_cache: Likewise, with the same strides.
        metadata: Layout of the batch.
        out: [T, Hq * D]; rows of prefilling sequences are written in place, others untouched.
        softmax_scale: Factor of the scores.
        sliding_window: Tokens a position sees, itself included; None for all.
        logit_softcap: Bound of the scores; 0 for none.
        tiles: Launch shape; default `prefill_tiles`.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    num_prefills = metadata.num_seqs - metadata.num_decodes
    group = num_q_heads // num_kv_heads
    tiles = tiles or prefill_tiles(q.dtype, head_dim)
    block_m = max(tiles.block_m, triton.next_power_of_2(group))
    block_q = block_m // group
    num_tiles = (num_tokens - metadata.num_decodes) // block_q + num_prefills
    score_scale, softcap = score_factors(softmax_scale, logit_softcap)
    _prefill_kernel[(num_tiles * num_kv_heads,)](
        q,
        k_cache,
        v_cache,
        metadata.block_table,
        metadata.seq_lens,
        metadata.query_start_loc,
        out,
        metadata.num_decodes,
        num_prefills,
        num_tiles,
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
        KEY_ALIGNMENT=KEY_ALIGNMENT,
        BLOCK_Q=block_q,
        BLOCK_M=block_m,
        BLOCK_D=max(triton.next_power_of_2(head_dim), 16),
        BLOCK_N=tiles.block_n,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
    )
