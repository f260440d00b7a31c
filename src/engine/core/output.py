"""From sampled ids to text, deltas and finished outputs.

Runs in the engine thread, once per step. Python work is done only for sequences that finished or
must be looked at token by token (stop strings, logprobs), and for as many streams as a share of the
time allows; for all others the ids stay in the sequence table until the end and are turned into
text at once.

    StepOutput ─► scheduler.complete ─► watched: detokenize ─► stop strings
                                    └─► finished: text of all ids ─► RequestOutput ─► handle
    streams, in turn: what is new since their last turn ─► Delta ─► handle
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.core.answer import Answer
from engine.core.batch import CompletedStep, ScheduledBatch, StepOutput, TokenLogprobArrays
from engine.core.pieces import pieces
from engine.core.request import Request, Sequence, SequenceStatus
from engine.core.stream_pacing import StreamPacing
from engine.errors import ConstraintError, EngineError, StepError
from engine.handle import RequestSink, Wakeups
from engine.outputs import (
    Delta,
    FinishReason,
    Logprob,
    RequestOutput,
    TokenLogprobs,
    Usage,
)

if TYPE_CHECKING:
    from engine.core.scheduler import Scheduler
    from engine.stats import Counters
    from engine.text.tokenizer import Tokenizer

_NOTHING = StepOutput(np.empty(0, np.int64))
"""Sequences that are watched are never postponed."""


@dataclass(slots=True)
class _Open:
    """A request that has not ended."""

    request: Request
    handle: RequestSink
    answers: list[Answer]
    is_streamed: bool = False
    deltas: list[Delta] | tuple[()] = ()  # a list once there are any


class OutputProcessor:
    """Owns the text state of all open requests and the handles to answer.

    Args:
        scheduler: To end sequences and to read their ids.
        tokenizer: None for models without one (`load_format="dummy"`): texts are then empty.
        counters: Counts finished, failed and aborted requests.
        on_row_freed: Called with the state index of each sequence that ended while running.
        readers: As `StreamPacing` wants it; readers that nobody measures count as free.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: Tokenizer | None,
        counters: Counters,
        on_row_freed: Callable[[int], None],
        readers: Callable[[], tuple[float, int]] = lambda: (0.0, 0),
    ) -> None:
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._counters = counters
        self._on_row_freed = on_row_freed
        self._open: dict[Request, _Open] = {}
        self._streams: deque[_Open] = deque()
        self._pacing = StreamPacing(readers)
        self._touched: dict[Request, _Open] = {}
        self._wakeups: Wakeups = []

    def take_wakeups(self) -> Wakeups:
        """Publish the pending deltas; return the futures to complete (see `wake_loops`)."""
        self._serve_streams()
        for entry in self._touched.values():
            self._wakeups += entry.handle.publish(deltas=entry.deltas)
            entry.deltas = ()
        self._touched.clear()
        wakeups, self._wakeups = self._wakeups, []
        return wakeups

    # ---------------------------------------------------------------- requests come and go

    def add(self, request: Request, handle: RequestSink) -> None:
        """Start to look after `request`."""
        answers = [Answer.begin(seq, self._tokenizer) for seq in request.sequences]
        self._open[request] = _Open(request, handle, answers)
        self._counters.prompt_tokens += request.num_prompt_tokens

    def start_stream(self, request: Request) -> None:
        """Publish deltas from now on; the first one catches up with all that is there."""
        entry = self._open.get(request)
        if entry is None or entry.is_streamed:
            return
        entry.is_streamed = True
        for answer in entry.answers:
            if answer.seq.status is not SequenceStatus.FINISHED:
                self._take_new_tokens(answer)
            self._emit(entry, answer)
        self.publish_if_touched(entry)
        self._streams.append(entry)

    def _serve_streams(self) -> None:
        """Publish what is new in streams, in turn, for as long as their share of the time lasts.

        A few streams get every token of every step. Where there are so many that this would hold
        up the steps, each gets fewer and larger deltas, the one that waited longest first.
        """
        if not self._streams:
            return
        since_s = self._pacing.refill()
        for _ in range(len(self._streams)):
            entry = self._streams.popleft()
            if entry.request not in self._open:
                continue
            self._streams.append(entry)
            for answer in entry.answers:
                if answer.seq.status is not SequenceStatus.FINISHED:
                    self._take_new_tokens(answer)
                    self._emit(entry, answer)
            if not entry.deltas:
                continue
            self._touched.pop(entry.request, None)
            self._wakeups += entry.handle.publish(deltas=entry.deltas)
            entry.deltas = ()
            since_s = self._pacing.spend(since_s)
            if not self._pacing.may_go_on:
                break

    def publish_if_touched(self, entry: _Open) -> None:
        """Queue the entry for `take_wakeups` when it has deltas."""
        if entry.deltas:
            self._touched[entry.request] = entry

    def abort(self, request: Request) -> None:
        """End the request's unfinished answers with reason "abort"."""
        entry = self._open.get(request)
        if entry is None:
            return
        self._counters.requests_aborted += 1
        for answer in entry.answers:
            if answer.seq.status is not SequenceStatus.FINISHED:
                self._take_new_tokens(answer)
                self._end_sequence(answer.seq, "abort", None)
                self._finish_answer(entry, answer)
        self._finish_request(entry)

    def fail_steps(self, make_error: Callable[[], BaseException]) -> None:
        """Give up the steps in flight; every request that ran in them ends with an error."""
        requests = {seq.request: None for seq in self._scheduler.abandon_steps()}
        for request in requests:
            self._fail(request, make_error())

    def fail_all(self, make_error: Callable[[], BaseException]) -> None:
        """End every open request, each with an error of its own.

        All callers are answered before anything else is touched, because what ended the engine
        may have left the scheduler in a state that cannot be trusted.
        """
        open_requests = list(self._open)
        for request in open_requests:
            self._answer_with_error(request, make_error())
        for request in open_requests:
            self._end_sequences(request)

    def _fail(self, request: Request, error: BaseException) -> None:
        if self._answer_with_error(request, error):
            self._end_sequences(request)

    def _answer_with_error(self, request: Request, error: BaseException) -> bool:
        entry = self._open.pop(request, None)
        if entry is None:
            return False
        self._touched.pop(request, None)
        self._counters.requests_failed += 1
        self._wakeups += entry.handle.publish(deltas=entry.deltas, error=error)
        return True

    def _end_sequences(self, request: Request) -> None:
        for seq in request.sequences:
            if seq.status is not SequenceStatus.FINISHED:
                self._end_sequence(seq, "abort", None)
        request.forget_sequences()

    # ---------------------------------------------------------------- one step's results

    def process(self, batch: ScheduledBatch, output: StepOutput) -> int:
        """Take in what a step sampled.

        Returns:
            Number of new tokens.
        """
        now_s = time.monotonic()
        self._take_prompt_logprobs(batch, output)
        without_token = self._sequences_without_token(batch, output)
        completed = self._scheduler.complete(batch, output.token_ids)
        for seq in without_token:
            self._fail(seq.request, _no_token(seq))
        return self._take_in(completed, output, now_s)

    def settle(self) -> int:
        """Look at the tokens that `process` has left, see `Scheduler.settle`.

        Returns:
            How many there were, those included that have been taken back.
        """
        num_postponed = self._scheduler.num_postponed
        if num_postponed:
            self._take_in(self._scheduler.settle(), _NOTHING, time.monotonic())
        return num_postponed

    def _take_in(self, completed: CompletedStep, output: StepOutput, now_s: float) -> int:
        """Texts, ends and errors of what was completed; the number of new tokens."""
        for seq in completed.failed:
            self._fail(seq.request, _constraint_failed(seq))
        for seq in completed.first_tokens:
            if seq.request.metrics.first_token_s is None:
                seq.request.metrics.first_token_s = now_s
        for seq, row in completed.watched:
            entry = self._open.get(seq.request)
            if entry is None:
                continue
            answer = entry.answers[seq.index]
            if answer.logprobs is not None and row in output.logprobs:
                answer.logprobs.append(self._logprobs_at(output.logprobs[row], 0))
            if seq.status is SequenceStatus.FINISHED:
                continue
            self._take_new_tokens(answer)
            if answer.matcher is not None and answer.matcher.matched is not None:
                self._end_sequence(seq, "stop", answer.matcher.matched)
                self._finish_answer(entry, answer)
                self._finish_request(entry)
        for seq, row in completed.finished:
            self._on_row_freed(row)
            entry = self._open.get(seq.request)
            if entry is None:
                continue
            answer = entry.answers[seq.index]
            self._take_new_tokens(answer)
            self._finish_answer(entry, answer)
            self._finish_request(entry)
        for seq in completed.first_tokens:
            entry = self._open.get(seq.request)
            # Nobody waits in turn for a first token.
            if entry is not None and entry.is_streamed and seq.status is SequenceStatus.RUNNING:
                self._take_new_tokens(entry.answers[seq.index])
                self._emit(entry, entry.answers[seq.index])
                self.publish_if_touched(entry)
        return completed.num_new_tokens

    def _sequences_without_token(self, batch: ScheduledBatch, output: StepOutput) -> list[Sequence]:
        """Sequences for which nothing could be sampled, because all their logits were NaN."""
        rows: set[int] = set()
        for piece in pieces(len(batch.rows)):
            is_missing = batch.is_sampling[piece] & (output.token_ids[piece] < 0)
            rows.update(batch.rows[piece][is_missing].tolist())
        if not rows:
            return []
        return [seq for seq, row in self._scheduler.sequences_with_rows(batch) if row in rows]

    def _end_sequence(
        self, seq: Sequence, reason: FinishReason, stop_reason: str | int | None
    ) -> None:
        row = seq.row
        self._scheduler.finish(seq, reason, stop_reason)
        if row >= 0:
            self._on_row_freed(row)

    def _take_new_tokens(self, answer: Answer) -> None:
        answer.take(self._scheduler.output_tokens(answer.seq, answer.num_seen))

    def _finish_answer(self, entry: _Open, answer: Answer) -> None:
        answer.finish(self._scheduler.output_tokens(answer.seq))
        if entry.is_streamed:
            self._emit(entry, answer)

    def _emit(self, entry: _Open, answer: Answer) -> None:
        """Queue a delta with what is new, if anything is."""
        new_ids = self._scheduler.output_tokens(answer.seq, answer.num_sent_tokens)
        delta = answer.next_delta(new_ids)
        if delta is not None:
            entry.deltas = [*entry.deltas, delta]

    def _finish_request(self, entry: _Open) -> None:
        """Answer the handle once every answer of the request has ended."""
        request = entry.request
        outputs = [answer.output for answer in entry.answers]
        if any(output is None for output in outputs):
            self.publish_if_touched(entry)
            return
        answers = [output for output in outputs if output is not None]
        request.metrics.finished_s = time.monotonic()
        usage = Usage(
            prompt_tokens=request.num_prompt_tokens,
            completion_tokens=sum(len(output.token_ids) for output in answers),
            cached_tokens=request.sequences[0].num_cached_tokens,
        )
        if entry.is_streamed and entry.deltas:
            entry.deltas[-1].usage = usage
            entry.deltas[-1].metrics = request.metrics
        result = RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=answers,
            usage=usage,
            metrics=request.metrics,
            prompt_logprobs=request.prompt_logprobs,
        )
        del self._open[request]
        self._touched.pop(request, None)
        self._counters.requests_finished += 1
        request.forget_sequences()
        self._wakeups += entry.handle.publish(deltas=entry.deltas, output=result)

    # ---------------------------------------------------------------- log probabilities

    def _take_prompt_logprobs(self, batch: ScheduledBatch, output: StepOutput) -> None:
        if not output.prompt_logprobs:
            return
        for seq, row in self._scheduler.sequences_with_rows(batch):
            arrays = output.prompt_logprobs.get(row)
            request = seq.request
            # n answers share one prompt: the first one brings its log probabilities.
            if arrays is None or seq.index != 0 or request.params.prompt_logprobs is None:
                continue
            if request.prompt_logprobs is None:
                request.prompt_logprobs = [None]
            already = len(request.prompt_logprobs)
            # Recomputed after a preemption: what is there already is not added again.
            first = int(batch.num_computed_tokens[list(batch.rows).index(row)]) + 1
            for index in range(max(0, already - first), len(arrays.ranks)):
                request.prompt_logprobs.append(self._logprobs_at(arrays, index))

    def _logprobs_at(self, arrays: TokenLogprobArrays, index: int) -> TokenLogprobs:
        """One position: its own token first, then the likeliest ones in order."""
        found: TokenLogprobs = {}
        ids = arrays.token_ids[index].tolist()
        values = arrays.logprobs[index].tolist()
        for place, (token_id, value) in enumerate(zip(ids, values, strict=True)):
            rank = int(arrays.ranks[index]) if place == 0 else place
            if token_id not in found:
                text = "" if self._tokenizer is None else self._tokenizer.token_text(token_id)
                found[token_id] = Logprob(value, rank, text)
        return found


def _no_token(seq: Sequence) -> EngineError:
    """Why nothing could be sampled."""
    if seq.constraint is not None:
        return ConstraintError(
            f"After {seq.num_tokens - seq.request.num_prompt_tokens} tokens of request "
            f"{seq.request.request_id}, min_tokens, logit_bias or bad_words bar every token that "
            f"its constraint allows. Relax one of them."
        )
    return StepError(
        f"The model gave request {seq.request.request_id} no finite logits "
        f"({seq.num_tokens} tokens in). The weights, or the dtype, cannot compute this "
        "prompt: try dtype='float32'."
    )


def _constraint_failed(seq: Sequence) -> EngineError:
    assert seq.constraint is not None, "only a constraint can fail"
    return ConstraintError(
        f"The constraint of request {seq.request.request_id} cannot go on: "
        f"{seq.constraint.error.strip()} Simplify it, or raise the request's max_tokens."
    )
