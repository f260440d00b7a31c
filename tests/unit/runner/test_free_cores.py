"""The number of CPU threads follows the cores that others leave free."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.runner import free_cores
from engine.runner.free_cores import CpuTimes, ThreadChooser


@pytest.fixture(autouse=True)
def always_time_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_cores, "_INTERVAL_S", 0.0)


def chooser_over(
    monkeypatch: pytest.MonkeyPatch, seconds: Iterator[tuple[float, float, float]], cores: int = 4
) -> tuple[ThreadChooser, list[int]]:
    """Seconds of CPU time per second of wall time: (others, engine thread, application)."""
    monkeypatch.setattr(free_cores, "default_num_threads", lambda: cores)
    totals = {"clock": 0.0, "busy": 0.0, "process": 0.0, "thread": 0.0}
    numbers: list[int] = []
    chooser = ThreadChooser(
        None, read_times=lambda: read(), count_others=lambda: 0, set_threads=numbers.append
    )

    def read() -> CpuTimes:
        others, thread, application = next(seconds)
        own = thread * chooser.num_threads + application
        totals["clock"] += 1.0
        totals["busy"] += others + own
        totals["process"] += own
        totals["thread"] += thread
        return CpuTimes(totals["clock"], totals["busy"], totals["process"], totals["thread"])

    chooser.start()
    return chooser, numbers


@pytest.mark.parametrize(
    ("others", "application", "expected"),
    [(0.0, 0.0, 4), (0.3, 0.0, 4), (1.0, 0.0, 3), (0.0, 1.0, 3), (2.0, 1.0, 1), (9.0, 9.0, 1)],
)
def test_threads_are_the_cores_left(
    monkeypatch: pytest.MonkeyPatch, others: float, application: float, expected: int
) -> None:
    chooser, numbers = chooser_over(monkeypatch, iter([(others, 0.9, application)] * 4))
    assert numbers == [4]
    for _ in range(3):
        chooser.adjust()
    assert chooser.num_threads == expected
    assert numbers == ([4] if expected == 4 else [4, expected])


def test_threads_come_back_when_the_others_go(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = [(0.0, 1.0, 0.0), (1.0, 0.6, 0.0), (1.0, 1.0, 0.0), (0.0, 1.0, 0.0)]
    chooser, numbers = chooser_over(monkeypatch, iter(loads), cores=2)
    for _ in loads[1:]:
        chooser.adjust()
    assert numbers == [2, 1, 2]


def test_an_idle_engine_counts_nobodys_time_as_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chooser, _ = chooser_over(monkeypatch, iter([(0.0, 0.0, 0.0), (1.0, 0.0, 0.0)]), cores=2)
    chooser.adjust()
    assert chooser.num_threads == 1


@pytest.mark.parametrize(("others", "expected"), [(0, 4), (1, 3), (3, 1), (50, 1)])
def test_the_first_guess_is_who_runs_now(
    monkeypatch: pytest.MonkeyPatch, others: int, expected: int
) -> None:
    monkeypatch.setattr(free_cores, "default_num_threads", lambda: 4)
    numbers: list[int] = []
    ThreadChooser(
        None,
        read_times=lambda: None,
        count_others=lambda: others,
        set_threads=numbers.append,
    ).start()
    assert numbers == [expected]


def test_a_number_that_was_asked_for_stays() -> None:
    numbers: list[int] = []

    def fail() -> CpuTimes:
        raise AssertionError("a fixed number needs no look")

    chooser = ThreadChooser(3, read_times=fail, set_threads=numbers.append)
    chooser.start()
    chooser.adjust()
    chooser.adjust()
    assert numbers == [3]


def test_without_proc_stat_the_number_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_cores, "default_num_threads", lambda: 4)
    chooser = ThreadChooser(
        None, read_times=lambda: None, count_others=lambda: 0, set_threads=lambda _: None
    )
    chooser.start()
    chooser.adjust()
    chooser.adjust()
    assert chooser.num_threads == 4


def test_the_system_is_read_where_it_tells() -> None:
    first = free_cores._read_times()
    if first is None:
        pytest.skip("no /proc/stat here")
    end_s = first.clock_s + 0.2
    while (second := free_cores._read_times()) is not None and second.clock_s < end_s:
        pass
    assert second is not None
    spent_s = second.thread_s - first.thread_s
    assert second.process_s - first.process_s >= spent_s - 0.01
    # The counters of the cores advance by ticks of 10 ms.
    assert second.busy_s - first.busy_s >= spent_s - 0.05
