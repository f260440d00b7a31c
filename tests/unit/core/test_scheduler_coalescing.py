"""A full house lets new sequences in by groups, and never keeps them out for long."""

from __future__ import annotations

from core_fakes import Harness

from engine.core.batch import ScheduledBatch


def full_house(num_waiting: int, coalesced_rows: int = 3) -> Harness:
    """Eight rows taken by long answers, and others waiting."""
    harness = Harness(max_num_seqs=8, coalesced_rows=coalesced_rows, num_blocks=400)
    for index in range(8 + num_waiting):
        harness.submit([1 + index], max_tokens=60)
    harness.turn()
    assert harness.scheduler.num_running == 8
    return harness


def launch(harness: Harness) -> ScheduledBatch:
    batch = harness.launch()
    assert batch is not None
    harness.collect()
    return batch


def test_single_rows_stay_free_for_sixteen_steps() -> None:
    harness = full_house(num_waiting=5)
    harness.abort(harness.submitted[0])
    num_held = 0
    while not launch(harness).new_rows:
        num_held += 1
    assert num_held == 15  # the admission itself was the first of the sixteen steps


def test_enough_free_rows_are_filled_at_once() -> None:
    harness = full_house(num_waiting=5)
    for seq in harness.submitted[:3]:
        harness.abort(seq)
    assert len(launch(harness).new_rows) == 3


def test_nobody_waits_for_others_that_are_not_there() -> None:
    harness = full_house(num_waiting=1)
    harness.abort(harness.submitted[0])
    assert len(launch(harness).new_rows) == 1


def test_an_urgent_sequence_is_let_in_at_once() -> None:
    harness = full_house(num_waiting=5)
    harness.submit([99], max_tokens=5, priority=-1)
    harness.abort(harness.submitted[0])
    batch = launch(harness)
    (row,) = batch.new_rows
    seq = harness.scheduler.table.sequences[row]
    assert seq is not None
    assert seq.request.priority == -1


def test_without_coalescing_every_row_is_filled_at_once() -> None:
    harness = full_house(num_waiting=5, coalesced_rows=0)
    harness.abort(harness.submitted[0])
    assert len(launch(harness).new_rows) == 1
