"""`Scheduler`: who runs in the next step, and what a finished step means for everybody.

Between `schedule` and `complete` a step is *in flight*. Several may be: everything here is written
so that a step can be scheduled before the tokens of earlier ones are known, because the number of
tokens of each sequence is known without them.
"""

from __future__ import annotations

import time
from collections import Counter, deque

import numpy as np
import numpy.typing as npt

from engine.core.arrivals import Arrivals
from engine.core.batch import BlockUpdate, CompletedStep, ScheduledBatch, SequenceRow
from engine.core.batch_builder import NewRows, StepInFlight, build_batch
from engine.core.block_tables import Admission, BlockTables
from engine.core.capacity import CapacityLimits
from engine.core.constrained import waits_for_masks
from engine.core.pieces import appended, gathered, joined, pieces
from engine.core.preemption import fewest_victims, rank
from engine.core.prefix_groups import PrefixGroups
from engine.core.request import Sequence, SequenceStatus
from engine.core.running_plan import RunningPlan, plan_running
from engine.core.sampled_tokens import SampledTokens
from engine.core.scheduler_stats import SchedulerCounters, SchedulerStats
from engine.core.state import Allocate, IndexArray, SequenceTable
from engine.core.waiting_queue import WaitingQueue
from engine.outputs import FinishReason

_HEADROOM_SHARE = 100
"""1 / share of the KV blocks that an admission leaves free for the running sequences to grow,
as vLLM's watermark: without it the newest sequence is admitted and preempted in turn."""

_COALESCED_STEPS = 16
"""Steps that coalesced admissions may wait: about 50 ms on a GPU."""


