"""Who waits, who gives way, and who gives way to whom."""

from __future__ import annotations

from core_fakes import Harness

from engine.core.request import Sequence, SequenceStatus


def _one(harness: Harness, token: int, length: int, **options: object) -> Sequence:
    return harness.submit([token] * length, eos=False, **options).sequences[0]


def _statuses(*sequences: Sequence) -> str:
    return "".join(seq.status.value[0] for seq in sequences)


def test_the_newest_gives_way_when_blocks_run_out() -> None:
    harness = Harness(block_size=4, num_blocks=5)
    old, new = (_one(harness, token, 7, max_tokens=6) for token in (1, 2))
    harness.turn()
    harness.turn()
    assert _statuses(old, new) == "rr"
    harness.launch()  # both need a third block, none is free
    assert _statuses(old, new) == "rw"
    assert len(new.output_token_ids) == 2, "it keeps its tokens"
    assert (new.num_preemptions, new.request.metrics.num_preemptions) == (1, 1)
    assert harness.scheduler.stats().preemptions == 1
    harness.collect()
    harness.run()


def test_a_preempted_sequence_recomputes_its_tokens_as_a_prompt() -> None:
    harness = Harness(block_size=4, num_blocks=5, caching=False)
    _one(harness, 1, 7, max_tokens=6)
    new = _one(harness, 2, 7, max_tokens=6)
    while new.num_preemptions == 0 or new.status is SequenceStatus.WAITING:
        harness.turn()
    batch = harness.batches[-1]
    assert batch.new_rows == [new.row]
    assert (batch.num_scheduled_tokens.tolist(), batch.is_sampling.tolist()) == ([9], [True])
    harness.run()


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    harness = Harness(block_size=4, num_blocks=5)
    old = _one(harness, 1, 7, max_tokens=6)
    new = _one(harness, 2, 7, max_tokens=6)
    while new.num_preemptions == 0:
        harness.turn()
    harness.abort(old)
    batch = harness.launch()
    assert batch is not None
    # It had two full blocks; the other sequence took the later one.
    assert batch.num_computed_tokens.tolist() == [4]
    assert new.num_cached_tokens == 0, "what it wrote itself was no gift"
    harness.run()


def test_preemption_waits_until_no_step_is_in_flight() -> None:
    harness = Harness(block_size=4, num_blocks=5, steps_in_flight=4)
    old, new = (_one(harness, token, 7, max_tokens=6) for token in (1, 2))
    assert harness.launch() is not None
    assert harness.launch() is not None
    assert harness.launch() is None
    assert harness.scheduler.must_drain
    assert _statuses(old, new) == "rr"
    harness.collect()
    assert harness.launch() is None
    harness.collect()
    assert harness.launch() is not None
    assert not harness.scheduler.must_drain
    assert _statuses(old, new) == "rw"
    harness.run()


def test_draining_may_make_preemption_needless() -> None:
    harness = Harness(block_size=4, num_blocks=5, steps_in_flight=4)
    old = _one(harness, 1, 7, max_tokens=6)
    new = _one(harness, 2, 7, max_tokens=2)
    for _ in range(2):
        harness.launch()
    assert harness.launch() is None
    harness.collect()
    harness.collect()
    assert new.status is SequenceStatus.FINISHED
    assert harness.launch() is not None
    assert (old.num_preemptions, new.num_preemptions) == (0, 0)
    harness.run()


def test_the_preempted_return_before_those_who_came_later() -> None:
    harness = Harness(block_size=4, num_blocks=5)
    old = _one(harness, 1, 7, max_tokens=6)
    preempted = _one(harness, 2, 7, max_tokens=6)
    harness.turn()
    later = _one(harness, 3, 3, max_tokens=3)
    while old.status is not SequenceStatus.FINISHED:
        harness.turn()
        assert later.row == -1, "it would fit, but it would overtake"
    harness.turn()
    assert preempted.num_preemptions == 1
    assert _statuses(preempted, later) == "rr"
    harness.run()


