"""When a list of requests goes over in pieces: clocks are given, and real engines are fed so."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from engine import RequestError, SamplingParams, hand_over
from engine.hand_over import HandOver


class Clocks:
    """Each request takes 50 µs of the thread's time and `times` as much of the wall's."""

    def __init__(self, times: float) -> None:
        self.cpu_s, self.times = 7.0, times

    def thread_time(self) -> float:
        return self.cpu_s

    def perf_counter(self) -> float:
        return 100.0 + self.cpu_s * self.times


def pieces_of(num_requests: int, times: float, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    clocks = Clocks(times)
    fake: Any = SimpleNamespace(perf_counter=clocks.perf_counter, thread_time=clocks.thread_time)
    monkeypatch.setattr(hand_over, "time", fake)
    watch, pieces, num_ready = HandOver(), [], 0
    for _ in range(num_requests):
        clocks.cpu_s += 50e-6
        num_ready += 1
        if watch.is_due(num_ready):
            pieces.append(num_ready)
            num_ready = 0
    return [*pieces, num_ready]


@pytest.mark.parametrize("times", [1.0, 1.15])
def test_a_list_goes_over_in_one_where_nobody_competes(times, monkeypatch):
    assert pieces_of(1000, times, monkeypatch) == [1000]


def test_beside_four_threads_the_first_piece_goes_soon_and_each_doubles_what_went(monkeypatch):
    pieces = pieces_of(1000, 5.0, monkeypatch)
    assert pieces[0] == 64  # 3.2 ms of work, 12.8 ms lost
    assert all(now >= sum(pieces[:place]) for place, now in enumerate(pieces[:-1]))
    assert len(pieces) <= 5
    assert sum(pieces) == 1000


def test_a_short_list_goes_over_in_one_whatever_it_took(monkeypatch):
    assert pieces_of(31, 1000.0, monkeypatch) == [31]


# -------------------------------------------------------------------- engines in both placements


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every list goes over in threes; what went."""
    seen: list[int] = []

    def is_due(_: HandOver, num_ready: int) -> bool:
        if num_ready == 3:
            seen.append(num_ready)
        return num_ready == 3

    monkeypatch.setattr(HandOver, "is_due", is_due)
    return seen


def test_pieces_change_no_answer(eng, gone, monkeypatch):
    prompts = [[5 + place, 6, 7] for place in range(8)]
    params = [SamplingParams(temperature=0.0, max_tokens=4 + place) for place in range(8)]
    found = eng.generate(prompts, params)
    assert gone == [3, 3]
    monkeypatch.undo()
    assert [out.prompt_token_ids for out in found] == prompts
    expected = eng.generate(prompts, params)
    assert [out.outputs[0].token_ids for out in found] == [
        out.outputs[0].token_ids for out in expected
    ]


def test_of_a_list_with_a_bad_prompt_nothing_goes_on(eng, gone):
    long = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    before = eng.stats().requests_aborted
    with pytest.raises(RequestError) as caught:
        eng.submit_many([[5, 6]] * 4 + [[-1]], long)
    assert caught.value.__notes__ == ["This was prompt 4 of 5."]
    assert gone == [3]
    end_s = time.monotonic() + 10
    while eng.stats().requests_aborted < before + 3 and time.monotonic() < end_s:
        time.sleep(0.01)
    stats = eng.stats()
    assert stats.requests_aborted == before + 3
    assert stats.running == stats.waiting == 0
