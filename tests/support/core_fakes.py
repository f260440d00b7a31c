"""A fake model and runner for scheduler tests: KV is a log of who wrote which history where.

The fake device mirrors the block table and the sampled tokens from the batches alone, as a GPU
runner does, and runs a step only when its result is asked for, after the host has gone on. Its
attention reads every position of every sequence through the mirrored block table and compares
with the history that the sequence must have, so that any block shared, evicted, overwritten or
forgotten wrongly ends in an assertion.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable
from hashlib import blake2b

import numpy as np

from engine.core.batch import CompletedStep, ScheduledBatch
from engine.core.request import Request, Sequence, SequenceStatus
from engine.core.scheduler import Scheduler
from engine.outputs import RequestMetrics
from engine.sampling_params import SamplingParams

VOCAB_SIZE = 40
EOS_ID = 0

_request_numbers = itertools.count()


def make_request(
    scheduler: Scheduler | None,
    prompt: list[int],
    *,
    max_tokens: int | None = 8,
    priority: int = 0,
    cache_salt: str | None = None,
    needs_host_sync: bool = False,
    wants_tokens: bool = False,
    eos: bool = True,
    **params: object,
) -> Request:
    """A request with its sequences, checked against `scheduler`'s limits."""
    sampling = SamplingParams(max_tokens=max_tokens, **params)
    total = len(prompt) + (max_tokens or 0)
    if scheduler is not None:
        total = scheduler.check_fits(len(prompt), max_tokens)
    stop_ids = set(sampling.stop_token_ids or ()) | ({EOS_ID} if eos else set())
    request = Request(
        request_id=f"request-{next(_request_numbers)}",
        prompt_token_ids=prompt,
        params=sampling,
        stop_token_ids=frozenset(stop_ids),
        max_total_tokens=total,
        seed=7,
        metrics=RequestMetrics(arrival_s=0.0),
        priority=priority,
        cache_salt=cache_salt,
    )
    request.sequences = [
        Sequence(request, index, needs_host_sync=needs_host_sync, wants_tokens=wants_tokens)
        for index in range(sampling.n)
    ]
    return request


def next_token(seq: Sequence, history: list[int]) -> int:
    """The fake model: a function of the whole history and the answer's index alone."""
    data = np.array([seq.index, *history], dtype=np.int64).tobytes()
    number = int.from_bytes(blake2b(data, digest_size=8).digest(), "little")
    token_id = number % VOCAB_SIZE
    num_new = len(history) - seq.request.num_prompt_tokens
    if num_new < seq.request.params.min_tokens and token_id in seq.request.stop_token_ids:
        # What a sampler does: stop ids cannot be drawn before min_tokens.
        token_id = VOCAB_SIZE
    return token_id


def reference_answer(seq: Sequence) -> tuple[list[int], str, int | None]:
    """Output tokens, finish reason and stop reason of `seq` when it runs alone, step by step."""
    request = seq.request
    history = list(request.prompt_token_ids)
    while True:
        token_id = next_token(seq, history)
        history.append(token_id)
        output = history[request.num_prompt_tokens :]
        if token_id in request.stop_token_ids:
            by_caller = token_id in (request.params.stop_token_ids or ())
            return output, "stop", token_id if by_caller else None
        if len(history) == request.max_total_tokens:
            return output, "length", None


