"""Which tiles the products of few rows run with, and for how many rows they are used.

Measured on an H100 (triton 3.6, November 2026) as whole decode steps of random weights in a graph,
256 tokens of context, rotation still on its own, ms; tiles are block_m x block_n x block_k, stages,
warps:

| step              | separate kernels | tiles: ms                                                 |
|-------------------|------------------|-----------------------------------------------------------|
| llama-8b, B = 1   | 6.23             | 1x8x512 3 4: 5.67; 1x8x512 1 4: 5.99; 1x4x1024 1 4: 5.84; |
|                   |                  | 16x16x256 4 4: 6.40                                       |
| llama-8b, B = 8   | 6.39             | 16x16x256 4 2: 6.26; 16x16x256 4 4: 6.46                  |
| llama-135m, B = 1 | 0.97             | 1x8x512 3 4: 0.77                                         |

Programs that start early (programmatic dependent launch) made 5.72 of 5.67 and 7.28 of 6.46 ms:
probably they settle where the kernel before them leaves room, and no longer evenly over the SMs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class FewRowTiles:
    """Compile-time settings of one product.

    Attributes:
        block_m: Rows of x per program; 1 multiplies without tensor cores.
        block_n: Weight rows per program (in a gated product of gate, and as many of up): a
            power of two.
        block_k: Entries of K per round.
        num_stages: Rounds whose loads are in flight.
        num_warps: Warps per program.
    """

    block_m: int
    block_n: int
    block_k: int
    num_stages: int = 4
    num_warps: int = 4


MAX_FUSED_ROWS = 8
"""Rows up to which a whole decode step was measured to be faster with these kernels."""


def beats_library(num_rows: int, weight: torch.Tensor) -> bool:
    """Whether a plain product of so many rows is faster here than by cuBLAS."""
    return num_rows <= MAX_FUSED_ROWS and weight.dtype.itemsize == 2


def tiles_for(kind: str, x: torch.Tensor, weight: torch.Tensor) -> FewRowTiles:
    """Tiles of one product of `kind` "plain", "normed", "qkv", "gated" or "adding".

    So far all kinds and shapes take the same: `python benchmarks/bench_kernels.py --sweep-few-rows`
    prints what each would like best.
    """
    is_wide = x.dtype.itemsize == 4  # no tensor cores: smaller tiles keep registers free
    if x.shape[0] == 1:
        return FewRowTiles(1, 16, 32, 2) if is_wide else FewRowTiles(1, 8, 512, 3)
    return FewRowTiles(16, 16, 32, 2) if is_wide else FewRowTiles(16, 16, 256, 4, num_warps=2)
