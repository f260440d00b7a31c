"""Guesses inside free text: the tokens are those that masks alone give, however many steps fly."""

from __future__ import annotations

import threading
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from constraint_cases import compiler, plain_ids, tokenizer
from core_fakes import FakeDevice, Harness
from hypothesis import HealthCheck, given, settings

from engine.constraints.compiler import CompiledConstraint
from engine.constraints.sequence import SequenceConstraint
from engine.core.batch import ScheduledBatch, StepOutput
from engine.core.constrained import waits_for_masks
from engine.core.output import OutputProcessor
from engine.core.request import Request
from engine.core.scheduler import Scheduler
from engine.loop import EngineLoop
from engine.outputs import RequestOutput
from engine.runner.token_masks import TokenMasks
from engine.sampling_params import SamplingParams
from engine.stats import Counters

NOTE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "minLength": 3, "maxLength": 30},
        "kind": {"enum": ["a", "bc", 7]},
        "code": {"type": "string", "pattern": "^[xyz]{2,6}$"},
        "rest": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
    },
    "required": ["text", "kind", "code", "rest"],
    "additionalProperties": False,
}
CONSTRAINTS: list[dict[str, Any]] = [
    {"json_schema": NOTE},
    {"json_schema": {"type": "string"}, "ignore_eos": True},
    {"regex": "[^.]{0,60}[.]"},
    {"grammar": "start: /(.|\\n)*/", "ignore_eos": True},
]
PROMPT = [5, 6, 7]


def logits(history: list[int], seed: int, wander: float) -> np.ndarray:
    """The fake model: noise for each token from the whole history, plain characters likelier."""
    digest = blake2b(np.array([seed, *history], np.int64).tobytes(), digest_size=8).digest()
    draw = np.random.default_rng(int.from_bytes(digest, "little"))
    values = draw.gumbel(size=compiler("bytes")._vocab_size)
    values[plain_ids(tokenizer("bytes"))] += wander
    return values


class Device(FakeDevice):
    """Takes the likeliest token of those that the masks allow when the step is launched."""

    def __init__(self, scheduler: Scheduler, wander: float, *sizes: Any) -> None:
        super().__init__(scheduler, *sizes)
        self._wander = wander
        self._masks = TokenMasks(
            scheduler.table.max_num_seqs, compiler("bytes")._vocab_size, is_pinned=False
        )
        self._mask_of: dict[tuple[int, int], np.ndarray] = {}
        self.num_open = self.num_ahead = 0

    def launch(self, batch: ScheduledBatch) -> None:
        super().launch(batch)
        table = self._scheduler.table
        self._masks.fill(batch, table)
        for row in batch.rows[batch.is_sampling].tolist():
            self._mask_of[batch.step_id, row] = self._masks.array[row].copy()
            self.num_open += bool(table.guesses[row])
            self.num_ahead += table.num_in_flight[row] > 1

    def note_inputs(self, row: int, ids: list[int]) -> None:
        """Tokens that the host has dropped since make way for others."""
        history, digests = self._history[row], self._digests[row]
        del history[len(ids) :]
        for position, token_id in enumerate(ids[: len(history)]):
            if token_id not in (-1, history[position]):
                del history[position:]
                break
        del digests[len(history) :]

    def next_token(self, batch: ScheduledBatch, row: int, history: list[int]) -> int:
        words = self._mask_of.pop((batch.step_id, row))
        values = logits(history, self._owner[row].request.seed, self._wander)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: len(values)]
        return int(np.where(bits == 1, values, -np.inf).argmax())


