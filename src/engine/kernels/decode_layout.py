"""How decode attention cuts its work, as numbers: see `decode_plan`, which does it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SplitLayout:
    """Constants of the plan.

    Attributes:
        num_columns: C, programs per KV head.
        tile: Keys per tile.
        min_tiles: Fewest tiles of a column that has work, but for `snap`.
        snap: Fewest tiles of a part, at most `min_tiles`; shorter sequences are never cut.
        max_parts: Most parts of a sequence's own keys.
        split: Keys per part where that must not depend on the batch, a multiple of `tile`; else 0.
    """

    num_columns: int
    tile: int
    min_tiles: int
    snap: int
    max_parts: int
    split: int = 0

    def num_fixed_parts(self, num_keys: int) -> int:
        """Parts of a sequence that sees `num_keys` keys, counted from a tile's border."""
        num_tiles = -(-num_keys // self.tile)
        return max(1, min(-(-num_tiles // (self.split // self.tile)), self.max_parts))

    def max_items(self, num_seqs: int) -> int:
        """A bound: every column cuts one sequence, or every sequence has all its parts."""
        return num_seqs * self.max_parts if self.split else num_seqs + self.num_columns

    def max_places(self, num_seqs: int) -> int:
        """A bound on the parts of sequences that have several."""
        return self.max_items(num_seqs) if self.split else 2 * self.num_columns


@dataclass(frozen=True)
class PrefixLayout:
    """Constants of the plan for groups.

    Attributes:
        num_programs: That share the groups' work.
        block_m: Rows per tile.
        tile: Keys per tile.
        min_tiles: Fewest tiles of keys in a part.
        max_parts: Most parts of a prefix.
    """

    num_programs: int
    block_m: int
    tile: int
    min_tiles: int
    max_parts: int
