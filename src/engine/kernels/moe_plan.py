"""Tokens sorted by expert, and cut into tiles of one expert each, on the device.

A *place* is one of a token's K choices: place t K + k. Letters: P = T K places, E experts.

    count_kernel  grid (E,)  counts[e] = places that chose e
    place_kernel  grid (E,)  order: places by expert, within an expert in their order
                             tiles: (expert, first row of order, end of the expert's rows)

| argument    | shape, dtype         | duty                                                 |
|-------------|----------------------|------------------------------------------------------|
| experts_ptr | [P] int32            | in [0, E)                                            |
| counts_ptr  | [E] int32            | written by the first kernel                          |
| order_ptr   | [P] int32            | written; places                                      |
| tiles_ptr   | [max_tiles, 3] int32 | written; expert -1 marks unused tiles, which end it  |

Every program scans all places, so nothing depends on how they fall: no atomics, no host, the same
order every time. 64 Ki places are 16 rounds of a program, and the products behind them are
thousands of times as much work.

Each expert in use ends with at most one tile that is not full, so there are at most
P // rows + min(E, P) tiles: a grid that is known before the device has chosen. constexpr: what is
fixed per model, and the rows of a tile.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.compile_ahead import launchable

_BLOCK = 4096
TILE_ENTRY = 3
"""Numbers of a tile in the list."""


@launchable
@triton.jit
def _count_kernel(experts_ptr, counts_ptr, num_places, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_places, BLOCK):
        places = start + tl.arange(0, BLOCK)
        chosen = tl.load(experts_ptr + places, mask=places < num_places, other=-1)
        found += (chosen == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(found, axis=0))


@launchable
@triton.jit
def _place_kernel(
    experts_ptr,
    counts_ptr,
    order_ptr,
    tiles_ptr,
    num_places,
    max_tiles,
    NUM_EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_ENTRY: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    expert = tl.program_id(0)
    numbers = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + numbers, mask=numbers < NUM_EXPERTS, other=0)
    is_before = numbers < expert
    start = tl.sum(tl.where(is_before, counts, 0), axis=0)
    first_tile = tl.sum(tl.where(is_before, tl.cdiv(counts, ROWS), 0), axis=0)
    count = tl.sum(tl.where(numbers == expert, counts, 0), axis=0)

    in_block = tl.arange(0, BLOCK)
    num_found = 0
    for base in range(0, num_places, BLOCK):
        places = base + in_block
        chosen = tl.load(experts_ptr + places, mask=places < num_places, other=-1)
        is_mine = chosen == expert
        rank = tl.cumsum(is_mine.to(tl.int32), axis=0)
        tl.store(order_ptr + start + num_found + rank - 1, places, mask=is_mine)
        num_found += tl.sum(is_mine.to(tl.int32), axis=0)

    num_tiles = tl.cdiv(count, ROWS)
    end_tile = first_tile + num_tiles
    if expert == NUM_EXPERTS - 1:
        # Behind the last tile of all come those that are not used.
        num_tiles = max_tiles - first_tile
    for base in range(0, num_tiles, BLOCK):
        tiles = base + in_block
        is_tile = tiles < num_tiles
        is_used = first_tile + tiles < end_tile
        tile_ptrs = tiles_ptr + (first_tile + tiles) * TILE_ENTRY
        tl.store(tile_ptrs, tl.where(is_used, expert, -1), mask=is_tile)
        tl.store(tile_ptrs + 1, start + tiles * ROWS, mask=is_tile)
        tl.store(tile_ptrs + 2, start + count, mask=is_tile)


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """Places by expert.

    Attributes:
        order: [P] int32, places.
        tiles: [max_tiles, 3] int32, (expert or -1, first row of `order`, end of the expert's rows).
    """

    order: torch.Tensor
    tiles: torch.Tensor


def plan_experts(experts: torch.Tensor, num_experts: int, rows: int) -> ExpertPlan:
    """Sort the places of `experts` [T, K] int32 and cut them into tiles of `rows`."""
    num_places, device = experts.numel(), experts.device
    max_tiles = num_places // rows + min(num_experts, num_places)
    counts = torch.empty(num_experts, dtype=torch.int32, device=device)
    order = torch.empty(num_places, dtype=torch.int32, device=device)
    tiles = torch.empty((max_tiles, TILE_ENTRY), dtype=torch.int32, device=device)
    block = min(_BLOCK, max(128, triton.next_power_of_2(num_places)))
    _count_kernel[(num_experts,)](experts, counts, num_places, BLOCK=block, num_warps=4)
    _place_kernel[(num_experts,)](
        experts,
        counts,
        order,
        tiles,
        num_places,
        max_tiles,
        NUM_EXPERTS=num_experts,
        ROWS=rows,
        TILE_ENTRY=TILE_ENTRY,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK=block,
        num_warps=4,
    )
    return ExpertPlan(order, tiles)