class GuessHarness(Harness):
    """The rules of `Harness` over constrained requests."""

    def __init__(self, wander: float, **setup: Any) -> None:
        super().__init__(**setup)
        size, count = setup["block_size"], setup["num_blocks"]
        self.scheduler._arrivals._postpones = True
        self.device: Device = Device(self.scheduler, wander, size, count, True)
        self.cases: list[tuple[Request, dict[str, Any], int]] = []

    def submit_held(self, options: dict[str, Any], seed: int, max_tokens: int) -> None:
        compiled = compiled_for(options)
        max_tokens = max(max_tokens, len(compiled._way))

        def hold(request: Request) -> None:
            request.seed = seed
            for seq in request.sequences:
                seq.constraint = compiled.start(request.params, max_tokens)
                seq.needs_host_sync = True

        eos = not options.get("ignore_eos")
        request = self.submit(PROMPT, max_tokens=max_tokens, eos=eos, prepare=hold, **options)
        self.cases.append((request, options, max_tokens))

    def check_end(self) -> None:
        assert self.scheduler.block_tables.pool.num_used_blocks == 0
        for seq in self.submitted:
            if seq not in self.aborted:
                request, options, max_tokens = next(c for c in self.cases if c[0] is seq.request)
                expected = alone(options, request.seed, max_tokens, self.device._wander)
                assert seq.output_token_ids == expected


def compiled_for(options: dict[str, Any]) -> CompiledConstraint:
    compiled = compiler("bytes").compile(SamplingParams(**options))
    assert compiled is not None
    return compiled


def alone(options: dict[str, Any], seed: int, max_tokens: int, wander: float) -> list[int]:
    """The answer step by step, each token under its mask."""
    constraint = compiled_for(options).start(SamplingParams(**options), max_tokens)
    constraint.may_guess = False
    vocabulary = constraint._vocabulary
    words = np.zeros(vocabulary.num_mask_words, np.int32)
    ids: list[int] = []
    while len(ids) < max_tokens:
        write_mask(constraint, words)
        values = logits([*PROMPT, *ids], seed, wander)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: len(values)]
        token_id = int(np.where(bits == 1, values, -np.inf).argmax())
        if not constraint.accept(token_id, max_tokens - len(ids) - 1):
            continue
        assert not constraint.error
        ids.append(token_id)
        ends = token_id in vocabulary.eos_token_ids and not options.get("ignore_eos")
        if ends or constraint.is_complete:
            break
        ids += constraint.take_forced(max_tokens - len(ids))
        if constraint.is_complete:
            break
    return ids


def write_mask(constraint: SequenceConstraint, words: np.ndarray) -> None:
    if constraint.has_own_mask:
        constraint.write_mask(words)
        return
    constraint.matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    if constraint.bars_early_end:
        constraint.bar_early_end(words)


def play(
    cases: list[tuple[int, int, int]], wander: float, abort: Callable[[int], bool], **setup: Any
) -> GuessHarness:
    settles_early = setup.pop("settles_early", True)
    harness = GuessHarness(wander, **setup)
    harness.settles_early = settles_early
    for number, (kind, seed, max_tokens) in enumerate(cases):
        harness.submit_held(CONSTRAINTS[kind], seed, max_tokens)
        harness.turn()
        if abort(number):
            harness.abort(harness.submitted[number // 2])
    harness.run()
    return harness


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    cases=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 10_000), st.integers(5, 120)),
        min_size=1,
        max_size=5,
    ),
    wander=st.sampled_from([0.0, 3.0, 5.0]),
    steps_in_flight=st.integers(1, 4),
    max_num_seqs=st.integers(1, 4),
    block_size=st.sampled_from([1, 4]),
    num_blocks=st.sampled_from([340, 1400]),
    budget=st.sampled_from([8, 64]),
    aborts=st.sets(st.integers(0, 4)),
    settles_early=st.booleans(),
)
def test_tokens_are_those_that_masks_alone_give(
    cases: list[tuple[int, int, int]], aborts: set[int], **setup: Any
) -> None:
    play(cases, setup.pop("wander"), aborts.__contains__, max_model_len=300, **setup)


@pytest.mark.parametrize("steps_in_flight", [2, 3])
def test_text_is_sampled_ahead_and_without_masks(steps_in_flight: int) -> None:
    cases = [(kind, seed, 110) for kind in range(4) for seed in range(2)]
    setup = {"max_num_seqs": 8, "block_size": 4, "num_blocks": 1400, "budget": 64}
    harness = play(
        cases,
        5.0,
        lambda _: False,
        max_model_len=300,
        steps_in_flight=steps_in_flight,
        **setup,
    )
    num_sampled = sum(int(batch.is_sampling.sum()) for batch in harness.batches)
    assert harness.device.num_open > num_sampled / 2
    assert harness.device.num_ahead > num_sampled / 4
    assert harness.num_settled > num_sampled / 4


