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

Narrow KV heads can be taken several at once (`max_columns`), as one head with all their columns: a
query is zero in the columns of other heads, and of its sums those columns count for nothing. That
reads a token's keys in one piece, where every head by itself is 128 bytes out of every 384, and a
softmax serves three times the bytes. Not chosen yet: see docs/KERNELS.md.

Shared prefixes are computed by the kernel before (`shared_prefix`). Where the device can, this one
starts while that one runs, and waits for it before it joins anything.

Numerics: see `attention_tiles`; partial sums are fp32. All offsets that multiply a stride are
int64. constexpr: everything that is fixed per model. Batch size, list length and the number of
programs are not specialised: no step compiles a kernel.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from engine.kernels.attention_tiles import (
    num_multiprocessors,
    score_factors,
    softmax_step,
    starts_kernels_early,
)
from engine.kernels.compile_ahead import launchable
from engine.kernels.decode_layout import SplitLayout
from engine.kernels.decode_merge import load_arrivals, merge_finished
from engine.kernels.decode_plan import COLUMN, ITEM, plan_decode
from engine.kernels.metadata import AttentionMetadata
from engine.kernels.shared_prefix import PrefixTiles, attend_shared_prefixes, prefix_tiles

# Elements of partial sums that one round of a merge may hold in registers.
_MAX_MERGE_ELEMENTS = 4096
# Bounds the workspace of `batch_invariant`: every sequence may have so many parts.
_MAX_FIXED_PARTS = 32


@dataclass(frozen=True)
class DecodeTiles:
    """Launch shape of `_split_kernel`, and what its results depend on.

    Attributes:
        block_n: Keys per tile.
        num_stages: Tiles of keys in flight, plus one.
        num_warps: Warps per program.
        programs_per_processor: Programs that share a multiprocessor.
        max_columns: Elements of a token's keys that a program reads at most; a head in any case.
        min_tiles: Fewest tiles of a program that has work.
        snap: Fewest tiles of a part, at most `min_tiles`.
        max_parts: Most parts of a sequence.
        split: Keys per part under `batch_invariant`, a multiple of block_n.
        max_registers: Of a thread; None for as many as the compiler likes.
    """

    block_n: int
    num_stages: int
    num_warps: int
    programs_per_processor: int
    max_columns: int = 0
    min_tiles: int = 4
    snap: int = 2
    max_parts: int = 64
    split: int = 512
    max_registers: int | None = None

    def layout(self, num_columns: int, batch_invariant: bool) -> SplitLayout:
        """How sequences are cut."""
        return SplitLayout(
            num_columns=num_columns,
            tile=self.block_n,
            min_tiles=self.min_tiles,
            snap=self.snap,
            max_parts=_MAX_FIXED_PARTS if batch_invariant else self.max_parts,
            split=self.split if batch_invariant else 0,
        )

    def kv_heads(self, k_cache: torch.Tensor, group: int) -> int:
        """KV heads that a program takes at once: a divisor of theirs, 16 query heads at most."""
        num_kv_heads, head_dim = k_cache.shape[2:]
        if k_cache.stride(2) != head_dim:
            return 1
        return max(
            count
            for count in range(1, num_kv_heads + 1)
            if num_kv_heads % count == 0
            and (count == 1 or (count * group <= 16 and count * head_dim <= self.max_columns))
        )


def decode_tiles(dtype: torch.dtype, head_dim: int) -> DecodeTiles:
    """Tiles for a dtype and head size.

    Programs per processor are as many as its 227 KiB of shared memory and 64 Ki registers hold.
    """
    if dtype == torch.float32:
        return DecodeTiles(32, 2, 4, 2)
    if head_dim > 128:
        return DecodeTiles(32, 3, 4, 2)
    if head_dim > 64:
        return DecodeTiles(64, 3, 4, 2)
    return DecodeTiles(64, 3, 4, 4, max_registers=128)


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


