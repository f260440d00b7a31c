"""How many steps are queued, and how the wait for them is spent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engine import launch_ahead
from engine.launch_ahead import LaunchAhead


class Clock:
    """A clock that `sleep` moves on, always `late_s` too far."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.late_s = 50e-6
        self.sleeps: list[float] = []

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now_s += seconds + self.late_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    fake: Any = SimpleNamespace(perf_counter=clock.perf_counter, sleep=clock.sleep)
    monkeypatch.setattr(launch_ahead, "time", fake)
    return clock


class Step:
    """Done at a given time."""

    def __init__(self, clock: Clock, done_s: float) -> None:
        self._clock, self._done_s = clock, done_s

    @property
    def is_done(self) -> bool:
        return self._clock.now_s >= self._done_s


def run_steps(ahead: LaunchAhead, clock: Clock, step_s: float, num_steps: int = 200) -> float:
    """A loop that keeps `depth` steps of `step_s` queued; returns the device's share of time."""
    start_s, noted = clock.now_s, 0
    ends: list[float] = []
    ahead.begin()
    while noted < num_steps:
        while len(ends) < ahead.depth:
            ends.append(max(clock.now_s, ends[-1] if ends else 0.0) + step_s)
        ahead.wait(Step(clock, ends[0]), len(ends))
        done = sum(end <= clock.now_s for end in ends)
        ends = ends[done:]
        ahead.note_done(done, is_queue_empty=not ends)
        noted += done
    return noted * step_s / (clock.now_s - start_s)


def test_a_cpu_has_one_step(clock: Clock) -> None:
    ahead = LaunchAhead(1)
    assert ahead.depth == 1
    ahead.wait(Step(clock, 0.0), 1)
    assert not clock.sleeps


def test_a_quiet_process_queues_two_long_steps(clock: Clock) -> None:
    ahead = LaunchAhead(16)
    run_steps(ahead, clock, 6e-3)
    assert ahead.depth == 2


def test_short_steps_are_queued_deeper(clock: Clock) -> None:
    ahead = LaunchAhead(16)
    run_steps(ahead, clock, 0.3e-3)
    assert 3 <= ahead.depth <= 4


def test_late_wake_ups_deepen_the_queue_and_are_forgotten(clock: Clock) -> None:
    ahead = LaunchAhead(16)
    run_steps(ahead, clock, 2e-3)
    assert ahead.depth == 2
    clock.late_s = 5e-3
    share = run_steps(ahead, clock, 2e-3)
    assert ahead.depth * 2e-3 > 5e-3 + 2e-3, "the queue must outlast the wait for the GIL"
    assert share > 0.9
    clock.late_s = 50e-6
    run_steps(ahead, clock, 2e-3)
    assert ahead.depth == 2


def test_late_wake_ups_are_not_taken_for_long_steps(clock: Clock) -> None:
    """The device is idle at first, and the time between results is the host's."""
    ahead = LaunchAhead(16)
    clock.late_s = 5e-3
    run_steps(ahead, clock, 0.5e-3, num_steps=60)
    assert run_steps(ahead, clock, 0.5e-3) > 0.9


def test_beside_a_busy_thread_it_comes_back_seldom_and_the_device_stays_busy(clock: Clock) -> None:
    ahead = LaunchAhead(16)
    clock.late_s = 5e-3
    run_steps(ahead, clock, 1.6e-3)
    clock.sleeps.clear()
    started_s = clock.now_s
    assert run_steps(ahead, clock, 1.6e-3) > 0.95
    assert len(clock.sleeps) < (clock.now_s - started_s) / 9e-3, "its turn and another"
    assert max(clock.sleeps) == pytest.approx(5e-3)


@pytest.mark.parametrize("late_s", [50e-6, 1e-3, 10e-3, 20e-3, 50e-3])
def test_it_rests_neither_alone_nor_beside_several(clock: Clock, late_s: float) -> None:
    ahead = LaunchAhead(32)
    clock.late_s = late_s
    run_steps(ahead, clock, 1.6e-3)
    clock.sleeps.clear()
    run_steps(ahead, clock, 1.6e-3)
    assert max(clock.sleeps) <= 2e-3


def test_it_does_not_rest_when_nothing_else_is_queued(clock: Clock) -> None:
    ahead = LaunchAhead(16)
    clock.late_s = 5e-3
    run_steps(ahead, clock, 1.6e-3)
    ahead.begin()
    clock.sleeps.clear()
    ahead.wait(Step(clock, clock.now_s + 1.6e-3), 1)
    assert max(clock.sleeps) <= 1.6e-3


def test_the_queue_is_bounded(clock: Clock) -> None:
    ahead = LaunchAhead(16)
    clock.late_s = 50e-3
    run_steps(ahead, clock, 0.2e-3)
    assert ahead.depth == 16


def test_it_sleeps_through_a_long_step_and_wakes_in_time(clock: Clock) -> None:
    ahead = LaunchAhead(16)
    run_steps(ahead, clock, 10e-3, num_steps=50)
    clock.sleeps.clear()
    started_s = clock.now_s
    ahead.begin()
    ahead.wait(Step(clock, started_s + 10e-3), 1)
    assert clock.now_s - started_s < 10.3e-3
    assert len(clock.sleeps) < 15


def test_it_gives_up_on_a_step_that_never_ends(clock: Clock) -> None:
    ahead = LaunchAhead(16)
    ahead.begin()
    ahead.wait(Step(clock, clock.now_s + 1e9), 1)
    assert clock.now_s < 101.0


def test_a_step_with_none_behind_it_is_watched_for_a_while(clock: Clock) -> None:
    """The last stretch is not slept through, but neither is a step that takes far longer."""
    ahead = LaunchAhead(16)
    run_steps(ahead, clock, 1e-3)
    for num_queued in (1, 2):
        ahead.begin()
        clock.sleeps.clear()
        clock.late_s = 2e-6
        ahead.wait(Step(clock, clock.now_s + 1e-3), num_queued)
        assert (0 in clock.sleeps) == (num_queued == 1)
    ahead.begin()
    clock.sleeps.clear()
    ahead.wait(Step(clock, clock.now_s + 50e-3), 1)
    assert clock.sleeps.count(0) * clock.late_s < 0.6e-3
    assert sum(clock.sleeps) > 45e-3
