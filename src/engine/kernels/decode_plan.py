"""The work list of decode attention: which keys of which sequence each program reads.

    tiles(b) = max(ceil(n_b / TILE), 1);  S(b) = sum of tiles before b;  T = sum of all
    per column: n = max(ceil(T / C), min_tiles, ceil(max tiles / (max_parts - 1)))
    column c begins at tile c n of that running count, or at the end of a sequence near it

The tiles of all sequences lie behind one another, and C columns of programs share them evenly, as
stream-K shares the work of a product (Osama et al., arXiv 2301.03598): a sequence is cut where a
column ends and nowhere else. Few sequences therefore spread over the whole device, and where there
are many, at most C of them are cut and have partial sums to be merged, whatever their lengths. A
column's border that would cut off less than `snap` tiles moves to the end of the sequence: merging
costs as much time as a few tiles. Where a sequence is cut depends on the batch.

With SPLIT > 0 (`batch_invariant`) it depends on the sequence's own length alone:

    parts(n) = min(ceil(tiles(n) / (SPLIT / TILE)), max_parts)
    part s: tiles [s tiles / parts, (s + 1) tiles / parts), rounded down

and a column works on the parts that begin in its share of the tiles.

A member of a shared prefix of p tokens has parts that its group computes for all members at once
(`shared_prefix`), then those of its own n - p tokens. Groups share their programs likewise: with
T' tiles of keys and rows in all groups, KV heads included, a part has ceil(T' / programs) tiles of
keys, but no prefix has more than `max_prefix_parts`.

| argument         | shape, dtype             | duty                                              |
|------------------|--------------------------|---------------------------------------------------|
| seq_lens_ptr     | [B] int32                | 0: padding, one item without keys                 |
| block_rows_ptr   | [B] int64                | row of the block table; None: sequence b has row b|
| counts_ptr       | [1 or more] int32        | sequences to plan; None: all B                    |
| block_table_ptr  | [rows, max_blocks] int32 | stride 1 along blocks                             |
| columns_ptr      | [C + 1, COLUMN] int32    | written: see below                                |
| items_ptr        | [items, ITEM] int32      | written                                           |
| places_ptr       | [B] int32                | written: first place in the partials              |
| arrivals_ptr     | [B * Hkv] int32          | written: zeros                                    |
| prefix_items_ptr | [1 + items, ITEM] int32  | written: the number of items in the first, items  |
| others           | int32                    | see `metadata.SharedPrefixes`; None: no groups    |

An item is ITEM numbers, one sector of memory: sequence, row of the block table, first key, end of
its keys, place in the partials (-1: the whole sequence, no partials), first key that a window
shows, block of the first key, and in three bytes the parts of the sequence, those of its own keys
and those before this one. An item of a group: first member, number of members, first row of the
tile (a row is a member's query head), row of the block table, first key, end, part.

A column starts with a copy of the first 7 numbers of its first item, so that its programs need not
wait for a number before they load it; then the item's index, and the running count of tiles.
Columns without work have zeros, and index and count where the last one ends. Places are handed out
one after another to sequences of two parts and more.

Grid (1,). Rounds of BLOCK sequences, once to count and once to store, then the groups one by one.
constexpr: what is fixed per model.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.compile_ahead import launchable
from engine.kernels.decode_layout import PrefixLayout, SplitLayout
from engine.kernels.metadata import AttentionMetadata

ITEM = 8
COLUMN = 16
# Sequences per round: two sizes, so that two kernels serve all batches.
_FEW, _MANY = 64, 512


@dataclass(frozen=True)
class DecodePlan:
    """What the layers of a step share: see the head of the file for the tensors."""

    columns: torch.Tensor
    items: torch.Tensor
    places: torch.Tensor
    arrivals: torch.Tensor
    max_places: int
    prefix_items: torch.Tensor | None


@triton.jit
def _plan_group(
    prefix_items_ptr,
    members_ptr,
    member_start_ptr,
    group_lens_ptr,
    block_rows_ptr,
    group,
    num_items,
    tiles_per_part,
    GROUP_HEADS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ITEM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the items of one group; returns the number of items so far."""
    first_member = tl.load(member_start_ptr + group)
    num_members = tl.load(member_start_ptr + group + 1) - first_member
    num_keys = tl.load(group_lens_ptr + group)
    if (num_members > 0) & (num_keys > 0):
        table_row = tl.load(members_ptr + first_member)
        if block_rows_ptr is not None:
            table_row = tl.load(block_rows_ptr + table_row).to(tl.int32)
        num_tiles = tl.cdiv(num_keys, TILE)
        num_parts = tl.cdiv(num_tiles, tiles_per_part)
        num_row_tiles = tl.cdiv(num_members * GROUP_HEADS, BLOCK_M)
        for base in range(0, num_parts * num_row_tiles, BLOCK):
            # Row tiles that read the same keys are neighbours.
            index = base + tl.arange(0, BLOCK)
            part = index // num_row_tiles
            is_item = part < num_parts
            item_ptrs = prefix_items_ptr + (1 + num_items + index) * ITEM
            same = tl.zeros([BLOCK], tl.int32)
            end = (part + 1) * num_tiles // num_parts * TILE
            tl.store(item_ptrs, same + first_member, mask=is_item)
            tl.store(item_ptrs + 1, same + num_members, mask=is_item)
            tl.store(item_ptrs + 2, index % num_row_tiles * BLOCK_M, mask=is_item)
            tl.store(item_ptrs + 3, same + table_row, mask=is_item)
            tl.store(item_ptrs + 4, part * num_tiles // num_parts * TILE, mask=is_item)
            tl.store(item_ptrs + 5, tl.minimum(end, num_keys), mask=is_item)
            tl.store(item_ptrs + 6, part, mask=is_item)
        num_items += num_parts * num_row_tiles
    return num_items


@triton.jit
def _load_seqs(
    seq_lens_ptr,
    block_rows_ptr,
    prefix_lens_ptr,
    seqs,
    is_seq,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Of sequences: length, row of the table, first key to read (of its own), tiles from there.

    Where a window or chunk hides keys, also the first key that it shows, in the end.
    """
    seq_lens = tl.load(seq_lens_ptr + seqs, mask=is_seq, other=0)
    rows = seqs
    if block_rows_ptr is not None:
        rows = tl.load(block_rows_ptr + seqs, mask=is_seq, other=0).to(tl.int32)
    first = seqs * 0
    low = first
    if WINDOW > 0 or CHUNK > 0:
        if WINDOW > 0:
            low = tl.maximum(seq_lens - WINDOW, 0)
        if CHUNK > 0:
            low = tl.maximum(low, tl.maximum(seq_lens - 1, 0) // CHUNK * CHUNK)
        first = low - low % TILE
    elif prefix_lens_ptr is not None:
        first = tl.load(prefix_lens_ptr + seqs, mask=is_seq, other=0)
    num_tiles = tl.where(is_seq, tl.maximum(tl.cdiv(seq_lens - first, TILE), 1), 0)
    return seq_lens, rows, first, num_tiles, low


@triton.jit
def _cuttable(num_tiles, snap):
    """A border of columns cuts a sequence at tiles [start, end); nearer ones move to its ends."""
    is_long = num_tiles >= 2 * snap
    middle = (num_tiles + 1) // 2
    return tl.where(is_long, snap, middle), tl.where(is_long, num_tiles - snap + 1, middle)


@triton.jit
def _store_item(item_ptrs, mask, seqs, rows, start, end, place, low, block_id, last):
    tl.store(item_ptrs, seqs, mask=mask)
    tl.store(item_ptrs + 1, rows, mask=mask)
    tl.store(item_ptrs + 2, start, mask=mask)
    tl.store(item_ptrs + 3, end, mask=mask)
    tl.store(item_ptrs + 4, place, mask=mask)
    tl.store(item_ptrs + 5, low, mask=mask)
    tl.store(item_ptrs + 6, block_id, mask=mask)
    tl.store(item_ptrs + 7, last, mask=mask)


@launchable
@triton.jit(
    do_not_specialize=[
        "num_seqs",
        "num_columns",
        "min_tiles",
        "snap",
        "max_parts",
        "prefix_programs",
        "min_prefix_tiles",
        "max_prefix_parts",
    ]
)
def _plan_kernel(
    seq_lens_ptr,
    block_rows_ptr,
    counts_ptr,
    block_table_ptr,
    columns_ptr,
    items_ptr,
    places_ptr,
    arrivals_ptr,
    prefix_items_ptr,
    members_ptr,
    member_start_ptr,
    group_lens_ptr,
    prefix_lens_ptr,
    num_seqs,
    stride_table,
    num_columns,
    min_tiles,
    snap,
    max_parts,
    prefix_programs,
    min_prefix_tiles,
    max_prefix_parts,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    PREFIX_BLOCK_M: tl.constexpr,
    PREFIX_TILE: tl.constexpr,
    ITEM: tl.constexpr,
    COLUMN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    num_planned = num_seqs
    if counts_ptr is not None:
        num_planned = tl.minimum(tl.load(counts_ptr), num_seqs)
    tiles_per_prefix_part = 1
    if NUM_GROUPS > 0:
        # Groups in use come first; a step without any waits for one load.
        groups = tl.arange(0, BLOCK_GROUPS)
        is_group = groups < NUM_GROUPS
        lens = tl.load(group_lens_ptr + groups, mask=is_group, other=0)
        starts = tl.load(member_start_ptr + groups, mask=is_group, other=0)
        ends = tl.load(member_start_ptr + groups + 1, mask=is_group, other=0)
        key_tiles = tl.cdiv(lens, PREFIX_TILE)
        row_tiles = tl.cdiv((ends - starts) * GROUP_HEADS, PREFIX_BLOCK_M)
        shared = tl.cdiv(tl.sum(key_tiles * row_tiles, axis=0) * NUM_KV_HEADS, prefix_programs)
        longest = tl.cdiv(tl.max(key_tiles, axis=0), max_prefix_parts)
        tiles_per_prefix_part = tl.maximum(tl.maximum(shared, longest), min_prefix_tiles)

    total = 0
    longest = 1
    for base in range(0, num_planned, BLOCK):
        seqs = base + tl.arange(0, BLOCK)
        _seq_lens, _rows, _first, num_tiles, _low = _load_seqs(
            seq_lens_ptr,
            block_rows_ptr,
            prefix_lens_ptr,
            seqs,
            seqs < num_planned,
            WINDOW,
            CHUNK,
            TILE,
        )
        total += tl.sum(num_tiles, axis=0)
        longest = tl.maximum(longest, tl.max(num_tiles, axis=0))
    per_column = tl.maximum(tl.cdiv(total, num_columns), tl.cdiv(longest, max_parts - 1))
    per_column = tl.maximum(per_column, min_tiles)
    if SPLIT > 0:
        per_column = tl.maximum(per_column, SPLIT // TILE)

    num_items = 0
    num_places = 0
    num_used = 0
    total = 0
    for base in range(0, num_planned, BLOCK):
        seqs = base + tl.arange(0, BLOCK)
        is_seq = seqs < num_planned
        seq_lens, rows, first, num_tiles, low = _load_seqs(
            seq_lens_ptr, block_rows_ptr, prefix_lens_ptr, seqs, is_seq, WINDOW, CHUNK, TILE
        )
        before = total + tl.cumsum(num_tiles, axis=0) - num_tiles
        if SPLIT > 0:
            num_own = tl.minimum(tl.cdiv(num_tiles, SPLIT // TILE), max_parts)
            used = tl.cdiv(before + num_tiles, per_column)
        else:
            is_second = is_seq & (seqs > 0)
            _lens, _rows, _first, tiles_before, _low = _load_seqs(
                seq_lens_ptr,
                block_rows_ptr,
                prefix_lens_ptr,
                seqs - 1,
                is_second,
                WINDOW,
                CHUNK,
                TILE,
            )
            _start, cut_end = _cuttable(tiles_before, snap)
            first_column = tl.cdiv(before - tiles_before + cut_end, per_column)
            cut_start, cut_end = _cuttable(num_tiles, snap)
            first_cut = tl.cdiv(before + cut_start, per_column)
            used = tl.cdiv(before + cut_end, per_column)
            num_own = used - first_cut + 1
        num_own = tl.where(is_seq, num_own, 0)
        num_parts = num_own
        if NUM_GROUPS > 0:
            num_parts += tl.cdiv(tl.cdiv(first, PREFIX_TILE), tiles_per_prefix_part)
        item = num_items + tl.cumsum(num_own, axis=0) - num_own
        in_places = tl.where(num_parts > 1, num_parts, 0)
        place = num_places + tl.cumsum(in_places, axis=0) - in_places
        tl.store(places_ptr + seqs, place, mask=is_seq)
        for head in tl.static_range(NUM_KV_HEADS):
            tl.store(arrivals_ptr + seqs * NUM_KV_HEADS + head, 0, mask=is_seq)
        for part in range(tl.max(num_own, axis=0)):
            is_item = part < num_own
            if SPLIT > 0:
                divisor = tl.maximum(num_own, 1)
                start_tile = part * num_tiles // divisor
                end_tile = (part + 1) * num_tiles // divisor
            else:
                border = (first_cut + part) * per_column - before
                start_tile = tl.where(part > 0, border - per_column, 0)
                end_tile = tl.where(part < num_own - 1, border, num_tiles)
            start = first + start_tile * TILE
            end = tl.minimum(first + end_tile * TILE, seq_lens)
            parts_before = num_parts - num_own + part
            own = tl.where(num_parts > 1, place + parts_before, -1)
            packed = num_parts + num_own * 256 + parts_before * 65536
            block_ptrs = block_table_ptr + rows.to(tl.int64) * stride_table + start // BLOCK_SIZE
            block_id = tl.load(block_ptrs, mask=is_item & (start < end), other=0)
            item_ptrs = items_ptr + (item + part) * ITEM
            _store_item(item_ptrs, is_item, seqs, rows, start, end, own, low, block_id, packed)
            # The columns that begin with the item: where it contains their border, and where the
            # border moved to the start of its sequence. Those are 3 at most, and all but the last
            # are left without work.
            for nth in tl.static_range(1 if SPLIT > 0 else 3):
                if SPLIT > 0:
                    column = tl.cdiv(before + start_tile, per_column)
                    is_first = is_item & (column * per_column < before + end_tile)
                else:
                    column = tl.where(part > 0, first_cut + part - 1, first_column + nth)
                    is_first = is_item & tl.where(part > 0, nth == 0, column < first_cut)
                column_ptrs = columns_ptr + column * COLUMN
                _store_item(
                    column_ptrs, is_first, seqs, rows, start, end, own, low, block_id, item + part
                )
                tl.store(column_ptrs + 8, before + start_tile, mask=is_first)
        num_items += tl.sum(num_own, axis=0)
        num_places += tl.sum(in_places, axis=0)
        num_used = tl.maximum(num_used, tl.max(tl.where(is_seq, used, 0), axis=0))
        total += tl.sum(num_tiles, axis=0)
    for base in range(0, num_columns + 1, BLOCK):
        unused = base + tl.arange(0, BLOCK)
        is_unused = (unused >= num_used) & (unused <= num_columns)
        column_ptrs = columns_ptr + unused * COLUMN
        zero = unused * 0
        _store_item(
            column_ptrs, is_unused, zero, zero, zero, zero, zero, zero, zero, zero + num_items
        )
        tl.store(column_ptrs + 8, zero + total, mask=is_unused)

    if NUM_GROUPS > 0:
        num_items = 0
        for group in range(tl.sum((lens > 0).to(tl.int32), axis=0)):
            num_items = _plan_group(
                prefix_items_ptr,
                members_ptr,
                member_start_ptr,
                group_lens_ptr,
                block_rows_ptr,
                group,
                num_items,
                tiles_per_prefix_part,
                GROUP_HEADS,
                PREFIX_TILE,
                PREFIX_BLOCK_M,
                ITEM,
                32,
            )
        tl.store(prefix_items_ptr, num_items)


def plan_decode(
    metadata: AttentionMetadata,
    num_seqs: int,
    num_q_heads: int,
    num_kv_heads: int,
    block_size: int,
    sliding_window: int | None,
    chunk_size: int | None,
    layout: SplitLayout,
    prefix_layout: PrefixLayout,
) -> DecodePlan:
    """Plan the leading `num_seqs` sequences, or the first `metadata.device_counts[0]` of them.

    Under a sliding window or in chunks, and with a layout that does not depend on the batch, nobody
    shares a prefix.
    """
    device = metadata.seq_lens.device
    groups = None if sliding_window or chunk_size or layout.split else metadata.shared_prefixes
    num_groups = 0 if groups is None else groups.group_lens.shape[0]
    group_heads = num_q_heads // num_kv_heads
    # Every group may fill its last tile of rows with one row only.
    max_row_tiles = num_seqs * group_heads // prefix_layout.block_m + num_groups
    max_prefix_items = max_row_tiles * prefix_layout.max_parts
    max_places = layout.max_places(num_seqs)
    if groups is not None:
        # Members have a part of their own at least, whole or not.
        max_places += num_seqs * (1 + prefix_layout.max_parts)

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    plan = DecodePlan(
        columns=integers(layout.num_columns + 1, COLUMN),
        items=integers(layout.max_items(num_seqs), ITEM),
        places=integers(num_seqs),
        arrivals=integers(num_seqs * num_kv_heads),
        max_places=max_places,
        prefix_items=None if groups is None else integers(1 + max_prefix_items, ITEM),
    )
    _plan_kernel[(1,)](
        metadata.seq_lens,
        metadata.block_rows,
        metadata.device_counts,
        metadata.block_table,
        plan.columns,
        plan.items,
        plan.places,
        plan.arrivals,
        plan.prefix_items,
        None if groups is None else groups.members,
        None if groups is None else groups.member_start,
        None if groups is None else groups.group_lens,
        None if groups is None else groups.prefix_lens,
        num_seqs,
        metadata.block_table.stride(0),
        layout.num_columns,
        layout.min_tiles,
        layout.snap,
        layout.max_parts,
        prefix_layout.num_programs,
        prefix_layout.min_tiles,
        prefix_layout.max_parts,
        NUM_KV_HEADS=num_kv_heads,
        GROUP_HEADS=group_heads,
        BLOCK_SIZE=block_size,
        WINDOW=sliding_window or 0,
        CHUNK=chunk_size or 0,
        TILE=layout.tile,
        SPLIT=layout.split,
        NUM_GROUPS=num_groups,
        BLOCK_GROUPS=triton.next_power_of_2(max(num_groups, 1)),
        PREFIX_BLOCK_M=prefix_layout.block_m,
        PREFIX_TILE=prefix_layout.tile,
        ITEM=ITEM,
        COLUMN=COLUMN,
        BLOCK=_FEW if num_seqs <= _FEW else _MANY,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return plan
