"""What one step contains, and what its completion means."""

from __future__ import annotations

import numpy as np
import pytest
from core_fakes import EOS_ID, Harness

from engine.core.request import Sequence, SequenceStatus


def _complete(harness: Harness, *token_ids: int):
    """Complete the oldest step with these sampled ids instead of the fake model's."""
    batch = harness.scheduler._in_flight[0].batch
    return harness.scheduler.complete(batch, np.array(token_ids, dtype=np.int64))


def _schedule(harness: Harness):
    batch = harness.scheduler.schedule()
    assert batch is not None
    return batch


def test_prompts_then_decodes() -> None:
    harness = Harness()
    harness.submit([1, 2, 3, 4, 5])
    harness.submit([6, 7])
    first = _schedule(harness)
    assert first.rows.tolist() == first.new_rows == [0, 1]
    assert first.num_scheduled_tokens.tolist() == [5, 2]
    assert first.num_computed_tokens.tolist() == [0, 0]
    assert first.is_sampling.tolist() == [True, True]
    assert [(u.row, u.start, len(u.block_ids)) for u in first.block_updates] == [
        (0, 0, 2),
        (1, 0, 1),
    ]
    assert (first.step_id, first.num_tokens, first.num_seqs) == (0, 7, 2)
    _complete(harness, 11, 12)
    second = _schedule(harness)
    assert second.num_scheduled_tokens.tolist() == [1, 1]
    assert second.num_computed_tokens.tolist() == [5, 2]
    assert (second.new_rows, second.block_updates, second.step_id) == ([], [], 1)


def test_a_long_prompt_runs_in_chunks_behind_the_decodes() -> None:
    harness = Harness(budget=4)
    harness.submit([1, 2])
    _schedule(harness)
    harness.submit([3] * 7)
    _complete(harness, 11)
    seen = []
    for _ in range(3):
        batch = _schedule(harness)
        seen.append(
            (
                batch.rows.tolist(),
                batch.num_scheduled_tokens.tolist(),
                batch.num_computed_tokens.tolist(),
                batch.is_sampling.tolist(),
            )
        )
        _complete(harness, 11, 12)
    assert seen == [
        ([0, 1], [1, 3], [2, 0], [True, False]),
        ([0, 1], [1, 3], [3, 3], [True, False]),
        ([0, 1], [1, 1], [4, 6], [True, True]),
    ]


def test_one_token_sequences_come_first_in_a_batch() -> None:
    harness = Harness()
    harness.submit([1, 2, 3])
    harness.submit([4])
    batch = _schedule(harness)
    assert batch.rows.tolist() == [1, 0]
    assert batch.num_scheduled_tokens.tolist() == [1, 3]


def test_sequences_are_served_in_order_of_admission_whatever_their_row() -> None:
    harness = Harness(max_num_seqs=3)
    first, second, last = (harness.submit([token]).sequences[0] for token in (1, 2, 3))
    _schedule(harness)
    harness.scheduler.finish(first, "abort")
    heir = harness.submit([4]).sequences[0]
    _schedule(harness)
    harness.scheduler.finish(last, "abort")
    assert (second.row, heir.row) == (1, 0)
    assert _schedule(harness).rows.tolist() == [1, 0]


def test_only_new_blocks_are_reported() -> None:
    harness = Harness(block_size=4)
    request = harness.submit([1, 2, 3], max_tokens=8)
    updates = []
    for _ in range(7):
        updates.append([(u.start, len(u.block_ids)) for u in _schedule(harness).block_updates])
        _complete(harness, 11)
    assert updates == [[(0, 1)], [], [(1, 1)], [], [], [], [(2, 1)]]
    row = request.sequences[0].row
    block_ids = harness.scheduler.block_tables.block_ids(row)
    assert block_ids == list(range(block_ids[0], block_ids[0] + 3)), "consecutive when alone"


def test_steps_are_scheduled_before_earlier_tokens_are_known() -> None:
    harness = Harness()
    seq = harness.submit([1, 2], max_tokens=8).sequences[0]
    table = harness.scheduler.table
    for _ in range(3):
        _schedule(harness)
    assert harness.scheduler.num_steps_in_flight == 3
    assert table.token_ids[0, :5].tolist() == [1, 2, -1, -1, -1]
    assert (table.num_tokens[0], table.num_in_flight[0]) == (5, 3)
    _complete(harness, 11)
    assert table.token_ids[0, :5].tolist() == [1, 2, 11, -1, -1]
    assert harness.scheduler.output_tokens(seq) == [11]
    assert seq.output_token_ids == [], "nobody pays for lists nobody reads"