class FakeDevice:
    """Runs batches strictly in order. Knows nothing but the batches and the admitted sequences."""

    def __init__(self, scheduler: Scheduler, block_size: int, num_blocks: int, caching: bool):
        self._scheduler = scheduler
        self._block_size = block_size
        self._caching = caching
        self._queue: deque[tuple[ScheduledBatch, list[tuple[Sequence, list[int]]]]] = deque()
        self._blocks: dict[int, list[int]] = {}
        self._owner: dict[int, Sequence] = {}
        self._history: dict[int, list[int]] = {}
        # Per row and position a digest of the domain and all tokens up to and including it.
        self._digests: dict[int, list[int]] = {}
        # (block, offset) -> the digest of what was written there
        self._kv: dict[tuple[int, int], int] = {}
        self._num_blocks = num_blocks
        self.num_computed_tokens = 0

    def launch(self, batch: ScheduledBatch) -> None:
        """Take what the host knows now: input ids (-1: in flight) and, for new rows, the owner."""
        table = self._scheduler.table
        inputs = []
        for row, start, count in zip(
            batch.rows.tolist(),
            batch.num_computed_tokens.tolist(),
            batch.num_scheduled_tokens.tolist(),
            strict=True,
        ):
            seq = table.sequences[row]
            assert seq is not None, "a row without an owner was scheduled"
            ids = table.token_ids[row, : start + count].tolist()
            inputs.append((seq, ids))
        self._queue.append((batch, inputs))

    def run_oldest(self) -> tuple[ScheduledBatch, np.ndarray]:
        """Run the oldest launched step and return its sampled ids."""
        batch, inputs = self._queue.popleft()
        for row in batch.new_rows:
            self._blocks[row], self._history[row], self._digests[row] = [], [], []
        for update in batch.block_updates:
            blocks = self._blocks[update.row]
            assert update.start == len(blocks), "a block update leaves a gap or repeats blocks"
            assert update.block_ids, "an empty block update"
            blocks += update.block_ids
            assert all(0 < block_id < self._num_blocks for block_id in update.block_ids)
        rows = batch.rows.tolist()
        ends = (batch.num_computed_tokens + batch.num_scheduled_tokens).tolist()
        for row, (seq, ids) in zip(rows, inputs, strict=True):
            if row in batch.new_rows:
                self._owner[row] = seq
                assert -1 not in ids, "a sequence starts with a token nobody knows"
                self._history[row] = list(ids)
            assert self._owner[row] is seq, "a row changed hands without being new"
            history = self._history[row]
            self.note_inputs(row, ids)
            for position, token_id in enumerate(ids):
                if position == len(history):
                    history.append(token_id)
                assert token_id in (-1, history[position]), "host and device disagree on a token"
        # As in a real layer: all KV of the step is written before anybody reads.
        for row, start, end in zip(rows, batch.num_computed_tokens.tolist(), ends, strict=True):
            for position in range(start, end):
                self._kv[self._slot(row, position)] = self._digest(row, position)
                self.num_computed_tokens += 1
        token_ids = np.full(len(rows), -1, dtype=np.int64)
        for index, (row, end) in enumerate(zip(rows, ends, strict=True)):
            for position in range(end):
                found = self._kv.get(self._slot(row, position))
                assert found == self._digest(row, position), (
                    f"row {row} reads the KV of somebody else at position {position}"
                )
            if batch.is_sampling[index]:
                history = self._history[row]
                assert len(history) == end, "sampled before all known tokens were computed"
                token_ids[index] = self.next_token(batch, row, history)
                history.append(int(token_ids[index]))
        return batch, token_ids

    def next_token(self, batch: ScheduledBatch, row: int, history: list[int]) -> int:
        """What the model says."""
        return next_token(self._owner[row], history)

    def note_inputs(self, row: int, ids: list[int]) -> None:
        """A step is about to run with these inputs of `row`, from its first token on."""

    def drop_oldest(self) -> None:
        """The oldest launched step fails: it writes nothing."""
        self._queue.popleft()

    def _slot(self, row: int, position: int) -> tuple[int, int]:
        return self._blocks[row][position // self._block_size], position % self._block_size

    def _digest(self, row: int, position: int) -> int:
        digests, history = self._digests[row], self._history[row]
        while len(digests) <= position:
            parent = digests[-1] if digests else self._domain(row)
            digests.append(hash((parent, history[len(digests)])))
        return digests[position]

    def _domain(self, row: int) -> str | None:
        request = self._owner[row].request
        return request.cache_salt if self._caching else request.request_id


class Harness:
    """A scheduler with a fake device, and a check of every rule at every step."""

    def __init__(
        self,
        *,
        max_num_seqs: int = 4,
        budget: int = 64,
        max_model_len: int = 64,
        block_size: int = 4,
        num_blocks: int = 64,
        caching: bool = True,
        steps_in_flight: int = 1,
        coalesced_rows: int = 0,
    ) -> None:
        self.scheduler = Scheduler(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=max_model_len,
            block_size=block_size,
            num_blocks=num_blocks,
            enable_prefix_caching=caching,
            coalesced_rows=coalesced_rows,
        )
        self.device = FakeDevice(self.scheduler, block_size, num_blocks, caching)
        self.budget = budget
        self.steps_in_flight = steps_in_flight
        self.block_size = block_size
        self.num_in_flight = 0
        self.batches: list[ScheduledBatch] = []
        self.submitted: list[Sequence] = []
        self.ended: list[Sequence] = []
        self.aborted: set[Sequence] = set()
        self.first_scheduled: list[Sequence] = []
        self.completed: list[CompletedStep] = []
        self.num_drains = self.num_settled = 0
        # Otherwise `complete` does it.
        self.settles_early = True

    def submit(
        self,
        prompt: list[int],
        prepare: Callable[[Request], None] = lambda request: None,
        **options: object,
    ) -> Request:
        request = make_request(self.scheduler, prompt, **options)
        prepare(request)
        for seq in request.sequences:
            self.scheduler.add(seq)
            self.submitted.append(seq)
        return request

    def abort(self, seq: Sequence) -> None:
        was_finished = seq.status is SequenceStatus.FINISHED
        self.scheduler.finish(seq, "abort")
        self.scheduler.finish(seq, "abort")
        if not was_finished:
            self.ended.append(seq)
            self.aborted.add(seq)
        self.check_blocks()

    def launch(self) -> ScheduledBatch | None:
        """One `schedule`, launched."""
        batch = self.scheduler.schedule()
        if batch is None and self.settle():
            batch = self.scheduler.schedule()
        if batch is None:
            assert self.num_in_flight or not self.scheduler.has_unfinished, "nobody can ever run"
            if self.scheduler.must_drain:
                self.num_drains += 1
                assert self.num_in_flight, "told to drain an empty pipeline"
        else:
            assert not self.scheduler.must_drain
            self._check_batch(batch)
            self.device.launch(batch)
            self.num_in_flight += 1
            self.batches.append(batch)
        self.check_blocks()
        return batch

    def collect(self) -> CompletedStep:
        """Run the oldest launched step and complete it."""
        batch, token_ids = self.device.run_oldest()
        has_others = self.scheduler.num_postponed > 0
        done = self.scheduler.complete(batch, token_ids)
        self.num_in_flight -= 1
        assert has_others or {row for _, row in done.finished} <= set(batch.rows.tolist())
        return self._took_in(done)

    def settle(self) -> int:
        """Look at what `complete` has left; the number of tokens."""
        count = self.scheduler.num_postponed
        if count:
            self._took_in(self.scheduler.settle())
        self.num_settled += count
        return count

    def _took_in(self, done: CompletedStep) -> CompletedStep:
        for seq, _row in done.finished:
            assert seq.status is SequenceStatus.FINISHED
            assert seq.row == -1
            self.ended.append(seq)
        self.completed.append(done)
        self.check_blocks()
        return done

    def turn(self) -> None:
        """What the engine loop does once: launch up to the limit, then collect the oldest."""
        while self.num_in_flight < self.steps_in_flight:
            if self.launch() is None:
                break
        if self.settles_early:
            self.settle()
        if self.num_in_flight:
            self.collect()

    def run(self, max_turns: int = 10_000) -> None:
        """Turn until everything has ended and the pipeline is empty."""
        for _ in range(max_turns):
            if not self.scheduler.has_unfinished and not self.num_in_flight:
                break
            self.turn()
        else:
            raise AssertionError(f"requests are left after {max_turns} turns")
        self.check_end()

    # ---------------------------------------------------------------- rules

    def _check_batch(self, batch: ScheduledBatch) -> None:
        table = self.scheduler.table
        rows, counts = batch.rows, batch.num_scheduled_tokens
        assert (rows.dtype, counts.dtype) == (np.intp, np.int32)
        assert batch.num_computed_tokens.dtype == np.int32
        assert len(set(rows.tolist())) == len(rows) > 0
        assert counts.min() >= 1
        assert batch.num_tokens == counts.sum() <= self.budget
        assert sorted(counts > 1) == list(counts > 1), "one-token sequences come first"
        ends = batch.num_computed_tokens + counts
        assert (table.num_tokens[rows] <= table.max_total_tokens[rows]).all()
        assert (ends == table.num_computed_tokens[rows]).all()
        assert (ends <= table.num_blocks[rows] * self.block_size).all()
        assert (ends < table.max_total_tokens[rows]).all(), "a last token needs no KV"
        for row in batch.new_rows:
            assert [u.start for u in batch.block_updates if u.row == row] == [0]
            seq = table.sequences[row]
            assert seq is not None
            if seq.num_preemptions == 0:
                self.first_scheduled.append(seq)

    def check_blocks(self) -> None:
        """Every block in use has as many users as block tables name it; the rest is available."""
        table, pool = self.scheduler.table, self.scheduler.block_tables.pool
        users = [0] * (pool.num_usable_blocks + 1)
        for row, seq in enumerate(table.sequences):
            if seq is None:
                assert table.num_blocks[row] == 0
                continue
            assert seq.row == row
            block_ids = self.scheduler.block_tables.block_ids(row)
            assert len(set(block_ids)) == len(block_ids)
            for block_id in block_ids:
                users[block_id] += 1
        assert users == [pool.ref_count(block_id) for block_id in range(len(users))]
        assert pool.num_used_blocks == sum(count > 0 for count in users)

    def check_end(self) -> None:
        """All ended once, with the tokens they would have had alone; nothing is left in use."""
        scheduler = self.scheduler
        assert not scheduler.has_unfinished
        assert scheduler.num_steps_in_flight == 0
        assert scheduler.block_tables.pool.num_used_blocks == 0
        assert scheduler.table.num_free_rows == scheduler.table.max_num_seqs
        assert len(self.ended) == len(set(self.ended)) == len(self.submitted)
        for seq in self.submitted:
            output, reason, stop_reason = reference_answer(seq)
            if seq in self.aborted:
                assert seq.finish_reason == "abort"
                assert seq.output_token_ids == output[: len(seq.output_token_ids)]
            else:
                assert seq.output_token_ids == output
                assert (seq.finish_reason, seq.stop_reason) == (reason, stop_reason)


def shared_prompt(prefix: int, num_shared: int, num_own: int, own: int) -> list[int]:
    """`num_shared` tokens common to all prompts of family `prefix`, then `num_own` of its own."""
    family, single = random.Random(prefix), random.Random(1000 + own)
    return [family.randrange(1, VOCAB_SIZE) for _ in range(num_shared)] + [
        single.randrange(1, VOCAB_SIZE) for _ in range(num_own)
    ]
