"""Which tiles the products with integer codes run with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.kernels.quantised_layout import CodePlanes

_PROCESSORS = 132


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
MOST_ROWS_OF_TILES = 512
"""Rows beyond which a weight is expanded for the library's product."""

MOST_ROWS_OF_TILES_BEFORE_BYTES = 64
"""Rows beyond which x is rounded to bytes, where it may be."""


def vector_tiles(weight: CodePlanes) -> VectorTiles:
    """Tiles of a product of one row."""
    return VectorTiles(8, min(32, 1 << (weight.num_bundles - 1).bit_length()))


def product_tiles(num_rows: int, weight: CodePlanes, dtype: torch.dtype) -> ProductTiles:
    """Tiles of a product of several rows of x of `dtype`."""
    if dtype == torch.float32:
        return _WIDE
    block_m = 16
    while block_m < min(num_rows, 128):
        block_m *= 2
    block_n = 64 if block_m <= 32 else 128
    tiles = -(-num_rows // block_m) * -(-weight.shape[0] // block_n)
    split = 1
    while tiles * split < 2 * _PROCESSORS and weight.num_bundles >= 8 * split:
        split *= 2
    return ProductTiles(block_m, block_n, split, 4, 4 if block_n * block_m <= 8192 else 8)


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
