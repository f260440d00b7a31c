"""`LaunchAhead`: how many steps to queue on the device, and how to wait for the oldest.

A queued step costs the requests that wait outside one more step of patience; a queue that runs dry
costs throughput. How long it must last depends on how late the engine thread wakes up: 0.1 ms in a
process that only waits, but up to the interpreter's switch interval of 5 ms beside a thread that
computes in Python. So both are measured, and

    depth = 1 + (spare + 1.5 x lateness of wake-ups + rest) / step time,   2 <= depth <= most

One step beyond what the wait takes is always queued. The thread sleeps while it waits, so that the
application's threads get the interpreter, and looks at the result's pinned memory when it wakes.

Each time that the interpreter changes hands nobody runs for some tenths of a millisecond, and the
thread that loses it pays as well. So beside a thread that computes, the engine's comes back less
often: it rests, as far as the queue outlasts that and the way back, and then does several steps'
work at once. Alone it does not rest.
"""

from __future__ import annotations

import math
import time
from typing import Protocol

_SPARE_S = 0.4e-3
"""Host work between two steps that the queue covers besides."""
_LATENESS_FACTOR = 1.5
_CONTENDED_S = 2e-3
"""Lateness of wake-ups from which on somebody is taken to compute in Python."""
_CROWDED_S = 8e-3
"""And from which on there are several: the way back is then too long and uncertain to rest."""
_REST_S = 5e-3
"""A second turn for the other, behind the one that it takes before it gives the interpreter up."""
_SHORTEST_SLEEP_S = 30e-6
_LONGEST_WATCH_S = 0.5e-3
"""Of a step with none behind it, as where masks depend on its tokens: a sleep ends 0.05 ms late."""
_WAKE_EARLY_S = 100e-6
_LONGEST_SLEEP_S = 2e-3
"""Bounds how late a step is noticed that ends sooner than expected."""
_GIVE_UP_S = 0.5
_SHORTEST_STEP_S = 50e-6
_SMOOTHING = 0.2
_LATENESS_DECAY = 0.95


class Pollable(Protocol):
    """A launched step that can be asked whether it has ended."""

    @property
    def is_done(self) -> bool:
        """True once its result can be read without waiting."""


class LaunchAhead:
    """Keeps the device busy with as short a queue as the process allows. Engine thread only.

    Args:
        max_steps: Steps launched before the oldest result is read, at most; 1 for devices whose
            steps have ended when they are launched.
    """

    def __init__(self, max_steps: int) -> None:
        self._max_steps = max_steps
        self._step_s = 2e-3
        self._lateness_s = 0.1e-3
        self._last_done_s = 0.0

    @property
    def depth(self) -> int:
        """Steps to have in flight now."""
        if self._max_steps <= 2:
            return self._max_steps
        wanted = 1 + math.ceil((self._cover_s + self._rest_s) / self._step_s)
        return min(max(wanted, 2), self._max_steps)

    @property
    def _cover_s(self) -> float:
        return _SPARE_S + _LATENESS_FACTOR * self._lateness_s

    @property
    def _rest_s(self) -> float:
        is_beside_one = _CONTENDED_S < self._lateness_s < _CROWDED_S
        return _REST_S if is_beside_one and self._max_steps > 2 else 0.0

    def begin(self) -> None:
        """The queue was empty until now: what comes is not measured against the past."""
        self._last_done_s = time.perf_counter()

    def wait(self, oldest: Pollable, num_queued: int) -> None:
        """Return soon after `oldest` is done, or after half a second: something may be wrong.

        Args:
            oldest: Of the launched steps that nobody has read.
            num_queued: How many these are.
        """
        started_s = time.perf_counter()
        queue_ends_s = self._last_done_s + num_queued * self._step_s
        rest_s = min(self._rest_s, queue_ends_s - started_s - self._cover_s)
        if rest_s > _SHORTEST_SLEEP_S:
            self._sleep(rest_s)
        while not oldest.is_done:
            now_s = time.perf_counter()
            if now_s - started_s > _GIVE_UP_S:
                return
            left_s = self._step_s - (now_s - self._last_done_s) - _WAKE_EARLY_S
            if num_queued == 1 and -_LONGEST_WATCH_S < left_s <= 0.0:
                time.sleep(0)  # the device will have nothing to do: look again and again
                continue
            self._sleep(min(max(left_s, _SHORTEST_SLEEP_S), _LONGEST_SLEEP_S))

    def _sleep(self, seconds: float) -> None:
        started_s = time.perf_counter()
        time.sleep(seconds)
        late_s = time.perf_counter() - started_s - seconds
        self._lateness_s = max(late_s, self._lateness_s * _LATENESS_DECAY)

    def note_done(self, num_steps: int, *, is_queue_empty: bool) -> None:
        """`num_steps` results have been read since the last call.

        Args:
            num_steps: At least one.
            is_queue_empty: Nothing launched is left: the device has waited for the host, and the
                time that passed says only that its steps take no longer.
        """
        now_s = time.perf_counter()
        taken_s = (now_s - self._last_done_s) / num_steps
        if is_queue_empty:
            self._step_s = min(self._step_s, taken_s)
        else:
            self._step_s += _SMOOTHING * (taken_s - self._step_s)
        self._step_s = max(self._step_s, _SHORTEST_STEP_S)
        self._last_done_s = now_s
