"""The work list of decode attention: which keys of which sequence one program reads at a time.

    splits(n) = min(ceil(tiles(n) / (SPLIT / TILE)), MAX_SPLITS),  tiles(n) = ceil(n / TILE)
    split s of a sequence: tiles [s tiles / splits, (s + 1) tiles / splits), rounded down

The layout is a function of a sequence's own length (and of the model's constants) alone, so a
sequence's result is the same bits in every batch. Splits of a sequence differ by a tile at most:
neighbouring programs finish together.

| argument       | shape, dtype              | duty                                              |
|----------------|---------------------------|---------------------------------------------------|
| seq_lens_ptr   | [B] int32                 | 0: padding, one item without keys                 |
| block_rows_ptr | [B] int64                 | row of the block table; None: sequence b has row b|
| counts_ptr     | [1 or more] int32         | sequences to plan; None: all B                    |
| plan_ptr       | [HEADER + items * ITEM]   | int32, written: the number of items, then items   |
| arrivals_ptr   | [B * Hkv] int32           | written: zeros                                    |
| places_ptr     | [B, 2] int32              | written: first place in the partials, splits      |

An item is ITEM numbers, one sector of memory: sequence, row of the block table, first key, end of
its keys, first place of the sequence in the partials, split, splits of the sequence, its length.
Places are handed out one after another to sequences of two splits and more, so the partials that
are touched lie together, whatever the bound on the lengths. B * MAX_SPLITS places always suffice.

Grid (1,). Rounds of BLOCK sequences, each storing its items split by split. constexpr: the layout.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.attention_tiles import KEY_ALIGNMENT
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

    def num_splits(self, num_keys: int) -> int:
        """Splits of a sequence that sees `num_keys` keys, counted from a tile's border."""
        num_tiles = -(-num_keys // self.tile)
        return max(1, min(-(-num_tiles // (self.split // self.tile)), self.max_splits))


@dataclass(frozen=True)
class DecodePlan:
    """What the layers of a step share: see the head of the file for the tensors."""

    items: torch.Tensor
    arrivals: torch.Tensor
    places: torch.Tensor


@triton.jit(do_not_specialize=["num_seqs"])
def _plan_kernel(
    seq_lens_ptr,
    block_rows_ptr,
    counts_ptr,
    plan_ptr,
    arrivals_ptr,
    places_ptr,
    num_seqs,
    NUM_KV_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
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
        if WINDOW > 0:
            low = tl.maximum(seq_lens - WINDOW, 0)
            first = low - low % TILE
        num_tiles = tl.cdiv(seq_lens - first, TILE)
        num_splits = tl.cdiv(num_tiles, SPLIT // TILE)
        num_splits = tl.maximum(tl.minimum(num_splits, MAX_SPLITS), 1)
        num_splits = tl.where(is_seq, num_splits, 0)
        item = num_items + tl.cumsum(num_splits, axis=0) - num_splits
        in_places = tl.where(num_splits > 1, num_splits, 0)
        place = num_places + tl.cumsum(in_places, axis=0) - in_places
        tl.store(places_ptr + seqs * 2, place, mask=is_seq)
        tl.store(places_ptr + seqs * 2 + 1, num_splits, mask=is_seq)
        for kv_head in tl.static_range(NUM_KV_HEADS):
            tl.store(arrivals_ptr + seqs * NUM_KV_HEADS + kv_head, 0, mask=is_seq)
        most = tl.max(num_splits, axis=0)
        for split in range(most):
            is_item = split < num_splits
            item_ptrs = plan_ptr + HEADER + (item + split) * ITEM
            divisor = tl.maximum(num_splits, 1)
            start = first + split * num_tiles // divisor * TILE
            end = first + (split + 1) * num_tiles // divisor * TILE
            tl.store(item_ptrs, seqs, mask=is_item)
            tl.store(item_ptrs + 1, rows, mask=is_item)
            tl.store(item_ptrs + 2, start, mask=is_item)
            tl.store(item_ptrs + 3, tl.minimum(end, seq_lens), mask=is_item)
            tl.store(item_ptrs + 4, place, mask=is_item)
            tl.store(item_ptrs + 5, split + tl.zeros_like(place), mask=is_item)
            tl.store(item_ptrs + 6, num_splits, mask=is_item)
            tl.store(item_ptrs + 7, seq_lens, mask=is_item)
        num_items += tl.sum(num_splits, axis=0)
        num_places += tl.sum(in_places, axis=0)
    tl.store(plan_ptr, num_items)


def plan_decode(
    metadata: AttentionMetadata,
    num_seqs: int,
    num_kv_heads: int,
    sliding_window: int | None,
    layout: SplitLayout,
) -> DecodePlan:
    """Plan the leading `num_seqs` sequences, or the first `metadata.device_counts[0]` of them."""
    device = metadata.seq_lens.device
    max_items = num_seqs * layout.max_splits
    plan = DecodePlan(
        items=torch.empty(HEADER + max_items * ITEM, dtype=torch.int32, device=device),
        arrivals=torch.empty(num_seqs * num_kv_heads, dtype=torch.int32, device=device),
        places=torch.empty((num_seqs, 2), dtype=torch.int32, device=device),
    )
    _plan_kernel[(1,)](
        metadata.seq_lens,
        metadata.block_rows,
        metadata.device_counts,
        plan.items,
        plan.arrivals,
        plan.places,
        num_seqs,
        NUM_KV_HEADS=num_kv_heads,
        WINDOW=sliding_window or 0,
        SPLIT=layout.split,
        MAX_SPLITS=layout.max_splits,
        TILE=layout.tile,
        HEADER=HEADER,
        ITEM=ITEM,
        BLOCK=min(_BLOCK, max(triton.next_power_of_2(num_seqs), 32)),
        num_warps=8,
        enable_fp_fusion=True,
    )
    return plan
