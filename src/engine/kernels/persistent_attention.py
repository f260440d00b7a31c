"""Attention of one decoding sequence within the persistent decode kernel.

    items (KV head, split of its keys):  q, k, v of the head -> head norms, rotation
                                         one item stores the new k and v
                                         online softmax over the split's keys
    one split:      the output is published at once
    several:        sums of each split are published, and joined by other programs (`merge_phase`)

One wait brings an item the query heads of its KV head, the new key and the new value. Heads come
and stay in halves, the entries that rotation mixes side by side. The new token does not come from
the cache: its score and value are what the online softmax of the last split starts with, so nobody
waits for the cache to be written. Keys of earlier tokens are loaded before the new ones are waited
for.

| argument           | shape, dtype                   | duty                                       |
|--------------------|--------------------------------|--------------------------------------------|
| qkv_words_ptr      | [(Hq + 2 Hkv) D / 2] words     | the layer's qkv, of `epoch`                |
| out_words_ptr      | [Hq D / 2] words               | published                                  |
| partial_words_ptr  | [Hq, MAX_SPLITS, D] words      | fp32, published where there are splits     |
| stats_words_ptr    | [Hq, MAX_SPLITS, 2] words      | maximum and sum, likewise                  |
| q/k_norm_ptr       | [D]                            | read if HAS_HEAD_NORMS                     |
| cos_sin_ptr        | [P, 2, D / 2] fp32             | `num_angles` of each half are read: D / 2, |
|                    |                                | or 0 in a layer without positions          |
| k/v_cache_ptr      | [N, block_size, Hkv, D]        | equal strides, 1 along D; the new token is |
|                    |                                | stored                                     |
| seq_len            | int32                          | 0: padding                                 |
| position           | int64                          | < P                                        |
| slot               | int64                          | -1: nothing is stored                      |
| table_ptr          | [blocks] int32                 | block ids of the sequence                  |
| window             | int32                          | keys the layer sees; 0: all                |

Splits and tiles are a function of the sequence's own length, as in `decode_plan`. Numerics: norm,
rotation and roundings of `rope_write_kv`; scores, probabilities and sums are fp32; splits are
joined in their order.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.persistent_exchange import await_words, pair, publish
from engine.kernels.persistent_long import attend_long
from engine.kernels.persistent_short import attend_short


@triton.jit
def split_layout(
    seq_len,
    window,
    SHORT_KEYS: tl.constexpr,
    SHORT_BLOCK: tl.constexpr,
    LONG_BLOCK: tl.constexpr,
    LONG_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """(is short, first key, tiles, splits) of what a sequence reads; a window of 0 is none."""
    low = tl.where(window > 0, tl.maximum(seq_len - window, 0), 0)
    first = low - low % LONG_BLOCK
    num_keys = seq_len - first
    is_short = num_keys <= SHORT_KEYS
    num_tiles = tl.cdiv(num_keys, tl.where(is_short, SHORT_BLOCK, LONG_BLOCK))
    num_splits = tl.cdiv(num_tiles, tl.where(is_short, 1, LONG_SPLIT // LONG_BLOCK))
    return is_short, first, num_tiles, tl.maximum(tl.minimum(num_splits, MAX_SPLITS), 1)


@triton.jit
def attend_phase(
    qkv_words_ptr,
    out_words_ptr,
    partial_words_ptr,
    stats_words_ptr,
    epoch,
    q_norm_ptr,
    k_norm_ptr,
    cos_sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    seq_len,
    position,
    slot,
    table_ptr,
    window,
    num_angles,
    score_scale,
    softcap,
    eps,
    weight_offset,
    stride_cache_block,
    stride_cache_token,
    stride_cache_head,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_HEAD_NORMS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SHORT_KEYS: tl.constexpr,
    SHORT_BLOCK: tl.constexpr,
    LONG_BLOCK: tl.constexpr,
    LONG_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DTYPE: tl.constexpr,
    THREADS: tl.constexpr,
):
    """The items of this program."""
    halves = tl.arange(0, HEAD_DIM // 2)
    is_short, first, num_tiles, num_splits = split_layout(
        seq_len, window, SHORT_KEYS, SHORT_BLOCK, LONG_BLOCK, LONG_SPLIT, MAX_SPLITS
    )
    low_key = tl.where(window > 0, seq_len - window, 0)
    new_place = slot // BLOCK_SIZE * stride_cache_block + slot % BLOCK_SIZE * stride_cache_token
    angles_ptr = cos_sin_ptr + position * HEAD_DIM + halves
    # What both forms of attention take apart again.
    rules = (
        q_norm_ptr,
        k_norm_ptr,
        angles_ptr,
        num_angles,
        score_scale,
        softcap,
        eps,
        weight_offset,
    )
    cache = (
        k_cache_ptr,
        v_cache_ptr,
        table_ptr,
        stride_cache_block,
        stride_cache_token,
        stride_cache_head,
    )
    if is_short:
        attend_short(
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
            NUM_KV_HEADS,
            GROUP,
            HEAD_DIM,
            BLOCK_SIZE,
            HAS_HEAD_NORMS,
            HAS_OFFSET,
            HAS_SOFTCAP,
            SHORT_BLOCK,
            MAX_SPLITS,
            DTYPE,
            THREADS,
        )
    else:
        attend_long(
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
            NUM_KV_HEADS,
            GROUP,
            HEAD_DIM,
            BLOCK_SIZE,
            HAS_HEAD_NORMS,
            HAS_OFFSET,
            HAS_SOFTCAP,
            LONG_BLOCK,
            MAX_SPLITS,
            BLOCK_M,
            DTYPE,
            THREADS,
        )


@triton.jit
def merge_phase(
    out_words_ptr,
    partial_words_ptr,
    stats_words_ptr,
    epoch,
    seq_len,
    window,
    NUM_Q_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SHORT_KEYS: tl.constexpr,
    SHORT_BLOCK: tl.constexpr,
    LONG_BLOCK: tl.constexpr,
    LONG_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DTYPE: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Join the splits of this program's query heads, BLOCK_S of them at a time.

    Heads start at the last program, since the first ones have the items.
    """
    columns = tl.arange(0, HEAD_DIM)
    _, _, _, num_splits = split_layout(
        seq_len, window, SHORT_KEYS, SHORT_BLOCK, LONG_BLOCK, LONG_SPLIT, MAX_SPLITS
    )
    if num_splits > 1:
        num_programs = tl.num_programs(0)
        for head in range(num_programs - 1 - tl.program_id(0), NUM_Q_HEADS, num_programs):
            splits = tl.arange(0, MAX_SPLITS)
            is_split = splits < num_splits
            of_splits = (head * MAX_SPLITS + tl.where(is_split, splits, 0)) * 2
            maxima = await_words(stats_words_ptr + of_splits, epoch, THREADS)
            sums = await_words(stats_words_ptr + of_splits + 1, epoch, THREADS)
            maxima = tl.where(is_split, maxima.to(tl.float32, bitcast=True), float("-inf"))
            sums = tl.where(is_split, sums.to(tl.float32, bitcast=True), 0.0)
            highest = tl.max(maxima, axis=0)
            total = tl.sum(sums * tl.exp2(maxima - highest), axis=0)
            acc = tl.zeros([HEAD_DIM], tl.float32)
            for base in range(0, num_splits, BLOCK_S):
                in_round = base + tl.arange(0, BLOCK_S)
                is_part = in_round < num_splits
                parts = head * MAX_SPLITS + tl.where(is_part, in_round, 0)
                bits = await_words(stats_words_ptr + parts * 2, epoch, THREADS)
                factors = tl.exp2(bits.to(tl.float32, bitcast=True) - highest)
                factors = tl.where(is_part, factors, 0.0)
                values = await_words(
                    partial_words_ptr + (parts * HEAD_DIM)[:, None] + columns[None, :],
                    epoch,
                    THREADS,
                )
                acc += tl.sum(values.to(tl.float32, bitcast=True) * factors[:, None], axis=0)
            mixed = (acc / total).to(DTYPE)
            halves = tl.reshape(mixed, [2, HEAD_DIM // 2])
            low, high = tl.split(tl.permute(halves, (1, 0)))
            places = head * (HEAD_DIM // 2) + tl.arange(0, HEAD_DIM // 2)
            publish(out_words_ptr, places, pair(low, high), epoch, places >= 0)
