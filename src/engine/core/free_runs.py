"""`FreeRuns`: a set of block ids that hands out consecutive ones where it can."""

from __future__ import annotations


class FreeRuns:
    """Unused block ids, kept as maximal runs of consecutive ids.

    Why runs: on a CPU, attention reads a run of consecutive blocks as a view instead of gathering
    it. Blocks that continue a sequence's last one are preferred; a sequence that cannot go on, or
    starts, is put into the middle of a long run, which leaves room to grow for the run's
    neighbour before and for itself after it.

    Runs are found by either end, as in a boundary-tag allocator (Knuth, The Art of Computer
    Programming 1, 2.5), and by the power of two of their length, as in a segregated free list, so
    `add` and each run of `take` cost O(1). Fragmentation costs speed on a CPU only, never
    capacity.

    Args:
        start: Smallest id, free at first like all others.
        end: One past the largest id.
    """

    def __init__(self, start: int, end: int) -> None:
        self._length_at: dict[int, int] = {}
        self._start_before: dict[int, int] = {}
        # Sizes 2^k … 2^(k+1)-1 are in bin k; a dict is an ordered set.
        self._bins: list[dict[int, None]] = [{} for _ in range((end - start).bit_length())]
        self._filled_bins = 0
        self._num_ids = 0
        self._insert(start, end - start)

    def __len__(self) -> int:
        return self._num_ids

    def add(self, block_id: int) -> None:
        """Put one id back; it joins the runs that end before or start after it."""
        start, length = block_id, 1
        if block_id in self._start_before:
            start = self._start_before[block_id]
            length += self._remove(start)
        if block_id + 1 in self._length_at:
            length += self._remove(block_id + 1)
        self._insert(start, length)

    def take(self, count: int, *, after: int) -> list[int]:
        """Remove and return `count` ids; at most `len(self)`.

        Args:
            count: Ids wanted.
            after: Id that the first one should follow; -1 for no wish.
        """
        taken: list[int] = []
        while len(taken) < count:
            missing = count - len(taken)
            if after + 1 in self._length_at:
                start = after + 1
                offset = 0
            else:
                # popitem and not reversed(): only the former stays O(1) after many deletions.
                start, _none = self._bins[self._filled_bins.bit_length() - 1].popitem()
                offset = max(0, self._length_at[start] - missing) // 2
            length = self._remove(start)
            end = min(start + length, start + offset + missing)
            self._insert(start, offset)
            self._insert(end, start + length - end)
            taken += range(start + offset, end)
            after = end - 1
        return taken

    def _insert(self, start: int, length: int) -> None:
        if length == 0:
            return
        size_class = length.bit_length() - 1
        self._length_at[start] = length
        self._start_before[start + length] = start
        self._bins[size_class][start] = None
        self._filled_bins |= 1 << size_class
        self._num_ids += length

    def _remove(self, start: int) -> int:
        length = self._length_at.pop(start)
        size_class = length.bit_length() - 1
        del self._start_before[start + length]
        self._bins[size_class].pop(start, None)
        if not self._bins[size_class]:
            self._filled_bins &= ~(1 << size_class)
        self._num_ids -= length
        return length