@launchable
@triton.jit
def _split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
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
    stride_table,
    stride_out,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STRIDE_CACHE_TOKEN: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STARTS_EARLY: tl.constexpr,
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
    width: tl.constexpr = KV_HEADS * HEAD_DIM
    head = tl.program_id(0) % HEADS
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    in_tile = tl.arange(0, BLOCK_N)
    offsets = in_tile[:, None] * STRIDE_CACHE_TOKEN + columns[None, :]
    is_column = (columns < width)[None, :]
    is_row = rows < GROUP
    heads = head * GROUP + rows
    if KV_HEADS == 1:
        mask = is_row[:, None] & is_column
        in_head = columns
    else:
        # Each row has the columns of its own KV head.
        mask = is_row[:, None] & (
            rows[:, None] // (GROUP // KV_HEADS) == columns[None, :] // HEAD_DIM
        )
        in_head = columns % HEAD_DIM
    q_ptrs = q_ptr + (heads * stride_q_head)[:, None] + in_head[None, :]

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

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for _ in range(num_tiles):
        seq, _row, _start, end, place, low = item
        seq = seq.to(tl.int64)
        keys = tile + in_tile
        visible = keys < end
        if WINDOW > 0:
            visible = visible & (keys >= low)
        first = block_ids.to(tl.int64) * stride_cache_block + head * stride_cache_head
        if BLOCK_SIZE >= BLOCK_N:
            places = first + tile % BLOCK_SIZE * STRIDE_CACHE_TOKEN + offsets
        else:
            first += keys % BLOCK_SIZE * STRIDE_CACHE_TOKEN
            places = first[:, None] + columns[None, :]
        is_read = visible[:, None] & is_column
        is_last = tile + BLOCK_N >= end

        q = tl.load(q_ptrs + seq * stride_q_token, mask=mask, other=0.0)
        k = tl.load(k_ptr + places, mask=is_read, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
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
        v = tl.load(v_ptr + places, mask=is_read, other=0.0)
        acc = tl.dot(probs.to(v.dtype), v, acc, input_precision="ieee")

        if is_last:
            if place < 0:
                # A padding row has no keys: sum 0, output 0.
                mixed = acc / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]
                out_ptrs = out_ptr + seq * stride_out + (heads * HEAD_DIM)[:, None]
                out_ptrs += in_head[None, :]
                tl.store(out_ptrs, mixed.to(out_ptr.dtype.element_ty), mask=mask)
            else:
                own_place = place.to(tl.int64)
                partial_ptrs = partial_ptr + (own_place * num_q_heads + heads)[:, None] * HEAD_DIM
                tl.store(partial_ptrs + in_head[None, :], acc, mask=mask)
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

    if STARTS_EARLY:
        gdc_wait()
    merge_finished(
        arrivals,
        items_ptr,
        partial_ptr,
        stats_ptr,
        arrivals_ptr,
        out_ptr,
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
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    metadata: AttentionMetadata,
    out: torch.Tensor,
    *,
    softmax_scale: float,
    sliding_window: int | None,
    logit_softcap: float,
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
        batch_invariant: Cut sequences by their own length alone, and share no prefixes.
        tiles: Launch shape; default `decode_tiles`.
        tiles_of_prefixes: Launch shape for shared prefixes; default `prefix_tiles`.
    """
    num_seqs, num_q_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    tiles = tiles or decode_tiles(q.dtype, head_dim)
    tiles_of_prefixes = tiles_of_prefixes or prefix_tiles(q.dtype, head_dim)
    kv_heads = tiles.kv_heads(k_cache, num_q_heads // num_kv_heads)
    # A program's own view: its KV heads are one, and so are their groups.
    num_heads, group = num_kv_heads // kv_heads, num_q_heads // num_kv_heads * kv_heads
    num_processors = num_multiprocessors(q.device)
    num_columns = max(1, num_processors * tiles.programs_per_processor // num_heads)
    layout = tiles.layout(num_columns, batch_invariant)
    prefix_layout = tiles_of_prefixes.layout(num_processors)
    heads = (num_q_heads, num_kv_heads, num_heads)
    key = ("decode plan", sliding_window, heads, num_seqs, block_size, layout, prefix_layout)
    plan = metadata.once_per_step(
        key,
        lambda: plan_decode(
            metadata, num_seqs, *heads, block_size, sliding_window, layout, prefix_layout
        ),
    )
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
    starts_early = has_prefixes and starts_kernels_early(q.device)
    block_g, block_g_d = triton.next_power_of_2(group), max(triton.next_power_of_2(head_dim), 16)
    _split_kernel[(num_columns * num_heads,)](
        q,
        k_cache,
        v_cache,
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
        k_cache.stride(0),
        k_cache.stride(2) * kv_heads,
        metadata.block_table.stride(0),
        out.stride(0),
        HEADS=num_heads,
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        STRIDE_CACHE_TOKEN=k_cache.stride(1),
        WINDOW=sliding_window or 0,
        HAS_SOFTCAP=logit_softcap != 0.0,
        STARTS_EARLY=starts_early,
        ITEM=ITEM,
        COLUMN=COLUMN,
        BLOCK_M=max(16, block_g),
        BLOCK_D=max(triton.next_power_of_2(kv_heads * head_dim), 16),
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