def test_nobody_overtakes_a_request_that_lacks_blocks() -> None:
    harness = Harness(block_size=4, num_blocks=7)
    _one(harness, 1, 14, max_tokens=3)
    harness.turn()
    big = _one(harness, 2, 14, max_tokens=3)
    small = _one(harness, 3, 1, max_tokens=2)
    harness.turn()
    assert _statuses(big, small) == "ww"
    harness.run()


def test_some_blocks_are_left_for_the_running() -> None:
    """1 % of the blocks, so that an admission is not undone by the next step."""
    harness = Harness(block_size=1, num_blocks=201, max_model_len=200, budget=512)
    _one(harness, 1, 100, max_tokens=50)
    harness.turn()  # 100 blocks in use
    tight = _one(harness, 2, 98, max_tokens=2)  # 101 + 98 + 2 > 200
    harness.turn()
    assert tight.status is SequenceStatus.WAITING
    harness.abort(tight)
    fits = _one(harness, 3, 95, max_tokens=2)  # 102 + 95 + 2 <= 200
    harness.turn()
    assert fits.status is SequenceStatus.RUNNING
    harness.run()


def test_room_is_left_among_those_admitted_together() -> None:
    harness = Harness(block_size=1, num_blocks=201, max_model_len=200, budget=512)
    first = _one(harness, 1, 100, max_tokens=50)
    tight = _one(harness, 2, 99, max_tokens=2)  # 100 + 99 + 2 > 200
    harness.turn()
    assert _statuses(first, tight) == "rw"
    harness.run()


def test_smaller_priority_values_run_first() -> None:
    harness = Harness(max_num_seqs=1)
    sequences = [_one(harness, 1, 3, priority=p, max_tokens=2) for p in (1, 0, -1, 0)]
    harness.run()
    order = [harness.first_scheduled.index(seq) for seq in sequences]
    assert order == [3, 1, 0, 2]


def test_a_request_of_higher_priority_takes_a_row() -> None:
    harness = Harness(max_num_seqs=2, steps_in_flight=2)
    keeps = _one(harness, 1, 3, priority=1)
    loses = _one(harness, 2, 3, priority=1)
    harness.launch()
    urgent = _one(harness, 3, 3, priority=0)
    assert harness.launch() is None
    assert harness.scheduler.must_drain
    harness.collect()
    batch = harness.launch()
    assert batch is not None
    assert _statuses(keeps, loses, urgent) == "rwr"
    assert batch.num_seqs == 2
    harness.run()
    assert (keeps.num_preemptions, loses.num_preemptions, urgent.num_preemptions) == (0, 1, 0)


def test_a_request_of_higher_priority_takes_blocks_from_as_few_as_possible() -> None:
    harness = Harness(max_num_seqs=8, block_size=4, num_blocks=10)
    sequences = [_one(harness, token, 5, priority=2) for token in range(1, 5)]
    harness.turn()
    urgent = _one(harness, 9, 16, priority=1)
    harness.turn()
    assert _statuses(*sequences, urgent) == "rrwwr"
    harness.run()


def test_growth_of_the_running_counts_before_the_urgent_one_s_need() -> None:
    harness = Harness(max_num_seqs=8, block_size=4, num_blocks=9)
    _one(harness, 1, 8, priority=0, max_tokens=3)  # takes a third block in the next step
    low = _one(harness, 2, 3, priority=1)
    harness.turn()
    urgent = _one(harness, 3, 20, priority=0, max_tokens=2)  # just the 5 blocks that are free
    harness.launch()
    assert _statuses(low, urgent) == "wr"
    harness.run()


def test_equal_priority_takes_nothing() -> None:
    harness = Harness(max_num_seqs=1)
    runs, waits = _one(harness, 1, 3), _one(harness, 2, 3)
    for _ in range(3):
        harness.turn()
    assert _statuses(runs, waits) == "rw"
    harness.run()
    assert runs.num_preemptions == 0


