"""Attention of a longer sequence within the persistent decode kernel: see `persistent_attention`.

An item is one KV head and one split of the keys, read once for all query heads of the group, which
are the rows of a tensor core tile, padded to 16, with the new key and the new value.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.attention_tiles import load_block_ids
from engine.kernels.persistent_exchange import await_words, publish, unpair
from engine.kernels.persistent_heads import (
    load_halves,
    normed_halves,
    scaled_scores,
    store_halves,
    sum_halves,
    turned_halves,
)


@triton.jit
def attend_long(
    qkv_words_ptr,
    partial_words_ptr,
    stats_words_ptr,
    epoch,
    rules,
    cache,
    seq_len,
    first,
    num_tiles,
    num_splits,
    low_key,
    slot,
    new_place,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_HEAD_NORMS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    LONG_BLOCK: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DTYPE: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Items (KV head, split) of a longer sequence."""
    num_q_heads: tl.constexpr = NUM_KV_HEADS * GROUP
    half: tl.constexpr = HEAD_DIM // 2
    q_norm_ptr, k_norm_ptr, angles_ptr, num_angles, score_scale, softcap, eps, weight_offset = rules
    k_cache_ptr, v_cache_ptr, table_ptr = cache[0], cache[1], cache[2]
    stride_cache_block, stride_cache_token, stride_cache_head = cache[3], cache[4], cache[5]
    halves = tl.arange(0, half)
    rows = tl.arange(0, BLOCK_M)
    in_tile = tl.arange(0, LONG_BLOCK)
    is_q = rows < GROUP
    for item in range(tl.program_id(0), NUM_KV_HEADS * num_splits, tl.num_programs(0)):
        split = item // NUM_KV_HEADS
        kv_head = item % NUM_KV_HEADS
        start = first + split * num_tiles // num_splits * LONG_BLOCK
        end = tl.minimum(first + (split + 1) * num_tiles // num_splits * LONG_BLOCK, seq_len)
        has_new = end == seq_len
        end = tl.minimum(end, seq_len - 1)
        head_offset = kv_head * stride_cache_head
        block_ids = load_block_ids(table_ptr, start, end, LONG_BLOCK, BLOCK_SIZE)
        keys = start + in_tile
        visible = (keys >= low_key) & (keys < end)
        places = block_ids.to(tl.int64) * stride_cache_block
        places += keys % BLOCK_SIZE * stride_cache_token + head_offset
        places = places[:, None] + halves[None, :]
        k = load_halves(k_cache_ptr, places, visible[:, None])
        v = load_halves(v_cache_ptr, places, visible[:, None])
        block_ids = load_block_ids(table_ptr, start + LONG_BLOCK, end, LONG_BLOCK, BLOCK_SIZE)
        cos = tl.load(angles_ptr, mask=halves < num_angles, other=1.0)[None, :]
        sin = tl.load(angles_ptr + half, mask=halves < num_angles, other=0.0)[None, :]
        if HAS_HEAD_NORMS:
            norm_ptrs = tl.where(is_q, q_norm_ptr, k_norm_ptr)[:, None] + halves[None, :]
            norm_low, norm_high = tl.load(norm_ptrs), tl.load(norm_ptrs + half)

        # Rows: the query heads, the new key and the new value.
        heads = tl.where(is_q, kv_head * GROUP + rows, num_q_heads + kv_head)
        heads = tl.where(rows == GROUP + 1, num_q_heads + NUM_KV_HEADS + kv_head, heads)
        data = await_words(
            qkv_words_ptr + (heads * half)[:, None] + halves[None, :], epoch, THREADS
        )
        raw_low, raw_high = unpair(data, DTYPE)
        raw_low, raw_high = raw_low.to(tl.float32), raw_high.to(tl.float32)
        low, high = raw_low, raw_high
        if HAS_HEAD_NORMS:
            scale = tl.rsqrt(tl.sum(low * low + high * high, axis=1) / HEAD_DIM + eps)
            low, high = normed_halves(
                low,
                high,
                scale[:, None],
                norm_low,
                norm_high,
                weight_offset,
                HAS_OFFSET,
                DTYPE,
            )
        low, high = turned_halves(low, high, cos, sin, DTYPE)
        is_k = (rows == GROUP)[:, None]
        new_k_low, new_k_high = sum_halves(
            tl.where(is_k, low, 0.0), tl.where(is_k, high, 0.0), 0, THREADS
        )
        is_v = (rows == GROUP + 1)[:, None]
        new_v_low, new_v_high = sum_halves(
            tl.where(is_v, raw_low, 0.0), tl.where(is_v, raw_high, 0.0), 0, THREADS
        )
        if has_new & (slot >= 0):
            place = new_place + head_offset
            store_halves(k_cache_ptr, place, halves, new_k_low, new_k_high)
            store_halves(v_cache_ptr, place, halves, new_v_low, new_v_high)
        score = tl.sum(low * new_k_low[None, :] + high * new_k_high[None, :], axis=1)
        score = scaled_scores(score, score_scale, softcap, HAS_SOFTCAP)
        row_max = tl.where(has_new, score, float("-inf"))
        row_sum = tl.where(has_new, 1.0, 0.0) + tl.zeros([BLOCK_M], tl.float32)
        nothing = tl.zeros([BLOCK_M, half], tl.float32)
        acc_low = tl.where(has_new, new_v_low[None, :], 0.0) + nothing
        acc_high = tl.where(has_new, new_v_high[None, :], 0.0) + nothing
        low, high = low.to(DTYPE), high.to(DTYPE)
        for tile in range(start, end, LONG_BLOCK):
            keys = tile + LONG_BLOCK + in_tile
            places = block_ids.to(tl.int64) * stride_cache_block
            places += keys % BLOCK_SIZE * stride_cache_token + head_offset
            places = places[:, None] + halves[None, :]
            next_visible = keys < end
            next_k = load_halves(k_cache_ptr, places, next_visible[:, None])
            next_v = load_halves(v_cache_ptr, places, next_visible[:, None])
            block_ids = load_block_ids(
                table_ptr, tile + 2 * LONG_BLOCK, end, LONG_BLOCK, BLOCK_SIZE
            )
            scores = tl.dot(low, tl.trans(k[0]), input_precision="ieee")
            scores = tl.dot(high, tl.trans(k[1]), scores, input_precision="ieee")
            scores = scaled_scores(scores, score_scale, softcap, HAS_SOFTCAP)
            scores = tl.where(visible[None, :], scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, axis=1))
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            probs = tl.exp2(scores - shift[:, None])
            rescale = tl.exp2(row_max - shift)
            row_sum = row_sum * rescale + tl.sum(probs, axis=1)
            row_max = new_max
            probs = probs.to(DTYPE)
            acc_low *= rescale[:, None]
            acc_low = tl.dot(probs, v[0], acc_low, input_precision="ieee")
            acc_high *= rescale[:, None]
            acc_high = tl.dot(probs, v[1], acc_high, input_precision="ieee")
            k, v, visible = next_k, next_v, next_visible
        split_places = (kv_head * GROUP + rows) * MAX_SPLITS + split
        row_places = (split_places * HEAD_DIM)[:, None] + halves[None, :]
        row_bits = acc_low.to(tl.int32, bitcast=True)
        publish(partial_words_ptr, row_places, row_bits, epoch, is_q[:, None])
        row_bits = acc_high.to(tl.int32, bitcast=True)
        publish(partial_words_ptr, row_places + half, row_bits, epoch, is_q[:, None])
        row_stat = row_max.to(tl.int32, bitcast=True)
        publish(stats_words_ptr, split_places * 2, row_stat, epoch, is_q)
        row_stat = row_sum.to(tl.int32, bitcast=True)
        publish(stats_words_ptr, split_places * 2 + 1, row_stat, epoch, is_q)
