"""The keys of one tile of prefill attention, in up to three runs of `attend_tiles`.

    edge      keys that some of the tile's queries no longer see (window, chunk)    masked
    middle    keys that all of them see                                             unmasked
    diagonal  keys from the first query's next on                                   masked

A sliding window starts at its first visible tile of keys. So does a chunk, and it has an edge only
where a tile of queries crosses into the next chunk.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.attention_tiles import attend_tiles


@triton.jit
def attend_causally(
    q,
    positions,
    first_position,
    end,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    block_table_ptr,
    score_scale,
    softcap,
    stride_block,
    stride_token,
    stride_scales,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    KEY_ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(acc, row_max, row_sum) of one tile, whose queries lie at `first_position` to `end - 1`."""
    low = first_position * 0
    first_tile = low
    edge_end = low
    if WINDOW > 0 or CHUNK > 0:
        last_low = low
        if WINDOW > 0:
            low = tl.maximum(first_position - WINDOW + 1, 0)
            last_low = tl.maximum(end - WINDOW, 0)
        if CHUNK > 0:
            low = tl.maximum(low, first_position // CHUNK * CHUNK)
            last_low = tl.maximum(last_low, (end - 1) // CHUNK * CHUNK)
        first_tile = low - low % KEY_ALIGNMENT
        # From here on the last query sees every key before it, and so do all.
        edge_end = tl.cdiv(last_low, BLOCK_N) * BLOCK_N
        edge_end = tl.minimum(tl.maximum(edge_end, first_tile), end)
    diagonal = (first_position + 1) // BLOCK_N * BLOCK_N
    diagonal = tl.maximum(diagonal, edge_end)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    first_tiles = (first_tile, edge_end, diagonal)
    ends = (edge_end, diagonal, end)
    for run in tl.static_range(3):
        if run > 0 or WINDOW > 0 or CHUNK > 0:
            acc, row_max, row_sum = attend_tiles(
                acc,
                row_max,
                row_sum,
                q,
                positions,
                k_ptr,
                v_ptr,
                k_scales_ptr,
                v_scales_ptr,
                block_table_ptr,
                first_tiles[run],
                low,
                ends[run],
                score_scale,
                softcap,
                stride_block,
                stride_token,
                stride_scales,
                IS_MASKED=run != 1,
                WINDOW=WINDOW,
                CHUNK=CHUNK,
                HAS_SOFTCAP=HAS_SOFTCAP,
                HEAD_DIM=HEAD_DIM,
                BLOCK_D=BLOCK_D,
                BLOCK_N=BLOCK_N,
                BLOCK_SIZE=BLOCK_SIZE,
            )
    return acc, row_max, row_sum
