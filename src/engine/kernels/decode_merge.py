"""Joining the parts of decode attention: partial sums of one sequence, in their order.

    m = max_s m_s;  out = (sum_s 2^(m_s - m) acc_s) / (sum_s 2^(m_s - m) l_s + 2^(sink - m))

| argument     | shape, dtype           | duty                                                     |
|--------------|------------------------|----------------------------------------------------------|
| items_ptr    | [items, ITEM] int32    | see `decode_plan`                                        |
| partial_ptr  | [places, Hq, D] fp32   | unnormalised sums of each part                           |
| stats_ptr    | [places, 2, Hq] fp32   | maximum and sum of each part                             |
| arrivals_ptr | [B * HEADS] int32      | parts that are done; zero between launches               |
| out_ptr      | [B, Hq * D]            | written where a sequence has several parts               |
| sinks_ptr    | [Hq]                   | see `attention_tiles.with_sink`; None: no sinks          |

A program that is through with its items counts those that are parts of a sequence; whoever counts
a sequence's last part joins all of them, and sets the count back to zero for the next layer. It
alone sees that count, after a barrier of its threads and an acquire; the sums are read past the
first-level cache, since other processors wrote them. Whichever program it is, it adds in the order
of the parts: the same bits every time.

Numerics: fp32; rounds of BLOCK_S parts in order, each added as a tree and rescaled like the tiles
of an online softmax, so that a round waits for memory once. int64: places.
constexpr: what is fixed per model.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.attention_tiles import with_sink


@triton.jit
def _merge_parts(
    partial_ptr,
    stats_ptr,
    out_row_ptr,
    sinks_ptr,
    first_place,
    num_parts,
    first_head,
    NUM_Q_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Join the parts of one sequence and GROUP query heads, in their order."""
    members = tl.arange(0, BLOCK_G)
    columns = tl.arange(0, BLOCK_D)
    in_round = tl.arange(0, BLOCK_S)
    is_member = members < GROUP
    mask = is_member[:, None] & (columns < HEAD_DIM)[None, :]
    heads = first_head + members
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    highest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    for base in range(0, num_parts, BLOCK_S):
        is_part = base + in_round < num_parts
        places = first_place + base + in_round
        stats_ptrs = stats_ptr + places[:, None] * (2 * NUM_Q_HEADS) + heads[None, :]
        partial_ptrs = (
            partial_ptr + (places[:, None] * NUM_Q_HEADS + heads[None, :])[:, :, None] * HEAD_DIM
        )
        is_stat = is_part[:, None] & is_member[None, :]
        maxima = tl.load(stats_ptrs, mask=is_stat, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(stats_ptrs + NUM_Q_HEADS, mask=is_stat, other=0.0, cache_modifier=".cg")
        partial = tl.load(
            partial_ptrs + columns[None, None, :],
            mask=is_part[:, None, None] & mask[None, :, :],
            other=0.0,
            cache_modifier=".cg",
        )
        # Rows of padding heads have no maximum; 0 keeps NaN out of them.
        new_highest = tl.where(is_member, tl.maximum(highest, tl.max(maxima, axis=0)), 0.0)
        weights = tl.exp2(maxima - new_highest[None, :])
        rescale = tl.exp2(highest - new_highest)
        total = total * rescale + tl.sum(sums * weights, axis=0)
        acc = acc * rescale[:, None] + tl.sum(partial * weights[:, :, None], axis=0)
        highest = new_highest
    total = with_sink(total, highest, sinks_ptr, heads, is_member)
    mixed = acc / tl.where(is_member, total, 1.0)[:, None]
    out_ptrs = out_row_ptr + (heads * HEAD_DIM)[:, None] + columns[None, :]
    tl.store(out_ptrs, mixed.to(out_row_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_arrivals(items_ptr, items, end_item, ITEM: tl.constexpr):
    """Of items: sequence, place in the partials (-1: none), and the packed numbers of parts."""
    is_item = items < end_item
    item_ptrs = items_ptr + items * ITEM
    return (
        tl.load(item_ptrs, mask=is_item, other=0),
        tl.load(item_ptrs + 4, mask=is_item, other=-1),
        tl.load(item_ptrs + 7, mask=is_item, other=0),
    )


@triton.jit
def merge_finished(
    arrivals,
    items_ptr,
    partial_ptr,
    stats_ptr,
    arrivals_ptr,
    out_ptr,
    sinks_ptr,
    stride_out,
    first_item,
    end_item,
    head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ITEM: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Count the parts among a program's items, and join the sequences whose last part is counted.

    Every thread has issued the stores of its sums before. `arrivals` are those of the first
    BLOCK_ITEMS items, loaded early. The program has GROUP query heads, and is one of HEADS.
    """
    for base in range(first_item, end_item, BLOCK_ITEMS):
        seqs, places, packed = arrivals
        is_part = places >= 0
        if tl.max(places, axis=0) >= 0:
            arrival_ptrs = arrivals_ptr + seqs.to(tl.int64) * HEADS + head
            tl.debug_barrier()
            before = tl.atomic_add(arrival_ptrs, 1, mask=is_part, sem="acq_rel")
            is_complete = is_part & (before == packed // 256 % 256 - 1)
            tl.store(arrival_ptrs, tl.zeros([BLOCK_ITEMS], tl.int32), mask=is_complete)
            rank = tl.cumsum(is_complete.to(tl.int32), axis=0)
            for nth in range(1, tl.max(rank, axis=0) + 1):
                is_nth = is_complete & (rank == nth)
                seq = tl.sum(tl.where(is_nth, seqs, 0), axis=0).to(tl.int64)
                first_places = places - packed // 65536
                _merge_parts(
                    partial_ptr,
                    stats_ptr,
                    out_ptr + seq * stride_out,
                    sinks_ptr,
                    tl.sum(tl.where(is_nth, first_places, 0), axis=0).to(tl.int64),
                    tl.sum(tl.where(is_nth, packed % 256, 0), axis=0),
                    head * GROUP,
                    HEADS * GROUP,
                    GROUP,
                    HEAD_DIM,
                    BLOCK_G,
                    BLOCK_D,
                    BLOCK_S,
                )
        next_items = base + BLOCK_ITEMS + tl.arange(0, BLOCK_ITEMS)
        arrivals = load_arrivals(items_ptr, next_items, end_item, ITEM)
