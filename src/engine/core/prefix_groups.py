"""`PrefixGroups`: which decoding sequences read the same leading KV blocks.

Their common prefix can be read from memory once per step, not once per sequence: shared-prefix
attention, also called cascade (Hydragen, Juravsky et al., arXiv 2402.05099). Chains over one system
prompt, questions over one document and the n answers of a request come in such groups.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from engine.core.batch import Int32Array, PrefixGroup
from engine.core.pieces import gathered, joined, pieces
from engine.core.state import IndexArray, SequenceTable

MAX_GROUPS = 16
MIN_MEMBERS = 4
MIN_BLOCKS = 8
"""Smaller groups and shorter prefixes save less than the extra items of the work list cost."""


class PrefixGroups:
    """Finds the groups of a batch, and keeps them while the same sequences decode.

    A sequence is in one group at most. Two sequences belong together when the same physical block
    stands at place `MIN_BLOCKS` - 1; the group then shares the longest run that all of them have.
    There is no tree: of several nested prefixes only the outermost is used.

    Args:
        table: For the block tables and lengths.
        block_size: Tokens per block.
    """

    def __init__(self, table: SequenceTable, block_size: int) -> None:
        self._table = table
        self._block_size = block_size
        self._found_for = b""
        self._groups: list[PrefixGroup] = []

    def find(self, rows: IndexArray, num_computed_tokens: Int32Array) -> list[PrefixGroup]:
        """Groups among decoding sequences, largest saving first, at most `MAX_GROUPS`.

        Args:
            rows: [B] state indices in the order of the batch.
            num_computed_tokens: [B] tokens whose KV exists before the step.
        """
        if len(rows) < MIN_MEMBERS:
            return []
        # The same rows of the same owners. Compared as bytes: unlike array operations that keeps
        # the GIL, whatever the length.
        found_for = rows.tobytes() + gathered(self._table.epoch, rows).tobytes()
        if found_for != self._found_for:
            self._found_for = found_for
            self._groups = self._find(rows, num_computed_tokens)
        return self._groups

    def _find(self, rows: IndexArray, num_computed_tokens: Int32Array) -> list[PrefixGroup]:
        # In pieces, which keep the GIL: a full house asks whenever somebody ends.
        parts = pieces(len(rows))
        num_full = joined([num_computed_tokens[one] // self._block_size for one in parts])
        candidates = joined(
            [np.flatnonzero(num_full[one] >= MIN_BLOCKS) + one.start for one in parts]
        )
        if len(candidates) < MIN_MEMBERS:
            return []
        keys = gathered(self._table.block_table[:, MIN_BLOCKS - 1], gathered(rows, candidates))
        groups = []
        for key, count in Counter(keys.tolist()).items():
            if count < MIN_MEMBERS:
                continue
            members = joined([candidates[one][keys[one] == key] for one in pieces(len(keys))])
            num_blocks = self._common_blocks(rows[members], int(num_full[members].min()))
            if num_blocks >= MIN_BLOCKS:
                groups.append(PrefixGroup(members.astype(np.int32), num_blocks))
        groups.sort(key=lambda group: -(len(group.members) - 1) * group.num_blocks)
        return groups[:MAX_GROUPS]

    def _common_blocks(self, rows: IndexArray, limit: int) -> int:
        """Leading blocks that all `rows` have in common, at most `limit`."""
        tables = self._table.block_table[rows, :limit]
        differs = (tables[1:] != tables[0]).any(axis=0)
        return int(differs.argmax()) if differs.any() else limit
