"""`BlockPool`: who uses which KV block, and which block is given away next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from engine.core.free_runs import FreeRuns

PADDING_BLOCK_ID = 0
"""Never handed out: padding tokens may write there."""


class BlockPool:
    """Reference-counted KV blocks. All operations cost O(1) per block.

    ::

                 allocate                    release, last user
        fresh ─────────────► in use ────────────────────────────────► fresh
                              ▲   │  release, last user, and kept
                      acquire │   ▼
                               idle ── evicted, least recently used first ──► fresh

    *Idle* blocks have no user, but hold KV that the prefix cache can still find; they count as
    available and are evicted when fresh ones run out.

    Args:
        num_blocks: Blocks of the KV cache, `PADDING_BLOCK_ID` included.
        on_evict: Called with the id of each idle block whose contents are given up.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        self.num_usable_blocks = num_blocks - 1
        self._on_evict = on_evict
        self._ref_counts = [0] * num_blocks
        self._is_kept = bytearray(num_blocks)
        self._fresh = FreeRuns(PADDING_BLOCK_ID + 1, num_blocks)
        # Not a plain dict: finding its first key after many deletions is O(number of deletions).
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available_blocks(self) -> int:
        """Blocks without a user: what `allocate` can hand out."""
        return len(self._fresh) + len(self._idle)

    @property
    def num_used_blocks(self) -> int:
        """Blocks with at least one user."""
        return self.num_usable_blocks - self.num_available_blocks

    @property
    def num_idle_blocks(self) -> int:
        """Available blocks whose KV can still be reused."""
        return len(self._idle)

    def ref_count(self, block_id: int) -> int:
        """Sequences that use the block."""
        return self._ref_counts[block_id]

    def allocate(self, count: int, *, after: int = -1) -> list[int]:
        """Hand out `count` blocks with one user each, consecutive where possible.

        Args:
            count: At most `num_available_blocks`.
            after: Block id that they should follow; -1 for none.
        """
        assert count <= self.num_available_blocks, f"{count} blocks wanted, fewer are available"
        for _ in range(count - len(self._fresh)):
            block_id, _none = self._idle.popitem(last=False)
            self._is_kept[block_id] = False
            self._on_evict(block_id)
            self._fresh.add(block_id)
        block_ids = self._fresh.take(count, after=after)
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
        return block_ids

    def acquire(self, block_ids: Iterable[int]) -> None:
        """Add a user to each block; they are in use or idle."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._idle[block_id]
            self._ref_counts[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Take a user from each block.

        Blocks become idle in the order given, and are evicted in that order: give a sequence's
        last block first, since a prefix without its start is worth nothing.
        """
        for block_id in block_ids:
            count = self._ref_counts[block_id] - 1
            assert count >= 0, f"block {block_id} is released more often than acquired"
            self._ref_counts[block_id] = count
            if count == 0:
                if self._is_kept[block_id]:
                    self._idle[block_id] = None
                else:
                    self._fresh.add(block_id)

    def keep(self, block_id: int) -> None:
        """The KV of a block in use is worth keeping when its last user is gone."""
        self._is_kept[block_id] = True

    def forget_all(self) -> None:
        """Keep nothing: idle blocks become fresh, blocks in use will. Does not call `on_evict`."""
        self._is_kept = bytearray(len(self._is_kept))
        for block_id in self._idle:
            self._fresh.add(block_id)
        self._idle.clear()
