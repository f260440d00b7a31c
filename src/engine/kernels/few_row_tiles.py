"""Which tiles `few_row_linear` runs with, as measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True, slots=True)
class FewRowTiles:
    """Compile-time settings of one product.

    Attributes:
        block_m: Rows of x per program; 1 multiplies without tensor cores.
        block_n: Weight rows in a program's registers: a power of two.
        block_k: Entries of K per round.
        num_stages: Rounds whose loads are in flight.
        num_warps: Warps per program.
        use_pdl: Whether programs start before the kernel before them ends.
        cols: Weight rows per program (in a gated product of gate, and as many of up), if fewer than
            `block_n`: so many that every SM gets the same. The rest is not read.
        prefetch_lines: 128-byte lines of each weight row that a program asks for while it waits.
    """

    block_m: int
    block_n: int
    block_k: int
    num_stages: int = 4
    num_warps: int = 4
    use_pdl: bool = False
    cols: int = 0
    prefetch_lines: int = 8

    @property
    def num_cols(self) -> int:
        """Weight rows per program."""
        return self.cols or self.block_n


MAX_FUSED_ROWS = 16


def beats_library(num_rows: int, weight: torch.Tensor) -> bool:
    """Whether a plain product of so many rows is faster here than by cuBLAS."""
    return num_rows <= 16


def tiles_for(kind: str, x: torch.Tensor, weight: torch.Tensor) -> FewRowTiles:
    """Tiles of one product of `kind` "plain", "normed", "gated" or "adding"."""
    return _tiles(kind, x.shape[0], x.shape[1], x.dtype.itemsize)


@lru_cache(maxsize=1024)
def _tiles(kind: str, num_rows: int, num_inner: int, itemsize: int) -> FewRowTiles:
    if itemsize == 4:
        return FewRowTiles(16 if num_rows > 1 else 1, 16, 32, 2)
    if num_rows == 1:
        return FewRowTiles(1, 16, 256, 3)
    return FewRowTiles(16, 16, 256, 4)
