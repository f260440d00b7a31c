"""Attention of a short sequence within the persistent decode kernel: see `persistent_attention`.

An item is one query head and one tile of keys. There is one query and few keys: plain
multiplications, each thread its keys, leave fewer instructions and meetings of threads than tensor
cores would. The heads of a group read the same keys again, which a short sequence can afford.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.attention_tiles import load_block_ids
from engine.kernels.persistent_exchange import await_three, pair, publish, unpair
from engine.kernels.persistent_heads import (
    load_halves,
    normed_halves,
    scaled_scores,
    store_halves,
    sum_halves,
    turned_halves,
)


@triton.jit
def attend_short(
    qkv_words_ptr,
    out_words_ptr,
    partial_words_ptr,
    stats_words_ptr,
    epoch,
    rules,
    cache,
    seq_len,
    first,
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
    SHORT_BLOCK: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    DTYPE: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Items (query head, split) of a short sequence: every split one tile."""
    num_q_heads: tl.constexpr = NUM_KV_HEADS * GROUP
    half: tl.constexpr = HEAD_DIM // 2
    q_norm_ptr, k_norm_ptr, angles_ptr, num_angles, score_scale, softcap, eps, weight_offset = rules
    k_cache_ptr, v_cache_ptr, table_ptr = cache[0], cache[1], cache[2]
    stride_cache_block, stride_cache_token, stride_cache_head = cache[3], cache[4], cache[5]
    halves = tl.arange(0, half)
    in_tile = tl.arange(0, SHORT_BLOCK)
    for item in range(tl.program_id(0), num_q_heads * num_splits, tl.num_programs(0)):
        split = item // num_q_heads
        head = item % num_q_heads
        kv_head = head // GROUP
        keys = first + split * SHORT_BLOCK + in_tile
        # The new token itself is not read from the cache.
        visible = (keys >= low_key) & (keys < seq_len - 1)
        has_new = (split == num_splits - 1) & (seq_len > 0)
        block_ids = load_block_ids(
            table_ptr, first + split * SHORT_BLOCK, seq_len - 1, SHORT_BLOCK, BLOCK_SIZE
        )
        places = block_ids.to(tl.int64) * stride_cache_block
        places += keys % BLOCK_SIZE * stride_cache_token + kv_head * stride_cache_head
        places = places[:, None] + halves[None, :]
        k_low, k_high = load_halves(k_cache_ptr, places, visible[:, None])
        v_low, v_high = load_halves(v_cache_ptr, places, visible[:, None])
        cos = tl.load(angles_ptr, mask=halves < num_angles, other=1.0)
        sin = tl.load(angles_ptr + half, mask=halves < num_angles, other=0.0)
        if HAS_HEAD_NORMS:
            q_norm_low, q_norm_high = (
                tl.load(q_norm_ptr + halves),
                tl.load(q_norm_ptr + half + halves),
            )
            k_norm_low, k_norm_high = (
                tl.load(k_norm_ptr + halves),
                tl.load(k_norm_ptr + half + halves),
            )

        q_ptrs = qkv_words_ptr + head * half + halves
        new_ptrs = qkv_words_ptr + (num_q_heads + kv_head) * half + halves
        q, new_k, new_v = await_three(
            q_ptrs, new_ptrs, new_ptrs + NUM_KV_HEADS * half, epoch, THREADS
        )
        q_low, q_high = unpair(q, DTYPE)
        q_low, q_high = q_low.to(tl.float32), q_high.to(tl.float32)
        new_k_low, new_k_high = unpair(new_k, DTYPE)
        new_k_low, new_k_high = new_k_low.to(tl.float32), new_k_high.to(tl.float32)
        new_v_low, new_v_high = unpair(new_v, DTYPE)
        if HAS_HEAD_NORMS:
            q_square, k_square = sum_halves(
                q_low * q_low + q_high * q_high,
                new_k_low * new_k_low + new_k_high * new_k_high,
                0,
                THREADS,
            )
            q_low, q_high = normed_halves(
                q_low,
                q_high,
                tl.rsqrt(q_square / HEAD_DIM + eps),
                q_norm_low,
                q_norm_high,
                weight_offset,
                HAS_OFFSET,
                DTYPE,
            )
            new_k_low, new_k_high = normed_halves(
                new_k_low,
                new_k_high,
                tl.rsqrt(k_square / HEAD_DIM + eps),
                k_norm_low,
                k_norm_high,
                weight_offset,
                HAS_OFFSET,
                DTYPE,
            )
        q_low, q_high = turned_halves(q_low, q_high, cos, sin, DTYPE)
        new_k_low, new_k_high = turned_halves(new_k_low, new_k_high, cos, sin, DTYPE)
        if has_new & (slot >= 0) & (head % GROUP == 0):
            place = new_place + kv_head * stride_cache_head
            store_halves(k_cache_ptr, place, halves, new_k_low, new_k_high)
            store_halves(v_cache_ptr, place, halves, new_v_low, new_v_high)

        new_score = tl.sum(q_low * new_k_low + q_high * new_k_high, axis=0)
        new_score = scaled_scores(new_score, score_scale, softcap, HAS_SOFTCAP)
        new_score = tl.where(has_new, new_score, float("-inf"))
        scores = k_low.to(tl.float32) * q_low[None, :] + k_high.to(tl.float32) * q_high[None, :]
        scores = scaled_scores(tl.sum(scores, axis=1), score_scale, softcap, HAS_SOFTCAP)
        scores = tl.where(visible, scores, float("-inf"))
        highest = tl.maximum(tl.max(scores, axis=0), new_score)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        probs = tl.exp2(scores - shift)
        new_prob = tl.exp2(new_score - shift)
        total = tl.sum(probs, axis=0) + new_prob
        acc_low, acc_high = sum_halves(
            probs[:, None] * v_low.to(tl.float32),
            probs[:, None] * v_high.to(tl.float32),
            0,
            THREADS,
        )
        acc_low += new_prob * new_v_low.to(tl.float32)
        acc_high += new_prob * new_v_high.to(tl.float32)
        if num_splits == 1:
            # A padding row has no keys: sum 0, output 0.
            total = tl.where(total > 0.0, total, 1.0)
            mixed = pair((acc_low / total).to(DTYPE), (acc_high / total).to(DTYPE))
            publish(out_words_ptr, head * half + halves, mixed, epoch, halves < half)
        else:
            split_place = head * MAX_SPLITS + split
            sum_places = split_place * HEAD_DIM + halves
            bits = acc_low.to(tl.int32, bitcast=True)
            publish(partial_words_ptr, sum_places, bits, epoch, halves < half)
            bits = acc_high.to(tl.int32, bitcast=True)
            publish(partial_words_ptr, sum_places + half, bits, epoch, halves < half)
            both = tl.arange(0, 2)
            stat = tl.where(both == 0, highest, total).to(tl.int32, bitcast=True)
            publish(stats_words_ptr, split_place * 2 + both, stat, epoch, both < 2)