class Answers:
    """What the loop publishes, and a runner for it over the fake device."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.is_done = True
        self.found: dict[str, list[int]] = {}
        self.errors: list[BaseException] = []
        self.all_ended = threading.Event()
        self.num_wanted = 0

    def execute(self, batch: ScheduledBatch) -> Answers:
        self._device.launch(batch)
        return self

    def wait(self) -> StepOutput:
        return StepOutput(self._device.run_oldest()[1])

    def free_row(self, row: int) -> None:
        pass

    def check_health(self) -> None:
        pass

    def publish(
        self,
        deltas: object = None,
        output: RequestOutput | None = None,
        error: BaseException | None = None,
    ) -> list[Any]:
        if error is not None:
            self.errors.append(error)
        if output is not None:
            self.found[output.request_id] = output.outputs[0].token_ids
        if len(self.found) + len(self.errors) == self.num_wanted:
            self.all_ended.set()
        return []


@pytest.mark.parametrize("max_steps", [1, 3])
def test_the_loop_settles_what_waits(max_steps: int) -> None:
    """Also the last tokens, behind which no step comes."""
    setup = {"max_num_seqs": 4, "block_size": 4, "num_blocks": 1400, "budget": 64}
    harness = GuessHarness(5.0, max_model_len=300, steps_in_flight=max_steps, **setup)
    answers, counters = Answers(harness.device), Counters()
    outputs = OutputProcessor(harness.scheduler, None, counters, answers.free_row)
    loop = EngineLoop(
        name="guesses",
        scheduler=harness.scheduler,
        runner=answers,
        outputs=outputs,
        counters=counters,
        max_steps_in_flight=max_steps,
    )
    settled: list[int] = []
    settle = outputs.settle
    outputs.settle = lambda: settled.append(settle()) or settled[-1]  # type: ignore[func-returns-value]
    add, harness.scheduler.add = harness.scheduler.add, lambda seq: None
    for seed in range(10):
        harness.submit_held(CONSTRAINTS[seed % 4], seed, 60 + seed)
    harness.scheduler.add = add
    answers.num_wanted = 10
    loop.start(lambda body: body())
    loop.post_submit([(request, answers) for request, _, _ in harness.cases])
    assert answers.all_ended.wait(60)
    assert loop.stop(drain=True, timeout=10)
    assert not answers.errors
    assert sum(settled) > 100
    for request, options, max_tokens in harness.cases:
        expected = alone(options, request.seed, max_tokens, 5.0)
        assert answers.found[request.request_id] == expected


def test_a_step_waits_for_the_masks_of_many_but_not_of_few() -> None:
    """Free rows never wait; constrained ones do where more than a few of them would miss it."""
    harness = GuessHarness(
        5.0, max_num_seqs=32, block_size=4, num_blocks=1400, budget=64, max_model_len=300
    )
    table = harness.scheduler.table
    for seed in range(16):
        harness.submit_held(CONSTRAINTS[1], seed, 100)
    while harness.num_in_flight < 1 or not table.guesses[:16].any():
        harness.turn()
        harness.launch()
    num_guessing = 0
    for num_masked in range(17):
        table.guesses[:16] = np.arange(16) >= num_masked
        rows = harness.scheduler._plan_running().rows
        waits = waits_for_masks(table, harness.scheduler._running, rows)
        num_missing = len(harness.scheduler._running) - len(rows)
        assert waits == (num_missing >= 2), (num_masked, num_missing)
        num_guessing += not waits
    assert num_guessing >= 2
    table.is_constrained[15] = False
    rows = np.array([15], np.intp)
    assert not waits_for_masks(table, harness.scheduler._running, rows)


def test_who_cuts_the_distribution_or_watches_tokens_gets_masks() -> None:
    for options in ({"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"logprobs": 0}, {"stop": "x"}):
        params = SamplingParams(json_schema=NOTE, temperature=0.7, **options)
        assert not compiled_for({"json_schema": NOTE}).start(params, 90).may_guess, options
    for options in ({}, {"temperature": 0.0, "top_k": 5}):
        params = SamplingParams(json_schema=NOTE, **options)
        assert compiled_for({"json_schema": NOTE}).start(params, 90).may_guess, options