def test_nothing_is_scheduled_past_the_last_token() -> None:
    harness = Harness()
    seq = harness.submit([1, 2], max_tokens=2).sequences[0]
    _schedule(harness)
    _schedule(harness)
    assert harness.scheduler.schedule() is None
    assert not harness.scheduler.must_drain
    assert not _complete(harness, 11).finished
    done = _complete(harness, 12)
    assert done.finished == [(seq, 0)]
    assert (seq.finish_reason, seq.stop_reason, seq.output_token_ids) == ("length", None, [11, 12])
    assert not harness.scheduler.has_unfinished


def test_a_host_synced_sequence_waits_for_its_own_output() -> None:
    harness = Harness()
    harness.submit([1], needs_host_sync=True)
    harness.submit([2])
    assert _schedule(harness).rows.tolist() == [0, 1]
    assert _schedule(harness).rows.tolist() == [1]
    _complete(harness, 11, 12)
    assert _schedule(harness).rows.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("options", "token_id", "reason", "stop_reason"),
    [
        ({}, EOS_ID, "stop", None),
        ({"stop_token_ids": [9]}, 9, "stop", 9),
        ({"stop_token_ids": [9]}, EOS_ID, "stop", None),
        ({"stop_token_ids": [EOS_ID]}, EOS_ID, "stop", EOS_ID),
        ({"max_tokens": 1}, 9, "length", None),
        ({"max_tokens": 1}, EOS_ID, "stop", None),
        ({"min_tokens": 1, "max_tokens": 5}, EOS_ID, "stop", None),
    ],
)
def test_why_a_sequence_ends(
    options: dict, token_id: int, reason: str, stop_reason: int | None
) -> None:
    harness = Harness()
    seq = harness.submit([1, 2], **options).sequences[0]
    _schedule(harness)
    done = _complete(harness, token_id)
    assert done.finished == [(seq, 0)]
    assert (seq.finish_reason, seq.stop_reason) == (reason, stop_reason)
    assert (seq.output_token_ids, seq.row) == ([token_id], -1)


@pytest.mark.parametrize(
    "options", [{"eos": False}, {"min_tokens": 2}, {"stop_token_ids": [9], "eos": False}]
)
def test_what_does_not_end_a_sequence(options: dict) -> None:
    harness = Harness()
    harness.submit([1, 2], **options)
    _schedule(harness)
    assert not _complete(harness, EOS_ID).finished


def test_results_of_ended_sequences_are_dropped() -> None:
    """Also when their row has a new owner by then."""
    harness = Harness(max_num_seqs=2)
    gone = harness.submit([1, 2]).sequences[0]
    stays = harness.submit([3, 4]).sequences[0]
    _schedule(harness)
    _schedule(harness)
    harness.scheduler.finish(gone, "abort")
    heir = harness.submit([5, 6], wants_tokens=True).sequences[0]
    _schedule(harness)
    assert heir.row == 0
    first, second = (_complete(harness, EOS_ID, 12 + step) for step in range(2))
    assert (first.num_new_tokens, first.finished, first.watched) == (1, [], [])
    assert (second.num_new_tokens, second.finished, second.watched) == (1, [], [])
    assert harness.scheduler.output_tokens(stays) == [12, 13]
    assert harness.scheduler.output_tokens(heir) == []
    third = _complete(harness, 31, 30)  # decodes come first: the one that stays, then the heir
    assert (third.watched, third.first_tokens) == ([(heir, 0)], [heir])
    assert harness.scheduler.output_tokens(heir) == [30]
    assert (gone.output_token_ids, gone.finish_reason) == ([], "abort")


def test_a_step_after_the_stop_token_changes_nothing() -> None:
    harness = Harness()
    seq = harness.submit([1, 2]).sequences[0]
    _schedule(harness)
    _schedule(harness)
    _complete(harness, EOS_ID)
    assert not harness.scheduler.has_unfinished
    assert harness.scheduler.num_steps_in_flight == 1
    assert _complete(harness, 7).num_new_tokens == 0
    assert seq.output_token_ids == [EOS_ID]


def test_watched_sequences_are_listed_and_no_others() -> None:
    harness = Harness()
    silent = harness.submit([1]).sequences[0]
    watched = [
        harness.submit([2], wants_tokens=True).sequences[0],
        harness.submit([3], stop="x").sequences[0],
        harness.submit([4], logprobs=0).sequences[0],
    ]
    _schedule(harness)
    done = _complete(harness, 11, 12, 13, 14)
    assert [seq for seq, _ in done.watched] == watched
    assert done.num_new_tokens == 4
    _schedule(harness)
    done = _complete(harness, 21, 22, 23, 24)
    assert [seq for seq, _ in done.watched] == watched
    assert harness.scheduler.output_tokens(silent) == [11, 21]
    assert harness.scheduler.output_tokens(silent, 1) == [21]


