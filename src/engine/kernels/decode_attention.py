"""Attention of decoding sequences: one query token each, keys shared out to programs.

    out[b, h] = softmax_j(q[b, h] k[j, h / group] scale) v[j, h / group],  j < seq_lens[b]

FlashDecoding (Dao et al., 2023) with a work list:

    decode_plan    grid (1,)         seq_lens -> columns of items (sequence, keys); once per step
    _split_kernel  grid (programs,)  works through the items of one column for one KV head, and
                                     joins sequences that were cut (`decode_merge`)

| argument        | shape, dtype                          | duty                                   |
|-----------------|---------------------------------------|----------------------------------------|
| q_ptr           | [B, Hq, D] bf16, fp16 or fp32         | stride 1 along D                       |
| k_ptr, v_ptr    | [N, block_size, Hkv, D], same dtype   | equal strides, 1 along D               |
|                 | or 8 bits                             |                                        |
| k_scales_ptr    | [N, Hkv, block_size] fp32             | of 8-bit keys; None: plain ones        |
| v_scales_ptr    | likewise                              | of the values                          |
| sinks_ptr       | [Hq]                                  | see `attention_tiles.with_sink`        |
| block_table_ptr | [rows, max_blocks] int32              | stride 1 along blocks                  |
| columns_ptr, items_ptr, arrivals_ptr | int32            | see `decode_plan`                      |
| partial_ptr     | [places, Hq, D] fp32                  | unnormalised sums of each part         |
| stats_ptr       | [places, 2, Hq] fp32                  | maximum and sum of each part           |
| out_ptr         | [B, Hq * D], q's dtype                | stride 1; sequences that are not       |
|                 |                                       | planned are not written                |

Programs are as many as fit the device, whatever the batch, so nothing depends on the longest
sequence a graph may meet. Neighbouring programs take the KV heads of one column, whose rows are
adjacent in memory.

A program runs through the tiles of all its items in one loop: the keys of the next item are on
their way while the sums of this one are stored. (A loop per item cost some 5 us for each of them on
an H100, in which nothing was in flight.) What the loads ahead follow from is chosen by selection
instead of branches, an item and a block id early; a branch would end the pipeline there.

The query heads of one KV head are the rows of one tile, padded to 16 for the tensor cores: the
keys are read once for all of them, and padding rows cost nothing where bandwidth is the limit.

8-bit caches: `kv_cache`, and `eight_bits` for how their numbers reach the tensor cores.

Where the device can, this kernel starts while the one before it runs. That is the one that stores
queries, keys and values: each program reads its share of the plan, which is older (but in the layer
that makes it), and waits. Or it is the one of shared prefixes (`shared_prefix`), which has waited
for all those itself: then programs wait before they join anything.

Numerics: see `attention_tiles`; partial sums are fp32. All offsets that multiply a stride are
int64. constexpr: everything that is fixed per model. Batch size, list length and the number of
programs are not specialised: no step compiles a kernel.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from engine.kernels.attention_tiles import (
    add_values,
    num_multiprocessors,
    score_factors,
    scores_of,
    softmax_step,
    starts_kernels_early,
    with_sink,
)
from engine.kernels.compile_ahead import launchable
from engine.kernels.decode_merge import load_arrivals, merge_finished
from engine.kernels.decode_plan import COLUMN, ITEM, DecodePlan, plan_decode
from engine.kernels.decode_tiles import DecodeTiles as DecodeTiles
from engine.kernels.decode_tiles import decode_tiles as decode_tiles
from engine.kernels.eight_bits import columns_of_pairs, widened
from engine.kernels.kv_cache import KVTensor, parts_of
from engine.kernels.metadata import AttentionMetadata
from engine.kernels.shared_prefix import PrefixTiles, attend_shared_prefixes, prefix_tiles

# Elements of partial sums that one round of a merge may hold in registers.
_MAX_MERGE_ELEMENTS = 4096


@triton.jit
def _load_item(item_ptr, is_read):
    return (
        tl.load(item_ptr, mask=is_read, other=0),
        tl.load(item_ptr + 1, mask=is_read, other=0),
        tl.load(item_ptr + 2, mask=is_read, other=0),
        tl.load(item_ptr + 3, mask=is_read, other=0),
        tl.load(item_ptr + 4, mask=is_read, other=0),
        tl.load(item_ptr + 5, mask=is_read, other=0),
    )


@triton.jit
def _choose_item(condition, a, b):
    return (
        tl.where(condition, a[0], b[0]),
        tl.where(condition, a[1], b[1]),
        tl.where(condition, a[2], b[2]),
        tl.where(condition, a[3], b[3]),
        tl.where(condition, a[4], b[4]),
        tl.where(condition, a[5], b[5]),
    )


@triton.jit
def _load_block_ids(table_ptr, tile, in_tile, end, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Block ids of the keys of a tile: a scalar where a block holds the tile, else as `in_tile`."""
    if BLOCK_SIZE >= BLOCK_N:
        return tl.load(table_ptr + tile // BLOCK_SIZE, mask=tile < end, other=0)
    else:  # noqa: RET505 - a compile-time branch: only one of them is traced
        keys = tile + in_tile
        return tl.load(table_ptr + keys // BLOCK_SIZE, mask=keys < end, other=0)


@triton.jit
def _places(
    first,
    tile,
    in_tile,
    columns,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr,
):
    """Where a tile's columns lie, [BLOCK_N, D], its blocks beginning at `first` (see above)."""
    if BLOCK_SIZE >= BLOCK_N:
        offsets = in_tile[:, None] * STRIDE_TOKEN + columns[None, :]
        return first + tile % BLOCK_SIZE * STRIDE_TOKEN + offsets
    else:  # noqa: RET505 - a compile-time branch: only one of them is traced
        first += (tile + in_tile) % BLOCK_SIZE * STRIDE_TOKEN
        return first[:, None] + columns[None, :]


@launchable
@triton.jit(do_not_specialize=["is_plan_new"])
def _split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    sinks_ptr,
    block_table_ptr,
    columns_ptr,
    items_ptr,
    arrivals_ptr,
    partial_ptr,
    stats_ptr,
    out_ptr,
    score_scale,
    softcap,
    stride_q_token,
    stride_q_head,
    stride_cache_block,
    stride_cache_head,
    stride_scales,
    stride_table,
    stride_out,
    is_plan_new,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STRIDE_CACHE_TOKEN: tl.constexpr,
    HAS_LOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_ASSEMBLED: tl.constexpr,
    STARTS_EARLY: tl.constexpr,
    HAS_PREFIXES: tl.constexpr,
    ITEM: tl.constexpr,
    COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_G_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
):
    num_q_heads: tl.constexpr = HEADS * GROUP
    # Nested, because the outer branch is taken by the compiler.
    if STARTS_EARLY and not HAS_PREFIXES:  # noqa: SIM102
        if is_plan_new:
            gdc_wait()
    head = tl.program_id(0) % HEADS
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    in_tile = tl.arange(0, BLOCK_N)
    is_column = (columns < HEAD_DIM)[None, :]
    is_row = rows < GROUP
    heads = head * GROUP + rows
    mask = is_row[:, None] & is_column
    out_mask = mask
    q_ptrs = q_ptr + (heads * stride_q_head)[:, None] + columns[None, :]
    out_columns = columns
    if k_scales_ptr is not None:
        # Sums of 8-bit values come with even columns first: see `columns_of_pairs`.
        pair_columns = tl.arange(0, BLOCK_D // 2)
        out_columns = columns % (BLOCK_D // 2) * 2 + columns // (BLOCK_D // 2)
        out_mask = is_row[:, None] & (out_columns < HEAD_DIM)[None, :]
        k_scales_ptr += head * BLOCK_SIZE
        v_scales_ptr += head * BLOCK_SIZE

    column_ptr = columns_ptr + tl.program_id(0) // HEADS * COLUMN
    first_item = tl.load(column_ptr + 7)
    end_item = tl.load(column_ptr + COLUMN + 7)
    num_tiles = tl.load(column_ptr + COLUMN + 8) - tl.load(column_ptr + 8)
    item = _load_item(column_ptr, True)
    index = first_item + 1
    next_item = _load_item(items_ptr + index * ITEM, index < end_item)
    tile = item[2]
    table_ptr = block_table_ptr + item[1].to(tl.int64) * stride_table
    if BLOCK_SIZE >= BLOCK_N:
        block_ids = tl.load(column_ptr + 6)
    else:
        block_ids = _load_block_ids(table_ptr, tile, in_tile, item[3], BLOCK_N, BLOCK_SIZE)

    arrivals = load_arrivals(items_ptr, first_item + tl.arange(0, BLOCK_ITEMS), end_item, ITEM)

    if STARTS_EARLY and not HAS_PREFIXES:
        gdc_wait()
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for _ in range(num_tiles):
        seq, _row, _start, end, place, low = item
        seq = seq.to(tl.int64)
        keys = tile + in_tile
        visible = keys < end
        if HAS_LOW:
            visible = visible & (keys >= low)
        first = block_ids.to(tl.int64) * stride_cache_block + head * stride_cache_head
        places = _places(first, tile, in_tile, columns, BLOCK_N, BLOCK_SIZE, STRIDE_CACHE_TOKEN)
        scale_places = block_ids.to(tl.int64) * stride_scales + keys % BLOCK_SIZE
        is_read = visible[:, None] & is_column
        is_last = tile + BLOCK_N >= end

        q = tl.load(q_ptrs + seq * stride_q_token, mask=mask, other=0.0)
        k = tl.load(k_ptr + places, mask=is_read, other=0.0)
        if k_scales_ptr is not None:
            k = widened(k, q.dtype, k_ptr.dtype.element_ty == tl.int8, IS_ASSEMBLED)
        scores = scores_of(q, k, k_scales_ptr, scale_places, visible)
        probs, acc, row_max, row_sum = softmax_step(
            scores,
            visible[None, :],
            acc,
            row_max,
            row_sum,
            score_scale,
            softcap,
            IS_MASKED=True,
            HAS_SOFTCAP=HAS_SOFTCAP,
        )
        if k_scales_ptr is None:
            v = tl.load(v_ptr + places, mask=is_read, other=0.0)
        else:
            first = block_ids.to(tl.int64) * (stride_cache_block // 2)
            first += head * (stride_cache_head // 2)
            half: tl.constexpr = STRIDE_CACHE_TOKEN // 2
            places = _places(first, tile, in_tile, pair_columns, BLOCK_N, BLOCK_SIZE, half)
            is_pair = visible[:, None] & (pair_columns < HEAD_DIM // 2)[None, :]
            pairs = tl.load(v_ptr + places, mask=is_pair, other=0)
            v = columns_of_pairs(pairs, q.dtype, k_ptr.dtype.element_ty == tl.int8, IS_ASSEMBLED)
        acc = add_values(probs, v, acc, v_scales_ptr, scale_places, visible, q.dtype)

        if is_last:
            if place < 0:
                row_sum = with_sink(row_sum, row_max, sinks_ptr, heads, is_row)
                # A padding row has no keys: sum 0, output 0.
                mixed = acc / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]
                out_ptrs = out_ptr + seq * stride_out + (heads * HEAD_DIM)[:, None]
                out_ptrs += out_columns[None, :]
                tl.store(out_ptrs, mixed.to(out_ptr.dtype.element_ty), mask=out_mask)
            else:
                own_place = place.to(tl.int64)
                partial_ptrs = partial_ptr + (own_place * num_q_heads + heads)[:, None] * HEAD_DIM
                tl.store(partial_ptrs + out_columns[None, :], acc, mask=out_mask)
                stats_ptrs = stats_ptr + own_place * (2 * num_q_heads) + heads
                tl.store(stats_ptrs, row_max, mask=is_row)
                tl.store(stats_ptrs + num_q_heads, row_sum, mask=is_row)
            acc = tl.zeros_like(acc)
            row_max = tl.full(row_max.shape, float("-inf"), tl.float32)
            row_sum = tl.zeros_like(row_sum)

        # By selection, not by branches: the loads of tiles ahead follow from these numbers.
        tile = tl.where(is_last, next_item[2], tile + BLOCK_N)
        item = _choose_item(is_last, next_item, item)
        index += is_last.to(tl.int32)
        loaded = _load_item(items_ptr + index * ITEM, is_last & (index < end_item))
        next_item = _choose_item(is_last, loaded, next_item)
        table_ptr = block_table_ptr + item[1].to(tl.int64) * stride_table
        block_ids = _load_block_ids(table_ptr, tile, in_tile, item[3], BLOCK_N, BLOCK_SIZE)

    if STARTS_EARLY and HAS_PREFIXES:
        gdc_wait()
    merge_finished(
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
        HEADS,
        GROUP,
        HEAD_DIM,
        ITEM,
        BLOCK_ITEMS,
        BLOCK_G,
        BLOCK_G_D,
        BLOCK_S,
    )


def decode_attention(
    q: torch.Tensor,
    k_cache: KVTensor,
    v_cache: KVTensor,
    metadata: AttentionMetadata,
    out: torch.Tensor,
    *,
    softmax_scale: float,
    sliding_window: int | None,
    logit_softcap: float,
    sinks: torch.Tensor | None = None,
    chunk_size: int | None = None,
    batch_invariant: bool = False,
    tiles: DecodeTiles | None = None,
    tiles_of_prefixes: PrefixTiles | None = None,
) -> None:
    """Attention of the leading `metadata.num_decodes` sequences, or `device_counts[0]` of them.

    Args:
        q: [num_decodes, Hq, D].
        k_cache: [N, block_size, Hkv, D]; block_size a power of two.
        v_cache: Likewise, with the same strides.
        metadata: Layout of the batch.
        out: [num_decodes, Hq * D], written in place; zero where `seq_lens` is 0, and untouched
            from row `device_counts[0]` on.
        softmax_scale: Factor of the scores.
        sliding_window: Tokens a position sees, itself included; None for all.
        logit_softcap: Bound of the scores; 0 for none.
        sinks: [Hq], the sinks' scores; None for none.
        chunk_size: Tokens of the chunk a position sees, up to itself, a multiple of 64; None for
            all.
        batch_invariant: Cut sequences by their own length alone, and share no prefixes.
        tiles: Launch shape; default `decode_tiles`.
        tiles_of_prefixes: Launch shape for shared prefixes; default `prefix_tiles`.
    """
    num_seqs, num_q_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    (keys, k_scales), (values, v_scales) = parts_of(k_cache), parts_of(v_cache)
    group = num_q_heads // num_kv_heads
    tiles = tiles or decode_tiles(q.dtype, head_dim, keys.dtype, group)
    tiles_of_prefixes = tiles_of_prefixes or prefix_tiles(q.dtype, head_dim)
    num_processors = num_multiprocessors(q.device)
    num_columns = max(1, num_processors * tiles.programs_per_processor // num_kv_heads)
    layout = tiles.layout(num_columns, batch_invariant)
    prefix_layout = tiles_of_prefixes.layout(num_processors)
    heads = (num_q_heads, num_kv_heads)
    reach = (sliding_window, chunk_size)
    key = ("decode plan", reach, heads, num_seqs, block_size, layout, prefix_layout)
    is_plan_new = False

    def make() -> DecodePlan:
        nonlocal is_plan_new
        is_plan_new = True
        return plan_decode(metadata, num_seqs, *heads, block_size, *reach, layout, prefix_layout)

    plan = metadata.once_per_step(key, make)
    partial, stats = (
        torch.empty((plan.max_places, *shape), dtype=torch.float32, device=q.device)
        for shape in ((num_q_heads, head_dim), (2, num_q_heads))
    )
    score_scale, softcap = score_factors(softmax_scale, logit_softcap)
    has_prefixes = plan.prefix_items is not None
    if has_prefixes:
        attend_shared_prefixes(
            q,
            k_cache,
            v_cache,
            metadata,
            plan,
            partial,
            stats,
            score_scale,
            softcap,
            tiles_of_prefixes,
        )
    starts_early = starts_kernels_early(q.device)
    block_g, block_g_d = triton.next_power_of_2(group), max(triton.next_power_of_2(head_dim), 16)
    _split_kernel[(num_columns * num_kv_heads,)](
        q,
        keys,
        values if v_scales is None else values.view(torch.int16),
        k_scales,
        v_scales,
        sinks,
        metadata.block_table,
        plan.columns,
        plan.items,
        plan.arrivals,
        partial,
        stats,
        out,
        score_scale,
        softcap,
        q.stride(0),
        q.stride(1),
        keys.stride(0),
        keys.stride(2),
        0 if k_scales is None else k_scales.stride(0),
        metadata.block_table.stride(0),
        out.stride(0),
        int(is_plan_new),
        HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        STRIDE_CACHE_TOKEN=keys.stride(1),
        HAS_LOW=bool(sliding_window or chunk_size),
        HAS_SOFTCAP=logit_softcap != 0.0,
        IS_ASSEMBLED=q.dtype == torch.bfloat16 and starts_early,
        STARTS_EARLY=starts_early,
        HAS_PREFIXES=has_prefixes,
        ITEM=ITEM,
        COLUMN=COLUMN,
        BLOCK_M=max(16, block_g),
        BLOCK_D=max(triton.next_power_of_2(head_dim), 16),
        BLOCK_N=tiles.block_n,
        BLOCK_G=block_g,
        BLOCK_G_D=block_g_d,
        BLOCK_S=max(1, min(16, _MAX_MERGE_ELEMENTS // (block_g * block_g_d))),
        BLOCK_ITEMS=32,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
        maxnreg=tiles.max_registers,
        launch_pdl=starts_early,
    )
