"""Whatever is submitted and aborted, whenever: the rules hold and the tokens are the same."""

from __future__ import annotations

import random

import hypothesis.strategies as st
from core_fakes import Harness, shared_prompt
from hypothesis import HealthCheck, event, given, settings

from engine.core.request import Sequence, SequenceStatus
from engine.errors import CapacityError, ContextOverflowError


@st.composite
def _setups(draw: st.DrawFn) -> dict[str, object]:
    """Mostly tight: room in the KV cache for one to four sequences."""
    block_size = draw(st.sampled_from([1, 2, 4, 8]))
    num_tokens = draw(st.one_of(st.integers(16, 60), st.just(200)))
    return {
        "max_num_seqs": draw(st.integers(1, 5)),
        "budget": draw(st.one_of(st.integers(1, 8), st.integers(1, 64))),
        "max_model_len": 40,
        "block_size": block_size,
        "num_blocks": num_tokens // block_size + 1,
        "caching": draw(st.booleans()),
        "steps_in_flight": draw(st.integers(1, 4)),
        "coalesced_rows": draw(st.sampled_from([0, 0, 2, 4])),
    }


_requests = st.fixed_dictionaries(
    {
        "family": st.integers(0, 1),
        "num_shared": st.integers(0, 18),
        "num_own": st.integers(1, 8),
        "own": st.integers(0, 2),
        "max_tokens": st.one_of(st.none(), st.integers(1, 16)),
        "n": st.sampled_from([1, 1, 1, 2, 3]),
        "priority": st.sampled_from([0, 0, 0, 1, -1]),
        "cache_salt": st.sampled_from([None, None, "", "mine"]),
        "needs_host_sync": st.sampled_from([False, False, True]),
        "min_tokens": st.sampled_from([0, 0, 1]),
        "stop_token_ids": st.sampled_from([None, [3], list(range(1, 12))]),
    }
)
_actions = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), _requests),
        st.tuples(st.just("submit"), _requests),
        st.tuples(st.just("turn"), st.integers(1, 6)),
        st.tuples(st.just("launch"), st.none()),
        st.tuples(st.just("collect"), st.none()),
        st.tuples(st.just("abort"), st.integers(0, 30)),
    ),
    min_size=5,
    max_size=40,
)


def _submit(harness: Harness, options: dict) -> None:
    options = dict(options)
    prompt = shared_prompt(
        options.pop("family"),
        options.pop("num_shared"),
        options.pop("num_own"),
        options.pop("own"),
    )
    try:
        harness.submit(prompt, **options)
    except (CapacityError, ContextOverflowError):
        event("refused")


def _play(harness: Harness, actions: list[tuple]) -> None:
    for name, value in actions:
        if name == "submit":
            _submit(harness, value)
        elif name == "turn":
            for _ in range(value):
                harness.turn()
        elif name == "launch":
            if harness.num_in_flight < harness.steps_in_flight:
                harness.launch()
        elif name == "collect":
            if harness.num_in_flight:
                harness.collect()
        elif harness.submitted:
            harness.abort(harness.submitted[value % len(harness.submitted)])


def _order(seq: Sequence) -> tuple[int, int]:
    return seq.request.priority, seq.arrival_index


def _turn_bound(harness: Harness) -> int:
    """A starving request would need more: every turn computes at least one token of work.

    A preemption repeats at most a whole sequence, and each is followed by an end before the same
    sequence can be preempted again, so sequences² × length bounds the tokens computed.
    """
    longest = harness.scheduler.table.max_model_len
    return (len(harness.submitted) + 1) ** 2 * longest * (harness.steps_in_flight + 1)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(setup=_setups(), actions=_actions)
def test_any_interleaving_gives_every_request_its_own_tokens(setup: dict, actions: list) -> None:
    harness = Harness(**setup)
    _play(harness, actions)
    harness.run(max_turns=_turn_bound(harness))
    stats = harness.scheduler.stats()
    event(f"preempted: {stats.preemptions > 0}")
    event(f"prefix hits: {stats.prefix_hit_tokens > 0}")
    event(f"drained: {harness.num_drains > 0}")
    assert stats.steps == len(harness.batches)
    assert stats.peak_running <= setup["max_num_seqs"]