def test_nobody_is_preempted_in_vain() -> None:
    """The urgent request would not fit even then: a sequence of its own class has the blocks."""
    harness = Harness(max_num_seqs=8, block_size=4, num_blocks=9)
    _one(harness, 1, 16, priority=0, max_tokens=4)
    low = _one(harness, 2, 5, priority=1, max_tokens=3)
    harness.turn()
    urgent = _one(harness, 3, 20, priority=0)
    harness.turn()
    assert _statuses(low, urgent) == "rw"
    harness.run()
    assert low.num_preemptions == 0


def test_shared_blocks_do_not_count_as_room() -> None:
    """Two sequences of low priority share their prompt with one of the urgent one's class."""
    harness = Harness(max_num_seqs=8, block_size=4, num_blocks=8)
    _one(harness, 1, 17, priority=0, max_tokens=2)  # 5 blocks, 4 of them shared
    low = _one(harness, 1, 18, priority=1, max_tokens=2)  # 1 block of its own
    harness.turn()
    assert harness.scheduler.stats().blocks_used == 6
    urgent = _one(harness, 3, 12, priority=0, max_tokens=2)  # 3 blocks: 1 free + 1 is not enough
    harness.launch()
    assert _statuses(low, urgent) == "rw"
    harness.run()


def test_blocks_that_the_urgent_one_shares_are_no_room() -> None:
    """The victim's blocks stay in use: the urgent request begins with the same tokens."""
    harness = Harness(max_num_seqs=8, block_size=4, num_blocks=8)
    _one(harness, 1, 12, priority=0, max_tokens=4)  # 4 blocks in the end
    low = _one(harness, 2, 9, priority=1, max_tokens=4)  # 3 blocks, 2 of them full
    harness.turn()
    urgent = _one(harness, 2, 13, priority=0, max_tokens=2)  # 2 shared, 2 more: 1 is there
    harness.launch()
    assert _statuses(low, urgent) == "rw"
    harness.run()


def test_a_full_budget_preempts_nobody() -> None:
    harness = Harness(max_num_seqs=2, budget=2)
    low = [_one(harness, token, 1, priority=1) for token in (1, 2)]
    harness.turn()
    urgent = _one(harness, 3, 3, priority=0, max_tokens=1)
    harness.turn()
    assert _statuses(*low, urgent) == "rrw"
    harness.run()


def test_priorities_do_not_take_turns() -> None:
    """Each urgent request costs the low one at most one preemption."""
    harness = Harness(max_num_seqs=1)
    low = _one(harness, 1, 3, priority=5, max_tokens=6)
    for number in range(4):
        harness.turn()
        _one(harness, 2 + number, 3, priority=0, max_tokens=3)
    harness.run()
    assert low.num_preemptions <= 4
    assert harness.scheduler.stats().preemptions == low.num_preemptions


def test_a_preempted_prompt_reports_its_log_probabilities_anew() -> None:
    harness = Harness(max_num_seqs=1, budget=4)
    low = _one(harness, 1, 9, priority=1, prompt_logprobs=0)
    harness.launch()
    harness.collect()
    harness.abort(low)
    flags = [bool(batch.needs_prompt_logprobs.any()) for batch in harness.batches]
    assert flags == [True]
    harness = Harness(block_size=4, num_blocks=5)
    old = _one(harness, 1, 7, max_tokens=6)
    new = _one(harness, 2, 7, max_tokens=6, prompt_logprobs=0)
    while old.status is not SequenceStatus.FINISHED:
        harness.turn()
    harness.turn()
    assert (new.num_preemptions, new.status) == (1, SequenceStatus.RUNNING)
    assert not harness.batches[-1].needs_prompt_logprobs.any(), "all were reported before"
    harness.run()