def test_the_first_token_is_announced_once() -> None:
    harness = Harness(budget=2)
    seq = harness.submit([1, 2, 3]).sequences[0]
    announced = []
    for token_id in (-1, 11, 12):
        _schedule(harness)
        announced.append(_complete(harness, token_id).first_tokens)
    assert announced == [[], [seq], []]
    assert seq.request.metrics.first_scheduled_s is not None


def test_finish_works_in_every_state_and_twice() -> None:
    harness = Harness(max_num_seqs=1, caching=False)
    running = harness.submit([1] * 9).sequences[0]
    waiting = harness.submit([2] * 9).sequences[0]
    _schedule(harness)
    for _ in range(2):
        for seq in (waiting, running):
            harness.scheduler.finish(seq, "stop", "\n")
    for seq in (waiting, running):
        assert (seq.status, seq.finish_reason) == (SequenceStatus.FINISHED, "stop")
        assert (seq.stop_reason, seq.row) == ("\n", -1)
    assert not harness.scheduler.has_unfinished
    assert harness.scheduler.stats().blocks_used == 0
    assert harness.scheduler.schedule() is None
    _complete(harness, 5)
    harness.scheduler.finish(running, "length")
    assert running.finish_reason == "stop", "the first end counts"


def test_steps_complete_in_order() -> None:
    harness = Harness()
    harness.submit([1])
    _schedule(harness)
    second = _schedule(harness)
    with pytest.raises(AssertionError, match="order"):
        harness.scheduler.complete(second, np.array([5]))


def test_sequences_of_a_step_in_flight() -> None:
    harness = Harness()
    gone, stays = (harness.submit([token]).sequences[0] for token in (1, 2))
    batch = _schedule(harness)
    harness.scheduler.finish(gone, "abort")
    assert harness.scheduler.sequences_with_rows(batch) == [(stays, 1)]
    _complete(harness, 11, 12)
    assert harness.scheduler.sequences_with_rows(batch) == []


def test_an_abandoned_step_names_its_sequences_and_empties_the_cache() -> None:
    harness = Harness(max_num_seqs=2, block_size=2)
    ran = [harness.submit([token] * 5).sequences[0] for token in (1, 2)]
    waits = harness.submit([1] * 5).sequences[0]
    _schedule(harness)
    _schedule(harness)
    assert harness.scheduler.stats().blocks_cached == 4
    assert harness.scheduler.abandon_steps() == ran
    stats = harness.scheduler.stats()
    assert (stats.num_steps_in_flight, stats.blocks_cached, stats.num_running) == (0, 0, 2)
    for seq in ran:
        harness.scheduler.finish(seq, "abort")
    assert _schedule(harness).num_tokens == 5
    assert waits.num_cached_tokens == 0


def test_stats_count() -> None:
    harness = Harness(max_num_seqs=2, block_size=2)
    for _ in range(3):
        harness.submit([1, 2, 3, 4, 5])
    _schedule(harness)
    stats = harness.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.peak_running, stats.steps) == (2, 1, 2, 1)
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (10, 4)
    assert (stats.blocks_used, stats.blocks_cached, stats.blocks_total) == (4, 2, 63)
    assert (stats.preemptions, stats.num_steps_in_flight) == (0, 1)


def test_batches_keep_their_arrays() -> None:
    """A runner still reads them while later steps are scheduled and completed."""
    harness = Harness()
    harness.submit([1, 2, 3])
    batches = [_schedule(harness) for _ in range(3)]
    kept = [
        (b.rows.copy(), b.num_scheduled_tokens.copy(), b.num_computed_tokens.copy())
        for b in batches
    ]
    _complete(harness, 11)
    harness.scheduler.finish(_only_running(harness), "abort")
    harness.submit([4] * 9)
    _schedule(harness)
    for batch, arrays in zip(batches, kept, strict=True):
        now = (batch.rows, batch.num_scheduled_tokens, batch.num_computed_tokens)
        assert all(np.array_equal(a, b) for a, b in zip(now, arrays, strict=True))


def _only_running(harness: Harness) -> Sequence:
    (seq,) = [seq for seq in harness.scheduler.table.sequences if seq is not None]
    return seq