class Scheduler:
    """Decides per step, under one token budget, who runs and with how many tokens.

    The rules, in their order:

    1. Running sequences first, in order of admission: a decode takes one token, a prompt that is
       longer than the budget continues with its next chunk.
    2. Then waiting ones by (priority, arrival), while there are tokens, rows and blocks for all
       their known tokens. Who lacks rows or blocks stops the queue: nobody overtakes it. Equal
       prefixes are computed once, even by sequences that start in the same step: the blocks of
       the first can be found by the next as soon as they are scheduled, and while a prompt is
       longer than what is left of the budget, nobody is admitted behind it.
    3. If running sequences lack blocks, the last by (priority, arrival) is preempted: it loses
       its blocks, keeps its tokens, returns to the front of its class and recomputes.
    4. If the first waiting sequence lacks rows or blocks, running ones of a strictly larger
       `priority` value are preempted for it, the last first, provided that it then fits. A
       preempted sequence can never preempt back, so the two never take turns. A lack of token
       budget preempts nobody.
    5. With `coalesced_rows`, a full house lets new sequences in by groups (see
       `_holds_admissions`), so that most steps are pure decode.
    6. Preemption waits until no step is in flight: `schedule` returns None with `must_drain` set,
       and goes on by itself once results have been passed to `complete`.

    Steps must run in the order in which they were scheduled. A sequence may end while steps that
    contain it are in flight; its blocks are given away at once, which is safe because a later
    step's writes come after all reads and writes of earlier ones.

    All methods belong to the engine thread, but `check_fits`, which reads constants only.

    Args:
        max_num_seqs: Sequences running at once.
        max_num_batched_tokens: Token budget of one step.
        max_model_len: Tokens of prompt and answer together.
        block_size: Tokens per KV block.
        num_blocks: Blocks of the KV cache; block 0 is never handed out.
        enable_prefix_caching: Reuse the blocks of equal prefixes.
        coalesced_rows: Rows that may stay free for up to 16 steps while more sequences wait, to be
            filled together; 0 fills every row at once. For devices where a step with a prompt in
            it costs much more than a pure decode, as on a GPU with captured decode steps.
        finds_prefix_groups: Tell the runner which decoding sequences share their leading blocks.
        guesses_in_text: Let constrained sequences sample without a mask, and ahead of their own
            output, where nearly every token is allowed. For devices that draw as
            `SequenceConstraint` asks, and to which a step more of one sequence costs little.
        allocate: Makes the arrays of the sequence table, for instance in pinned memory.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        block_size: int,
        num_blocks: int,
        enable_prefix_caching: bool,
        coalesced_rows: int = 0,
        finds_prefix_groups: bool = False,
        guesses_in_text: bool = False,
        allocate: Allocate = np.zeros,
    ) -> None:
        self.table = SequenceTable(max_num_seqs, max_model_len, block_size, allocate)
        self.block_tables = BlockTables(self.table, block_size, num_blocks, enable_prefix_caching)
        self.must_drain = False
        self._pool = self.block_tables.pool
        self._limits = CapacityLimits(max_model_len, block_size, self._pool.num_usable_blocks)
        self._block_size = block_size
        self._max_num_batched_tokens = max_num_batched_tokens
        self._headroom_blocks = self._pool.num_usable_blocks // _HEADROOM_SHARE
        self._coalesced_rows = coalesced_rows
        self._arrivals = Arrivals(self.table, self.block_tables, postpones=guesses_in_text)
        self._prefix_groups = PrefixGroups(self.table, block_size) if finds_prefix_groups else None
        self._last_admission_step = 0
        self._waiting = WaitingQueue()
        # State indices of the running sequences in order of admission.
        self._running: IndexArray = np.zeros(0, dtype=np.intp)
        self._running_priorities: Counter[int] = Counter()
        # Rows with known tokens that later chunks will compute; at most one.
        self._prefilling: set[int] = set()
        self._in_flight: deque[StepInFlight] = deque()
        self._next_arrival_index = 0
        self._counts = SchedulerCounters()

    # ---------------------------------------------------------------- questions

    def check_fits(self, num_prompt_tokens: int, max_new_tokens: int | None) -> int:
        """Total tokens such a request may reach; see `CapacityLimits.check_fits`. Any thread."""
        return self._limits.check_fits(num_prompt_tokens, max_new_tokens)

    @property
    def has_unfinished(self) -> bool:
        """True while a sequence runs or waits. Steps of ended sequences may be in flight beside."""
        return len(self._running) > 0 or len(self._waiting) > 0

    @property
    def num_running(self) -> int:
        """Sequences with a row."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences without one."""
        return len(self._waiting)

    @property
    def num_steps_in_flight(self) -> int:
        """Batches scheduled whose result has not been passed to `complete`."""
        return len(self._in_flight)

    def stats(self) -> SchedulerStats:
        """Counters since the start, and the load of now."""
        counts = self._counts
        return SchedulerStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_steps_in_flight=self.num_steps_in_flight,
            peak_running=counts.peak_running,
            steps=counts.steps,
            preemptions=counts.preemptions,
            prefix_query_tokens=counts.prefix_query_tokens,
            prefix_hit_tokens=counts.prefix_hit_tokens,
            blocks_used=self._pool.num_used_blocks,
            blocks_cached=self.block_tables.prefix_cache.num_cached_blocks,
            blocks_total=self._pool.num_usable_blocks,
        )

    def output_tokens(self, seq: Sequence, start: int = 0) -> list[int]:
        """New tokens of `seq` known on the host, from the `start`-th on, whatever its status."""
        if seq.row >= 0:
            return self.table.output_tokens(seq.row, start)
        return seq.output_token_ids[start:]

    def sequences_with_rows(self, batch: ScheduledBatch) -> list[SequenceRow]:
        """Sequences of a step in flight that have not ended since, with their rows."""
        step = next((step for step in self._in_flight if step.batch is batch), None)
        if step is None:
            return []
        rows = step.rows[self.table.epoch[step.rows] == step.epochs].tolist()
        return [SequenceRow(self._owner(row), row) for row in rows]

    # ---------------------------------------------------------------- sequences come and go

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence behind all others of its priority.

        Raises:
            ContextOverflowError: `request.max_total_tokens` exceeds the context.
            CapacityError: It exceeds the KV cache; the sequence could wait forever.
        """
        request = seq.request
        num_prompt_tokens = request.num_prompt_tokens
        self.check_fits(num_prompt_tokens, request.max_total_tokens - num_prompt_tokens)
        seq.arrival_index = self._next_arrival_index
        self._next_arrival_index += 1
        if request.params.stop is not None or request.params.logprobs is not None:
            seq.wants_tokens = True
        self._arrivals.note_new(seq)
        self._waiting.add(seq)

    def finish(
        self, seq: Sequence, reason: FinishReason, stop_reason: str | int | None = None
    ) -> None:
        """End `seq` whether it waits, runs or is in flight; no effect once it has ended.

        Row and blocks are free at once; results of steps in flight are dropped as they come.
        """
        if seq.status is SequenceStatus.FINISHED:
            return
        if seq.status is SequenceStatus.RUNNING:
            self._free_rows([seq.row])
        else:
            self._waiting.remove(seq)
        self._end(seq, reason, stop_reason)

    def abandon_steps(self) -> list[Sequence]:
        """Give up all steps in flight, because one of them failed.

        Blocks registered by them may hold nothing, so the prefix cache is emptied.

        Returns:
            The sequences that ran in them and have not ended: their KV cannot be trusted, the
            caller has to `finish` each before the next `schedule`.
        """
        found: dict[Sequence, None] = {}
        for step in self._in_flight:
            for seq, _row in self.sequences_with_rows(step.batch):
                found[seq] = None
        self._in_flight.clear()
        self.reset_prefix_cache()
        return list(found)

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes; running sequences keep their blocks."""
        self.block_tables.prefix_cache.clear()

    # ---------------------------------------------------------------- schedule

    def schedule(self) -> ScheduledBatch | None:
        """The next step, or None when nobody can run before a step in flight is complete.

        The state advances at once, as if the step had run; only the sampled tokens are missing.
        Launch every batch that is returned, in order.
        """
        self.must_drain = False
        plan = self._plan_running()
        if self._in_flight and waits_for_masks(self.table, self._running, plan.rows):
            return None
        while True:
            victims = self._victims(plan)
            if not victims:
                break
            if self._in_flight:
                self.must_drain = True
                return None
            self._preempt(victims)
            plan = self._plan_running()
        block_updates = self._advance_running(plan)
        admitted = self._admit_waiting(
            self._max_num_batched_tokens - plan.num_tokens, block_updates
        )
        if not len(plan.rows) and not admitted.rows:
            return None
        return self._make_batch(plan, admitted, block_updates)

    def _plan_running(self) -> RunningPlan:
        return plan_running(
            self.table, self._running, self._max_num_batched_tokens, self._block_size
        )

    def _advance_running(self, plan: RunningPlan) -> list[BlockUpdate]:
        updates = []
        for piece in pieces(len(plan.rows)):
            rows, counts = plan.rows[piece], plan.counts[piece]
            for index in np.flatnonzero(plan.missing_blocks[piece] > 0).tolist():
                row = int(rows[index])
                end = int(self.table.num_computed_tokens[row] + counts[index])
                updates.append(self.block_tables.grow(row, end))
            self.table.num_computed_tokens[rows] += counts
        for row in list(self._prefilling):
            self._register_prefill(row)
        return updates

    def _admit_waiting(self, budget: int, block_updates: list[BlockUpdate]) -> NewRows:
        """Admit from the front of the queue; `block_updates` gets the new rows' blocks."""
        admitted: list[Sequence] = []
        new = NewRows()
        if self._holds_admissions():
            return new
        now_s = time.monotonic() if len(self._waiting) else 0.0
        for seq in self._waiting:
            if budget == 0 or self.table.num_free_rows == 0:
                break
            admission = self.block_tables.plan(seq)
            if self._num_blocks_lacking(admission) > 0:
                break
            row = self._admit(seq, admission, now_s)
            count = min(budget, admission.num_tokens - admission.num_cached_tokens)
            budget -= count
            admitted.append(seq)
            new.rows.append(row)
            new.counts.append(count)
            block_updates.append(self.block_tables.admit(row, admission))
            self.table.num_computed_tokens[row] += count
            # At once, so that the next in the queue finds these blocks in the same step.
            self._register_prefill(row)
        for seq in admitted:
            self._waiting.remove(seq)
        if new.rows:
            self._last_admission_step = self._counts.steps
            self._running = appended(self._running, new.rows)
            self._counts.peak_running = max(self._counts.peak_running, self.num_running)
        return new

    def _holds_admissions(self) -> bool:
        """Whether to leave free rows empty for a few steps, to fill more of them in one.

        Only while more sequences wait than there are free rows, fewer than `coalesced_rows` are
        free, the last admission is less than 16 steps ago, and nobody urgent waits. Without this,
        a full house of 512 admits somebody in nearly every step, and no step is pure decode.
        """
        num_free = self.table.num_free_rows
        if num_free >= self._coalesced_rows or len(self._waiting) <= num_free:
            return False
        if not len(self._running):
            return False
        if self._counts.steps - self._last_admission_step >= _COALESCED_STEPS:
            return False
        first = next(iter(self._waiting))
        return max(self._running_priorities) <= first.request.priority

    def _admit(self, seq: Sequence, admission: Admission, now_s: float) -> int:
        row = self.table.admit(seq, admission.num_cached_tokens)
        self._running_priorities[seq.request.priority] += 1
        if seq.request.metrics.first_scheduled_s is None:
            seq.request.metrics.first_scheduled_s = now_s
        if seq.num_preemptions == 0:
            seq.num_cached_tokens = admission.num_cached_tokens
            if self.block_tables.reads_cache(seq):
                self._counts.prefix_query_tokens += admission.num_tokens
                self._counts.prefix_hit_tokens += admission.num_cached_tokens
        return row

    def _num_blocks_lacking(self, admission: Admission) -> int:
        """Blocks that must become available before this admission; <= 0 where it fits."""
        headroom = self._headroom_blocks if self._running_priorities else 0
        return admission.num_available_needed + headroom - self._pool.num_available_blocks

    def _register_prefill(self, row: int) -> None:
        """Let others find the blocks of the known tokens scheduled so far."""
        num_computed_tokens = int(self.table.num_computed_tokens[row])
        self.block_tables.register_scheduled(row, num_computed_tokens)
        if num_computed_tokens < self.table.num_tokens[row]:
            self._prefilling.add(row)
        else:
            self._prefilling.discard(row)

    def _make_batch(
        self, plan: RunningPlan, new: NewRows, block_updates: list[BlockUpdate]
    ) -> ScheduledBatch:
        rows, counts = plan.rows, plan.counts
        if new.rows:
            rows, counts = appended(rows, new.rows), appended(counts, new.counts)
        batch, rows = build_batch(
            self.table,
            rows,
            counts,
            num_tokens=plan.num_tokens + sum(new.counts),
            step_id=self._counts.steps,
            new_rows=new.rows,
            block_updates=block_updates,
        )
        if self._prefix_groups is not None:
            count = batch.num_decodes
            batch.prefix_groups = self._prefix_groups.find(
                rows[:count], batch.num_computed_tokens[:count]
            )
        self._counts.steps += 1
        self._in_flight.append(StepInFlight(batch, rows, gathered(self.table.epoch, rows)))
        return batch

    # ---------------------------------------------------------------- preemption

    def _victims(self, plan: RunningPlan) -> list[Sequence]:
        """Whom to preempt before `plan` can be carried out; usually nobody."""
        if plan.num_new_blocks > self._pool.num_available_blocks:
            return [max(map(self._owner, self._running.tolist()), key=rank)]
        if not len(self._waiting) or plan.num_tokens >= self._max_num_batched_tokens:
            return []
        first = next(iter(self._waiting))
        if max(self._running_priorities, default=first.request.priority) <= first.request.priority:
            return []
        return self._victims_for(first, plan)

    def _victims_for(self, seq: Sequence, plan: RunningPlan) -> list[Sequence]:
        """Fewest running sequences of lower priority that make room for the waiting `seq`."""
        admission = self.block_tables.plan(seq)
        num_lacking = self._num_blocks_lacking(admission) + plan.num_new_blocks
        if num_lacking <= 0 and self.table.num_free_rows > 0:
            return []
        candidates = [
            other
            for other in map(self._owner, self._running.tolist())
            if other.request.priority > seq.request.priority
        ]
        candidates.sort(key=rank, reverse=True)
        return fewest_victims(
            ((other, self.block_tables.block_ids(other.row)) for other in candidates),
            self._pool,
            num_blocks_lacking=num_lacking,
            kept_block_ids=admission.cached_block_ids,
        )

    def _preempt(self, victims: list[Sequence]) -> None:
        assert not self._in_flight, "a sequence was preempted with a step in flight"
        self._free_rows([victim.row for victim in victims])
        for victim in victims:
            victim.status = SequenceStatus.WAITING
            victim.num_preemptions += 1
            victim.request.metrics.num_preemptions += 1
            self._waiting.add(victim)
        self._counts.preemptions += len(victims)

    # ---------------------------------------------------------------- complete

    def complete(self, batch: ScheduledBatch, token_ids: npt.NDArray[np.int64]) -> CompletedStep:
        """Take in what the oldest step in flight has sampled, and end who is done.

        Tokens that the next step does not depend on may be left for `settle`.

        Args:
            batch: The oldest one that is not complete.
            token_ids: [B] in the order of the batch; entries that do not sample are ignored.
        """
        step = self._in_flight.popleft()
        assert step.batch is batch, "steps must be completed in the order they were scheduled"
        done = self.settle()
        done.step_id = batch.step_id
        for sampled in self._arrivals.take(step, token_ids, done):
            done.finished += self._end_finished(sampled)
        return done

    @property
    def num_postponed(self) -> int:
        """Tokens that `settle` would look at."""
        return self._arrivals.num_postponed

    def settle(self) -> CompletedStep:
        """Look at the tokens that `complete` has left; best done while the device runs a step."""
        done = CompletedStep(step_id=self._counts.steps)
        for sampled in self._arrivals.settle(done):
            done.finished += self._end_finished(sampled)
        return done

    def _end_finished(self, sampled: SampledTokens) -> list[SequenceRow]:
        ends = sampled.is_finished
        finished = [SequenceRow(self._owner(row), row) for row in sampled.rows[ends].tolist()]
        self._free_rows([row for _, row in finished])
        is_stop, last_ids = sampled.is_stop[ends].tolist(), sampled.token_ids[ends].tolist()
        for (seq, _row), stops, token_id in zip(finished, is_stop, last_ids, strict=True):
            by_caller = stops and token_id in (seq.request.params.stop_token_ids or ())
            self._end(seq, "stop" if stops else "length", token_id if by_caller else None)
        return finished

    # ---------------------------------------------------------------- rows

    def _end(self, seq: Sequence, reason: FinishReason, stop_reason: str | int | None) -> None:
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason = reason
        seq.stop_reason = stop_reason
        seq.block_hashes = []

    def _free_rows(self, rows: list[int]) -> None:
        """Take rows and blocks from their owners; the new tokens move to the sequences."""
        for row in rows:
            seq = self._owner(row)
            self._running_priorities[seq.request.priority] -= 1
            if not self._running_priorities[seq.request.priority]:
                del self._running_priorities[seq.request.priority]
            self._prefilling.discard(row)
            self.block_tables.release(row)
            self.table.free(row)
        # A free row has no tokens, a running one has.
        parts = [self._running[piece] for piece in pieces(len(self._running))]
        self._running = joined([part[self.table.num_tokens[part] > 0] for part in parts])

    def _owner(self, row: int) -> Sequence:
        seq = self.table.sequences[row]
        assert seq is not None, f"row {row} has no owner"
        return seq
