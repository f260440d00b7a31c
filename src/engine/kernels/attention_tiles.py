"""The inner loop that decode and prefill attention share: queries over tiles of paged keys.

    s = q k^T scale,  or  cap tanh(q k^T scale / cap)
    m' = max(m, max s);  p = 2^(s - m');  l = l 2^(m - m') + sum p;  acc = acc 2^(m - m') + p v

the online softmax of FlashAttention (Dao et al., arXiv 2205.14135) with base 2: `scale` arrives
multiplied by log2 e. Keys come from the block table: where a block holds at least one tile, one
scalar block id addresses the tile (constant strides, no arithmetic per lane); smaller blocks are
addressed by one id per key.

Numerics: scores, m, l and acc are fp32; p is rounded to v's dtype for the product. An extra tile
that is wholly masked for a row multiplies by 2^0 and adds zeros: a row's bits depend on the keys it
sees alone, not on the rows it shares a program with. fp32 inputs are multiplied as IEEE fp32.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634

# First tile of a window starts at a multiple of this, whatever the tile size.
KEY_ALIGNMENT = 64


@triton.jit
def load_block_ids(table_ptr, tile, end_key, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Block ids of the keys of a tile: a scalar where a block holds the tile, else [BLOCK_N]."""
    if BLOCK_SIZE >= BLOCK_N:
        return tl.load(table_ptr + tile // BLOCK_SIZE, mask=tile < end_key, other=0)
    else:  # noqa: RET505 - a compile-time branch: only one of them is traced
        keys = tile + tl.arange(0, BLOCK_N)
        return tl.load(table_ptr + keys // BLOCK_SIZE, mask=keys < end_key, other=0)


@triton.jit
def softmax_step(
    scores,
    visible,
    acc,
    row_max,
    row_sum,
    score_scale,
    softcap,
    IS_MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """One tile of the online softmax; returns (probabilities, acc rescaled, row_max, row_sum).

    Args:
        scores: [BLOCK_M, BLOCK_N] fp32: the bare products.
        visible: Broadcastable to the scores; read where IS_MASKED.
        acc: As in `attend_tiles`, like the rest.
        row_max: Likewise.
        row_sum: Likewise.
        score_scale: Likewise.
        softcap: Likewise.
        IS_MASKED: Whether some scores may be hidden; a row of none leaves acc and row_sum alone.
        HAS_SOFTCAP: As in `attend_tiles`.
    """
    if HAS_SOFTCAP:
        # tanh(x) = 2 sigmoid(2 x) - 1: no device library, and the interpreter has it.
        scores = softcap * (2.0 * tl.sigmoid(2.0 * score_scale * scores) - 1.0)
    if IS_MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    # Scores are scaled in the exponent (one fused multiply-add each), which needs a scale > 0.
    factor = 1.0 if HAS_SOFTCAP else score_scale
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * factor)
    shift = new_max
    if IS_MASKED:
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    probs = tl.exp2(scores * factor - shift[:, None])
    rescale = tl.exp2(row_max - shift)
    row_sum = row_sum * rescale + tl.sum(probs, axis=1)
    return probs, acc * rescale[:, None], new_max, row_sum


@triton.jit
def with_sink(row_sum, row_max, sinks_ptr, heads, is_row):
    """`row_sum` with the sink's part: a score without a value, [Hq], unscaled; None for no sinks.

    It joins last, so that whoever finishes a row has it in once. Where it lies 128 powers of two
    above the row's maximum its part is infinite, and the row's output 0, as it should be.
    """
    if sinks_ptr is not None:
        sinks = tl.load(sinks_ptr + heads, mask=is_row, other=0.0).to(tl.float32)
        row_sum += tl.exp2(sinks * 1.4426950408889634 - row_max)
    return row_sum


@triton.jit
def scores_of(q, k, scales_ptr, places, is_key):
    """[BLOCK_M, BLOCK_N] fp32: the bare products of q and k^T.

    Stored numbers are exact in q's dtype; scales of 8-bit keys, at `places` where `is_key`, follow
    in fp32. Plain keys have no pointer.
    """
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
    if scales_ptr is not None:
        scores *= tl.load(scales_ptr + places, mask=is_key, other=0.0)[None, :]
    return scores


@triton.jit
def add_values(probs, v, acc, scales_ptr, places, is_key, dtype: tl.constexpr):
    """`acc + probs v`, with the factors rounded to `dtype`; scales as in `scores_of`.

    A scale goes into the weight of its key, which is rounded anyway. In fp16, whose range ends at
    6e-8, it goes into the values instead.
    """
    if scales_ptr is not None:
        scales = tl.load(scales_ptr + places, mask=is_key, other=0.0)
        if dtype == tl.float16:
            v = v.to(tl.float32) * scales[:, None]
        else:
            probs *= scales[None, :]
    return tl.dot(probs.to(dtype), v.to(dtype), acc, input_precision="ieee")


@triton.jit
def attend_tiles(
    acc,
    row_max,
    row_sum,
    q,
    query_positions,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    block_table_ptr,
    first_tile,
    low_key,
    end_key,
    score_scale,
    softcap,
    stride_block,
    stride_token,
    stride_scales,
    IS_MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Run keys [first_tile, end_key) past the queries; returns (acc, row_max, row_sum).

    Args:
        acc: [BLOCK_M, BLOCK_D] fp32.
        row_max: [BLOCK_M] fp32, -inf at first.
        row_sum: [BLOCK_M] fp32.
        q: [BLOCK_M, BLOCK_D], zero beyond HEAD_DIM.
        query_positions: [BLOCK_M] int32; read where IS_MASKED.
        k_ptr: Cache, advanced to the KV head.
        v_ptr: Likewise; same strides.
        k_scales_ptr: Scales of 8-bit keys, advanced to the KV head; None for plain ones.
        v_scales_ptr: Likewise, of the values.
        block_table_ptr: Row of the sequence.
        first_tile: Multiple of BLOCK_N.
        low_key: Keys before it are not read where IS_MASKED (their blocks may be gone).
        end_key: Keys from here on are not read; a multiple of BLOCK_N unless IS_MASKED.
        score_scale: softmax_scale * log2 e, or softmax_scale / cap with HAS_SOFTCAP; > 0.
        softcap: cap * log2 e.
        stride_block: Between blocks.
        stride_token: Between tokens of a block.
        stride_scales: Between the scales of blocks.
        IS_MASKED: Compare every key with every query's position.
        WINDOW: Keys a query sees, itself included; 0 for all.
        CHUNK: Keys of the chunk that a query sees, up to itself; 0 for all.
        HAS_SOFTCAP: Whether scores are bounded.
        HEAD_DIM: D.
        BLOCK_D: Power of two >= D.
        BLOCK_N: Keys per tile.
        BLOCK_SIZE: Tokens per block, a power of two.
    """
    columns = tl.arange(0, BLOCK_D)
    in_tile = tl.arange(0, BLOCK_N)
    is_column = (columns < HEAD_DIM)[None, :]
    # Block ids are loaded one tile ahead and carried: were the load of k to follow from a load of
    # the same round, the compiler would spend half of its pipeline stages on the ids.
    block_ids = load_block_ids(block_table_ptr, first_tile, end_key, BLOCK_N, BLOCK_SIZE)
    for tile in range(first_tile, end_key, BLOCK_N):
        keys = tile + in_tile
        places = block_ids.to(tl.int64) * stride_block + (keys % BLOCK_SIZE) * stride_token
        scale_places = block_ids.to(tl.int64) * stride_scales + keys % BLOCK_SIZE
        block_ids = load_block_ids(block_table_ptr, tile + BLOCK_N, end_key, BLOCK_N, BLOCK_SIZE)
        places = places[:, None] + columns[None, :]
        if IS_MASKED:
            is_read = ((keys >= low_key) & (keys < end_key))[:, None] & is_column
            k = tl.load(k_ptr + places, mask=is_read, other=0.0)
        elif HEAD_DIM == BLOCK_D:
            k = tl.load(k_ptr + places)
        else:
            k = tl.load(k_ptr + places, mask=is_column, other=0.0)
        is_key = (keys >= low_key) & (keys < end_key)
        scores = scores_of(q, k, k_scales_ptr, scale_places, is_key)
        visible = keys < end_key
        if IS_MASKED:
            visible = (keys[None, :] <= query_positions[:, None]) & (keys < end_key)[None, :]
            if WINDOW > 0:
                visible = visible & (keys[None, :] > query_positions[:, None] - WINDOW)
            if CHUNK > 0:
                starts = query_positions - query_positions % CHUNK
                visible = visible & (keys[None, :] >= starts[:, None])
        probs, acc, row_max, row_sum = softmax_step(
            scores,
            visible,
            acc,
            row_max,
            row_sum,
            score_scale,
            softcap,
            IS_MASKED=IS_MASKED,
            HAS_SOFTCAP=HAS_SOFTCAP,
        )
        if IS_MASKED:
            v = tl.load(v_ptr + places, mask=is_read, other=0.0)
        elif HEAD_DIM == BLOCK_D:
            v = tl.load(v_ptr + places)
        else:
            v = tl.load(v_ptr + places, mask=is_column, other=0.0)
        acc = add_values(probs, v, acc, v_scales_ptr, scale_places, is_key, q.dtype)
    return acc, row_max, row_sum


def score_factors(softmax_scale: float, logit_softcap: float) -> tuple[float, float]:
    """(`score_scale`, `softcap`) of `attend_tiles`."""
    if logit_softcap:
        return softmax_scale / logit_softcap, logit_softcap * LOG2_E
    return softmax_scale * LOG2_E, 0.0


@functools.cache
def starts_kernels_early(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it runs: compute capability 9.0 and above."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 2 on the CPU, where only Triton's interpreter runs."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