def _long_run(seed: int) -> Harness:
    """Far more sequences than rows, more tokens than blocks: everything happens many times."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4, 8])
    harness = Harness(
        max_num_seqs=rng.choice([3, 6]),
        budget=rng.choice([1, 2, 7, 16, 64]),
        max_model_len=40,
        block_size=block_size,
        num_blocks=rng.choice([44, 64, 96]) // block_size + 1,
        caching=seed % 3 > 0,
        steps_in_flight=1 + seed % 4,
        coalesced_rows=seed % 3,
    )
    while len(harness.submitted) < 60:
        for _ in range(rng.randrange(6)):
            harness.submit(
                shared_prompt(
                    rng.randrange(2), rng.randrange(18), rng.randrange(1, 8), rng.randrange(3)
                ),
                max_tokens=rng.randrange(1, 15),
                n=rng.choice([1, 1, 2]),
                priority=rng.choice([0, 0, 1]),
                cache_salt=rng.choice([None, None, "mine"]),
                needs_host_sync=rng.random() < 0.1,
                min_tokens=rng.choice([0, 1]),
            )
        for _ in range(rng.randrange(8)):
            harness.turn()
        if harness.submitted and rng.random() < 0.2:
            harness.abort(rng.choice(harness.submitted))
    harness.run(max_turns=_turn_bound(harness))
    return harness


def test_long_random_runs_under_memory_pressure() -> None:
    num_schedules = num_preemptions = num_drains = num_hits = num_aborted = 0
    for seed in range(30):
        harness = _long_run(seed)
        stats = harness.scheduler.stats()
        num_schedules += stats.steps
        num_preemptions += stats.preemptions
        num_hits += stats.prefix_hit_tokens
        num_drains += harness.num_drains
        num_aborted += len(harness.aborted)
    # The runs are worth little if what they are for has hardly happened.
    assert num_schedules > 5000
    assert num_preemptions > 150
    assert num_drains > 150
    assert num_hits > 5000
    assert num_aborted > 50


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(setup=_setups(), requests=st.lists(_requests, min_size=2, max_size=8))
def test_first_come_first_served_within_a_priority(setup: dict, requests: list[dict]) -> None:
    harness = Harness(**setup)
    for options in requests:
        _submit(harness, options)
    harness.run(max_turns=_turn_bound(harness))
    assert harness.first_scheduled == sorted(harness.first_scheduled, key=_order)
    assert len(harness.first_scheduled) == len(harness.submitted)


@settings(max_examples=100, deadline=None)
@given(
    budget=st.integers(1, 64),
    steps_in_flight=st.integers(1, 4),
    num_shared=st.integers(1, 30),
    owns=st.lists(st.integers(1, 5), min_size=2, max_size=6),
)
def test_a_shared_prefix_is_computed_exactly_once(
    budget: int, steps_in_flight: int, num_shared: int, owns: list[int]
) -> None:
    """However it is cut into chunks, and without any luck of timing."""
    block_size = 4
    harness = Harness(
        max_num_seqs=6, budget=budget, num_blocks=200, steps_in_flight=steps_in_flight
    )
    requests = [
        harness.submit(shared_prompt(0, num_shared, own, 10 + index), max_tokens=1)
        for index, own in enumerate(owns)
    ]
    harness.run()
    prompts = [request.prompt_token_ids for request in requests]
    full_blocks = {
        tuple(prompt[:end])
        for prompt in prompts
        for end in range(block_size, len(prompt) + 1, block_size)
    }
    seen: set[tuple[int, ...]] = set()
    expected = 0
    for prompt in prompts:
        hits = 0
        while (hits + 1) * block_size < len(prompt) and tuple(
            prompt[: (hits + 1) * block_size]
        ) in seen:
            hits += 1
        expected += len(prompt) - hits * block_size
        seen |= {blocks for blocks in full_blocks if tuple(prompt[: len(blocks)]) == blocks}
    assert harness.device.num_computed_tokens == expected


@settings(max_examples=60, deadline=None)
@given(setup=_setups(), requests=st.lists(_requests, min_size=1, max_size=6), data=st.data())
def test_abandoned_steps_leave_no_trace(setup: dict, requests: list[dict], data: st.DataObject):
    """A failed step ends those who ran in it; the others get what they would have got."""
    harness = Harness(**setup)
    for options in requests:
        _submit(harness, options)
    for _ in range(data.draw(st.integers(0, 6))):
        harness.turn()
    if harness.num_in_flight < harness.steps_in_flight:
        harness.launch()
    for seq in harness.scheduler.abandon_steps():
        assert seq.status is SequenceStatus.RUNNING
        harness.abort(seq)
    while harness.num_in_flight:
        # The failed steps wrote nothing; only the mirror of tables goes on.
        harness.device.drop_oldest()
        harness.num_in_flight -= 1
    harness.run(max_turns=_turn_bound(harness))
