"""The scheduler of texts: every text runs once, within the budget, and nobody waits for long."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core.pooling_request import PoolingBatch, PoolingRequest
from engine.core.pooling_scheduler import PoolingScheduler


def request(lens: list[int], second_starts: list[int] | None = None) -> PoolingRequest:
    """Token ids that say where they stand: 1000 * text + position."""
    ids = [1000 * text + place for text, length in enumerate(lens) for place in range(length)]
    return PoolingRequest(
        token_ids=np.array(ids, dtype=np.int32),
        lens=np.array(lens, dtype=np.int32),
        second_starts=None if second_starts is None else np.array(second_starts, dtype=np.int32),
    )


def run_all(scheduler: PoolingScheduler, depth: int = 1) -> list[PoolingBatch]:
    batches: list[PoolingBatch] = []
    in_flight: list[PoolingBatch] = []
    while scheduler.has_unfinished:
        batch = scheduler.schedule()
        if batch is not None:
            batches.append(batch)
            in_flight.append(batch)
        if len(in_flight) == depth or batch is None:
            scheduler.complete(in_flight.pop(0))
    return batches


@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=30), min_size=1, max_size=6),
    st.integers(1, 64),
    st.integers(1, 8),
    st.integers(1, 2),
)
def test_every_text_runs_once_within_the_limits(
    lens: list[list[int]], budget: int, max_texts: int, depth: int
) -> None:
    scheduler = PoolingScheduler(budget, max_texts)
    requests = [request(one) for one in lens]
    for one in requests:
        scheduler.add(one)
    seen: dict[PoolingRequest, list[int]] = {one: [] for one in requests}
    for batch in run_all(scheduler, depth):
        assert batch.num_tokens <= budget or batch.num_texts == 1
        assert batch.num_texts <= max_texts
        assert (np.diff(batch.lens) >= 0).all()
        texts = np.split(batch.token_ids, np.cumsum(batch.lens)[:-1])
        place = 0
        for run in batch.runs:
            for index in run.indices:
                row = texts[batch.places[place]]
                assert row.tolist() == run.request.tokens_of(int(index)).tolist()
                seen[run.request].append(int(index))
                place += 1
    for one, indices in seen.items():
        assert sorted(indices) == list(range(one.num_texts))
    stats = scheduler.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert 1 <= stats.peak_running <= max_texts * depth


def test_a_small_request_runs_in_the_next_step() -> None:
    scheduler = PoolingScheduler(100, 100)
    scheduler.add(request([10] * 1000))
    scheduler.schedule()
    small = request([10])
    scheduler.add(small)
    batch = scheduler.schedule()
    assert batch is not None
    assert small in [run.request for run in batch.runs]
    assert batch.num_tokens == 100


def test_a_long_text_is_not_starved() -> None:
    scheduler = PoolingScheduler(100, 100)
    for _ in range(4):
        scheduler.add(request([30] * 50))
    long = request([90])
    scheduler.add(long)
    for _ in range(6):
        scheduler.schedule()
    assert long.num_scheduled == 1


def test_removed_requests_run_no_more() -> None:
    scheduler = PoolingScheduler(10, 10)
    one, other = request([5] * 10), request([5] * 2)
    scheduler.add(one)
    scheduler.add(other)
    first = scheduler.schedule()
    scheduler.remove(one)
    rest = run_all_after(scheduler, first)
    assert all(run.request is other for batch in rest for run in batch.runs)


def run_all_after(scheduler: PoolingScheduler, batch: PoolingBatch | None) -> list[PoolingBatch]:
    assert batch is not None
    scheduler.complete(batch)
    return run_all(scheduler)


def test_abandoned_steps_name_their_requests_once() -> None:
    scheduler = PoolingScheduler(10, 10)
    one, other = request([5] * 4), request([5])
    scheduler.add(one)
    scheduler.schedule()
    scheduler.add(other)
    scheduler.schedule()
    assert scheduler.abandon_steps() == [one, other]
    assert scheduler.stats().num_steps_in_flight == 0


def test_second_texts_of_pairs() -> None:
    scheduler = PoolingScheduler(100, 100)
    scheduler.add(request([9, 4], second_starts=[6, 2]))
    scheduler.add(request([5]))
    batch = scheduler.schedule()
    assert batch is not None
    assert batch.lens.tolist() == [4, 5, 9]
    assert batch.second_starts.tolist() == [2, 5, 6]


def test_steps_complete_in_order() -> None:
    scheduler = PoolingScheduler(5, 10)
    scheduler.add(request([5, 5]))
    scheduler.schedule()
    second = scheduler.schedule()
    assert second is not None
    with pytest.raises(AssertionError, match="in the order"):
        scheduler.complete(second)
