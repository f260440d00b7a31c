"""`StreamPacing`: how often streams are served, so that hundreds do not hold up the steps."""

from __future__ import annotations

import time
from collections.abc import Callable

_SHARE = 0.08
"""Of the time that passes, for streams: the engine thread's work on them and, where they can be
measured, what their readers do with a delta. Both hold the interpreter. 256 readers that were given
each token of a step of 3 ms made steps of 5 to 10 ms; with this share each of them gets some deltas
a second, of which none is late by more than the turn of all others, and a few still get each token.
"""
_LARGEST_DEBT_S = 20e-3
"""What a burst may take beyond the share and still is made up for, as when all streams begin."""
_SMOOTHING = 0.2


class StreamPacing:
    """An allowance of seconds that grows with time and is spent on deltas. Engine thread only.

    Args:
        readers: Seconds that readers have spent on deltas since the start, and how often, as far
            as measured. They are known only after the fact, so each delta is charged with what one
            took lately, and the difference is made up for when the readers are done.
    """

    def __init__(self, readers: Callable[[], tuple[float, int]]) -> None:
        self._readers = readers
        self._left_s = 0.0
        self._refilled_s = 0.0
        self._seen = (0.0, 0)
        self._charged_s = 0.0
        self._delta_s = 0.0

    def refill(self) -> float:
        """Grow by the time since the last call, and settle what readers took. Returns the time."""
        now_s = time.perf_counter()
        earned_s = _SHARE * (now_s - self._refilled_s)
        self._refilled_s = now_s
        seen_s, seen_count = self._seen
        self._seen = total_s, count = self._readers()
        if count > seen_count:
            earned_s -= total_s - seen_s - self._charged_s
            self._charged_s = 0.0
            mean_s = (total_s - seen_s) / (count - seen_count)
            self._delta_s += _SMOOTHING * (mean_s - self._delta_s)
        # A debt is made up for; what was not spent is gone.
        self._left_s = max(min(self._left_s, 0.0) + earned_s, -_LARGEST_DEBT_S)
        return now_s

    @property
    def may_go_on(self) -> bool:
        """Whether there is something left to spend. Each step serves one stream at least."""
        return self._left_s > 0.0

    def spend(self, since_s: float) -> float:
        """A delta was published, with work since `since_s`. Returns the time now."""
        now_s = time.perf_counter()
        self._left_s -= now_s - since_s + self._delta_s
        self._charged_s += self._delta_s
        return now_s
