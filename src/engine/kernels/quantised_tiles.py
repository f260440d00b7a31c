"""Which tiles the products with integer codes run with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.kernels.quantised_layout import STRIPS, CodePlanes


@dataclass(frozen=True, slots=True)
class VectorTiles:
    """Compile-time settings of a product of one row.

    Attributes:
        block_n: Weight rows per program.
        block_b: Bundles of 128 columns per round.
        num_warps: Warps per program.
    """

    block_n: int
    block_b: int
    num_warps: int = 4


@dataclass(frozen=True, slots=True)
class ProductTiles:
    """Compile-time settings of a product of several rows.

    Attributes:
        block_m: Rows of x per program.
        block_n: Weight rows per program.
        split: Programs that share the columns of a tile.
        num_stages: Rounds of 128 columns whose loads are in flight.
        num_warps: Warps per program.
    """

    block_m: int
    block_n: int
    split: int = 1
    num_stages: int = 4
    num_warps: int = 4


_WIDE = ProductTiles(16, 32, num_stages=2)
"""For float32: without tensor cores smaller tiles keep registers free."""
MOST_ROWS_BEFORE_BYTES = 64
"""Rows beyond which x is rounded to bytes, where it may be."""
_MOST_SPLIT = 8
# Rows of x -> (block_m, block_n, warps, programs that a product should have at least).
_MEASURED = (
    (16, (16, 64, 4, 500)),
    (32, (32, 128, 4, 400)),
    (64, (64, 128, 8, 190)),
    (256, (128, 128, 8, 96)),
)
_MANY_ROWS = 128
# Rows of x -> (block_m, block_n, stages, warps, programs that a product should have at least).
_HOPPER = (
    (16, (16, 64, 4, 4, 256)),
    (32, (32, 64, 5, 4, 256)),
    (64, (64, 64, 4, 4, 190)),
    (128, (128, 64, 3, 4, 96)),
    (384, (128, 128, 3, 8, 96)),
)
_LONG_ROWS = 8192
"""Columns of a weight from which twice as many programs share tiles of 128 rows of x."""
_LARGE_WEIGHT = 40 << 20
"""Numbers of a weight from which tiles are faster than expansion up to 256 rows."""


def vector_tiles(weight: CodePlanes) -> VectorTiles:
    """Tiles of a product of one row."""
    most_bundles = 1 << (weight.num_bundles - 1).bit_length()
    block_n = (
        8 if weight.bits == 8 or weight.strips_per_scale < 8 or weight.table is not None else 4
    )
    return VectorTiles(block_n, min(16, most_bundles), 2)


def one_row_tiles(weight: CodePlanes, *, is_gated: bool = False) -> VectorTiles:
    """Tiles of `quantised_one_row`, whose warps have eight bundles each.

    Programs of half the size are 1-4 us faster for a wide weight alone, but each program finds
    the norm of x for itself: with them a step of llama-8b took 2.95 ms instead of 2.72.

    Args:
        weight: Of the product.
        is_gated: Whether half of a program's rows are the gate's.
    """
    num_warps = 2
    if weight.strips_per_scale < STRIPS and not (weight.table is not None or is_gated):
        num_warps = 4
    if weight.bits == 4:
        return VectorTiles(8, 8 * num_warps, num_warps)
    return VectorTiles(4, 16, 2)


def hopper_tiles(num_rows: int, weight: CodePlanes) -> ProductTiles | None:
    """Tiles of `quantised_hopper`; None where the weight is better expanded."""
    num_cols, num_inner = weight.shape
    found = next((tiles for most_rows, tiles in _HOPPER if num_rows <= most_rows), None)
    if found is None:
        return None
    block_m, block_n, num_stages, num_warps, fewest = found
    if 64 < num_rows <= _MANY_ROWS and num_inner >= _LONG_ROWS and weight.bits < 6:
        fewest *= 2
    num_tiles = -(-num_rows // block_m) * -(-num_cols // block_n)
    split = 1
    while num_tiles * split < fewest and split < min(_MOST_SPLIT, weight.num_bundles // 2):
        split *= 2
    return ProductTiles(block_m, block_n, split, num_stages, num_warps)


def product_tiles(num_rows: int, weight: CodePlanes, dtype: torch.dtype) -> ProductTiles | None:
    """Tiles of a product of several rows of x of `dtype`; None where it is better expanded."""
    if dtype == torch.float32:
        return _WIDE
    num_cols, num_inner = weight.shape
    is_large = num_cols * num_inner >= _LARGE_WEIGHT
    found = next((tiles for most_rows, tiles in _MEASURED if num_rows <= most_rows), None)
    if found is None or (num_rows > _MANY_ROWS and not is_large):
        return None
    block_m, block_n, num_warps, fewest = found
    if weight.bits == 8:
        fewest //= 2
    tiles = -(-num_rows // block_m) * -(-num_cols // block_n)
    split = 1
    while tiles * split < fewest and split < min(_MOST_SPLIT, weight.num_bundles):
        split *= 2
    return ProductTiles(block_m, block_n, split, 3, num_warps)


def expert_product_tiles(num_places: int, num_experts: int, dtype: torch.dtype) -> ProductTiles:
    """Tiles of the experts' products; a program has rows of one expert."""
    if dtype == torch.float32:
        return _WIDE
    share = num_places / num_experts
    if share <= 16:
        return ProductTiles(16, 64)
    return ProductTiles(32, 64) if share <= 32 else ProductTiles(64, 128, num_warps=8)


def invariant_tiles(dtype: torch.dtype) -> ProductTiles:
    """Tiles for any number of rows, whose results do not depend on that number."""
    return _WIDE if dtype == torch.float32 else ProductTiles(64, 64)
