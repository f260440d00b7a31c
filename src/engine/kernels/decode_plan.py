"""The work list of decode attention: which keys of which sequence one program reads at a time.

    splits(n) = min(ceil(tiles(n) / (SPLIT / TILE)), MAX_SPLITS),  tiles(n) = ceil(n / TILE)
    split s of a sequence: tiles [s tiles / splits, (s + 1) tiles / splits), rounded down

The layout is a function of a sequence's own length (and of the model's constants) alone, so a
sequence's result is the same bits in every batch. Splits of a sequence differ by a tile at most:
neighbouring programs finish together.

A member of a shared prefix of p tokens has prefix_splits(p) splits, likewise cut, which its group
computes for all members at once (`shared_prefix`), and splits(n - p) of its own after them, up to
MAX_SPLITS together. Its bits are a function of n and p: who else is in the group changes nothing.

| argument       | shape, dtype              | duty                                              |
|----------------|---------------------------|---------------------------------------------------|
| seq_lens_ptr   | [B] int32                 | 0: padding, one item without keys                 |
| block_rows_ptr | [B] int64                 | row of the block table; None: sequence b has row b|
| counts_ptr     | [1 or more] int32         | sequences to plan; None: all B                    |
| plan_ptr       | [HEADER + items * ITEM]   | int32, written: the number of items, then items   |
| arrivals_ptr   | [B * Hkv] int32           | written: zeros                                    |
| places_ptr     | [B, 2] int32              | written: first place in the partials, splits      |
| prefix_items   | [HEADER + items * ITEM]   | likewise, items of the groups                     |
| others         | int32                     | see `metadata.SharedPrefixes`; None: no groups    |

An item is ITEM numbers, one sector of memory: sequence, row of the block table, first key, end of
its keys, first place of the sequence in the partials, split, splits of the sequence + 256 times
those of its prefix, its length. An item of a group: first member, number of members, first row of
the tile (a row is a member's query head), row of the block table, first key, end, split, unused.
Places are handed out one after another to sequences of two splits and more, so the partials that
are touched lie together, whatever the bound on the lengths. B * MAX_SPLITS places always suffice.

Grid (1,). Rounds of BLOCK sequences, each storing its items split by split, then the groups one by
one. constexpr: the layout.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.attention_tiles import KEY_ALIGNMENT
from engine.kernels.compile_ahead import launchable
from engine.kernels.metadata import AttentionMetadata

HEADER = 8
ITEM = 8
_BLOCK = 1024


@dataclass(frozen=True)
class SplitLayout:
    """Constants of the layout: keys per split, most splits, and `tile`, which divides borders."""

    split: int
    max_splits: int
    tile: int = KEY_ALIGNMENT

    def num_splits(self, num_keys: int, num_taken: int = 0) -> int:
        """Splits of a sequence that sees `num_keys` keys, counted from a tile's border."""
        num_tiles = -(-num_keys // self.tile)
        most = self.max_splits - num_taken
        return max(1, min(-(-num_tiles // (self.split // self.tile)), most))


@dataclass(frozen=True)
class DecodePlan:
    """What the layers of a step share: see the head of the file for the tensors."""

    items: torch.Tensor
    arrivals: torch.Tensor
    places: torch.Tensor
    prefix_items: torch.Tensor | None


@triton.jit
def _num_splits(num_keys, most, SPLIT: tl.constexpr, TILE: tl.constexpr):
    return tl.maximum(tl.minimum(tl.cdiv(tl.cdiv(num_keys, TILE), SPLIT // TILE), most), 1)


@triton.jit
def _plan_group(
    prefix_items_ptr,
    members_ptr,
    member_start_ptr,
    group_lens_ptr,
    block_rows_ptr,
    group,
    num_items,
    GROUP_HEADS: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEADER: tl.constexpr,
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
        num_splits = _num_splits(num_keys, MAX_SPLITS, SPLIT, TILE)
        num_row_tiles = tl.cdiv(num_members * GROUP_HEADS, BLOCK_M)
        for base in range(0, num_splits * num_row_tiles, BLOCK):
            # Row tiles that read the same keys are neighbours.
            index = base + tl.arange(0, BLOCK)
            split = index // num_row_tiles
            is_item = split < num_splits
            item_ptrs = prefix_items_ptr + HEADER + (num_items + index) * ITEM
            same = tl.zeros([BLOCK], tl.int32)
            end = (split + 1) * num_tiles // num_splits * TILE
            tl.store(item_ptrs, same + first_member, mask=is_item)
            tl.store(item_ptrs + 1, same + num_members, mask=is_item)
            tl.store(item_ptrs + 2, index % num_row_tiles * BLOCK_M, mask=is_item)
            tl.store(item_ptrs + 3, same + table_row, mask=is_item)
            tl.store(item_ptrs + 4, split * num_tiles // num_splits * TILE, mask=is_item)
            tl.store(item_ptrs + 5, tl.minimum(end, num_keys), mask=is_item)
            tl.store(item_ptrs + 6, split, mask=is_item)
        num_items += num_splits * num_row_tiles
    return num_items


@launchable
@triton.jit(do_not_specialize=["num_seqs"])
def _plan_kernel(
    seq_lens_ptr,
    block_rows_ptr,
    counts_ptr,
    plan_ptr,
    arrivals_ptr,
    places_ptr,
    prefix_items_ptr,
    members_ptr,
    member_start_ptr,
    group_lens_ptr,
    prefix_lens_ptr,
    num_seqs,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    PREFIX_SPLIT: tl.constexpr,
    MAX_PREFIX_SPLITS: tl.constexpr,
    PREFIX_TILE: tl.constexpr,
    PREFIX_BLOCK_M: tl.constexpr,
    HEADER: tl.constexpr,
    ITEM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    num_planned = num_seqs
    if counts_ptr is not None:
        num_planned = tl.minimum(tl.load(counts_ptr), num_seqs)
    num_items = 0
    num_places = 0
    for base in range(0, num_planned, BLOCK):
        seqs = base + tl.arange(0, BLOCK)
        is_seq = seqs < num_planned
        seq_lens = tl.load(seq_lens_ptr + seqs, mask=is_seq, other=0)
        rows = seqs
        if block_rows_ptr is not None:
            rows = tl.load(block_rows_ptr + seqs, mask=is_seq, other=0).to(tl.int32)
        first = tl.zeros([BLOCK], tl.int32)
        num_shared = tl.zeros([BLOCK], tl.int32)
        if WINDOW > 0:
            low = tl.maximum(seq_lens - WINDOW, 0)
            first = low - low % TILE
        elif NUM_GROUPS > 0:
            first = tl.load(prefix_lens_ptr + seqs, mask=is_seq, other=0)
            shared = _num_splits(first, MAX_PREFIX_SPLITS, PREFIX_SPLIT, PREFIX_TILE)
            num_shared = tl.where(first > 0, shared, 0)
        num_tiles = tl.cdiv(seq_lens - first, TILE)
        num_own = _num_splits(seq_lens - first, MAX_SPLITS - num_shared, SPLIT, TILE)
        num_own = tl.where(is_seq, num_own, 0)
        num_splits = num_own + num_shared
        item = num_items + tl.cumsum(num_own, axis=0) - num_own
        in_places = tl.where(num_splits > 1, num_splits, 0)
        place = num_places + tl.cumsum(in_places, axis=0) - in_places
        tl.store(places_ptr + seqs * 2, place, mask=is_seq)
        tl.store(places_ptr + seqs * 2 + 1, num_splits, mask=is_seq)
        for kv_head in tl.static_range(NUM_KV_HEADS):
            tl.store(arrivals_ptr + seqs * NUM_KV_HEADS + kv_head, 0, mask=is_seq)
        most = tl.max(num_own, axis=0)
        for split in range(most):
            is_item = split < num_own
            item_ptrs = plan_ptr + HEADER + (item + split) * ITEM
            divisor = tl.maximum(num_own, 1)
            start = first + split * num_tiles // divisor * TILE
            end = first + (split + 1) * num_tiles // divisor * TILE
            tl.store(item_ptrs, seqs, mask=is_item)
            tl.store(item_ptrs + 1, rows, mask=is_item)
            tl.store(item_ptrs + 2, start, mask=is_item)
            tl.store(item_ptrs + 3, tl.minimum(end, seq_lens), mask=is_item)
            tl.store(item_ptrs + 4, place, mask=is_item)
            tl.store(item_ptrs + 5, split + num_shared, mask=is_item)
            tl.store(item_ptrs + 6, num_splits + 256 * num_shared, mask=is_item)
            tl.store(item_ptrs + 7, seq_lens, mask=is_item)
        num_items += tl.sum(num_own, axis=0)
        num_places += tl.sum(in_places, axis=0)
    tl.store(plan_ptr, num_items)
    if NUM_GROUPS > 0:
        num_items = 0
        # Groups in use come first; a step without any waits for one load.
        groups = tl.arange(0, BLOCK_GROUPS)
        lens = tl.load(group_lens_ptr + groups, mask=groups < NUM_GROUPS, other=0)
        for group in range(tl.sum((lens > 0).to(tl.int32), axis=0)):
            num_items = _plan_group(
                prefix_items_ptr,
                members_ptr,
                member_start_ptr,
                group_lens_ptr,
                block_rows_ptr,
                group,
                num_items,
                GROUP_HEADS,
                PREFIX_SPLIT,
                MAX_PREFIX_SPLITS,
                PREFIX_TILE,
                PREFIX_BLOCK_M,
                HEADER,
                ITEM,
                32,
            )
        tl.store(prefix_items_ptr, num_items)


@dataclass(frozen=True)
class PrefixLayout:
    """How shared prefixes are cut: rows per tile, and their keys as in `SplitLayout`."""

    block_m: int
    keys: SplitLayout


def plan_decode(
    metadata: AttentionMetadata,
    num_seqs: int,
    num_q_heads: int,
    num_kv_heads: int,
    sliding_window: int | None,
    layout: SplitLayout,
    prefix_layout: PrefixLayout,
) -> DecodePlan:
    """Plan the leading `num_seqs` sequences, or the first `metadata.device_counts[0]` of them.

    Under a sliding window nobody shares a prefix.
    """
    device = metadata.seq_lens.device
    max_items = num_seqs * layout.max_splits
    groups = None if sliding_window else metadata.shared_prefixes
    num_groups = 0 if groups is None else groups.group_lens.shape[0]
    group_heads = num_q_heads // num_kv_heads
    # Every group may fill its last tile of rows with one row only.
    max_row_tiles = num_seqs * group_heads // prefix_layout.block_m + num_groups
    max_prefix_items = max_row_tiles * prefix_layout.keys.max_splits

    def make_items(count: int) -> torch.Tensor:
        return torch.empty(HEADER + count * ITEM, dtype=torch.int32, device=device)

    plan = DecodePlan(
        items=make_items(max_items),
        arrivals=torch.empty(num_seqs * num_kv_heads, dtype=torch.int32, device=device),
        places=torch.empty((num_seqs, 2), dtype=torch.int32, device=device),
        prefix_items=None if groups is None else make_items(max_prefix_items),
    )
    _plan_kernel[(1,)](
        metadata.seq_lens,
        metadata.block_rows,
        metadata.device_counts,
        plan.items,
        plan.arrivals,
        plan.places,
        plan.prefix_items,
        None if groups is None else groups.members,
        None if groups is None else groups.member_start,
        None if groups is None else groups.group_lens,
        None if groups is None else groups.prefix_lens,
        num_seqs,
        NUM_KV_HEADS=num_kv_heads,
        GROUP_HEADS=group_heads,
        WINDOW=sliding_window or 0,
        SPLIT=layout.split,
        MAX_SPLITS=layout.max_splits,
        TILE=layout.tile,
        NUM_GROUPS=num_groups,
        BLOCK_GROUPS=triton.next_power_of_2(max(num_groups, 1)),
        PREFIX_SPLIT=prefix_layout.keys.split,
        MAX_PREFIX_SPLITS=prefix_layout.keys.max_splits,
        PREFIX_TILE=prefix_layout.keys.tile,
        PREFIX_BLOCK_M=prefix_layout.block_m,
        HEADER=HEADER,
        ITEM=ITEM,
        BLOCK=min(_BLOCK, max(triton.next_power_of_2(num_seqs), 32)),
        num_warps=8,
        enable_fp_fusion=True,
    )
    return plan
