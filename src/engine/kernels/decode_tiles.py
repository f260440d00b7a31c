"""Launch shapes of decode attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.kernels.decode_layout import SplitLayout
from engine.kernels.kv_cache import LIMITS

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


def decode_tiles(dtype: torch.dtype, head_dim: int, stored: torch.dtype, group: int) -> DecodeTiles:
    """Tiles for queries of a dtype, a head size, what the cache stores, and heads per KV head.

    Programs per processor are as many as its 227 KiB of shared memory and four times 16 Ki
    registers hold: those of a warp lie in one quarter.
    """
    if dtype == torch.float32:
        return DecodeTiles(32, 2, 4, 2)
    if head_dim > 128:
        return DecodeTiles(32, 3, 4, 2)
    if stored in LIMITS:
        # Twice the keys, for as many bytes: half the instructions that are spent per tile.
        return DecodeTiles(128, 2 if head_dim > 64 else 3, 4, 3, max_registers=168)
    if group > 16:
        # More rows than the tensor cores take at once; two warps' registers would not hold them.
        return DecodeTiles(64, 3, 4, 2 if head_dim > 64 else 3, max_registers=168)
    if head_dim > 64:
        return DecodeTiles(64, 2, 2, 4)
    return DecodeTiles(64, 2, 2, 6, max_registers=168)
