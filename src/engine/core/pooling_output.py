"""`PoolingOutputs`: from a step's vectors to the answers of whole requests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.core.pooling_request import FloatArray, PoolingBatch, PoolingRequest
from engine.core.pooling_scheduler import PoolingScheduler
from engine.errors import RequestAbortedError, StepError
from engine.outputs import PoolingOutput, Usage

if TYPE_CHECKING:
    from engine.handle import RequestSink, Wakeups
    from engine.stats import Counters


class PoolingOutputs:
    """Looks after all open requests; the twin of `OutputProcessor`. Engine thread only.

    Args:
        scheduler: Told of steps that are back and of requests that end early.
        counters: Counts finished, failed and aborted requests.
        dtype: As torch spells it, for the advice of an error message.
    """

    def __init__(self, scheduler: PoolingScheduler, counters: Counters, dtype: str) -> None:
        self._scheduler = scheduler
        self._counters = counters
        self._dtype = dtype
        self._open: dict[PoolingRequest, RequestSink] = {}
        self._wakeups: Wakeups = []

    def take_wakeups(self) -> Wakeups:
        """The futures to complete (see `wake_loops`)."""
        wakeups, self._wakeups = self._wakeups, []
        return wakeups

    def add(self, request: PoolingRequest, handle: RequestSink) -> None:
        """Start to look after `request`."""
        self._open[request] = handle
        self._counters.prompt_tokens += request.num_tokens

    def start_stream(self, request: PoolingRequest) -> None:
        """A list of vectors has no deltas: it comes whole."""

    def process(self, batch: PoolingBatch, output: FloatArray) -> int:
        """Hand out the vectors of a step.

        Args:
            batch: The step.
            output: [B, width] float32, texts in the batch's order.

        Returns:
            Tokens of the texts, for the engine's rate.
        """
        self._scheduler.complete(batch)
        now_s = time.monotonic()
        by_run = output[batch.places]
        start = 0
        for run in batch.runs:
            request, rows = run.request, by_run[start : start + len(run.indices)]
            start += len(run.indices)
            if request not in self._open:
                continue
            if not np.isfinite(rows).all():
                self._fail(request, self._not_finite(run.indices, rows))
                continue
            if request.vectors is None:
                request.vectors = np.empty((request.num_texts, output.shape[1]), np.float32)
            request.vectors[run.indices] = rows
            request.num_done += len(run.indices)
            if request.metrics.first_token_s is None:
                request.metrics.first_token_s = now_s
            if request.is_finished:
                self._finish(request, now_s)
        return batch.num_tokens

    def settle(self) -> int:
        """Vectors come whole: `process` leaves nothing to look at later."""
        return 0

    def abort(self, request: PoolingRequest) -> None:
        """End `request` with `RequestAbortedError`; no effect once it is finished."""
        if request in self._open:
            self._counters.requests_aborted += 1
            self._end(request, error=RequestAbortedError(f"{request.request_id} was aborted."))

    def fail_steps(self, make_error: Callable[[], BaseException]) -> None:
        """Give up the steps in flight; every request that had texts in them ends with an error."""
        for request in self._scheduler.abandon_steps():
            self._fail(request, make_error())

    def fail_all(self, make_error: Callable[[], BaseException]) -> None:
        """End every open request, each with an error of its own."""
        for request in list(self._open):
            self._fail(request, make_error())
        self._scheduler.clear()

    def _finish(self, request: PoolingRequest, now_s: float) -> None:
        assert request.vectors is not None, "its last texts have just come"
        request.metrics.finished_s = now_s
        self._counters.requests_finished += 1
        usage = Usage(prompt_tokens=request.num_tokens, completion_tokens=0)
        self._end(request, PoolingOutput(request.vectors, usage, request.metrics))

    def _fail(self, request: PoolingRequest, error: BaseException) -> None:
        if request in self._open:
            self._counters.requests_failed += 1
            self._end(request, error=error)

    def _end(self, request: PoolingRequest, output: Any = None, error: Any = None) -> None:
        self._scheduler.remove(request)
        sink = self._open.pop(request)
        self._wakeups += sink.publish(output=output, error=error)

    def _not_finite(self, indices: Any, rows: FloatArray) -> StepError:
        text = int(indices[int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])])
        advice = "The weights may be damaged."
        if "float16" in self._dtype and "bfloat16" not in self._dtype:
            advice = "float16 may have overflowed; use dtype='bfloat16' or 'float32'."
        return StepError(f"Text {text} gave numbers that are not finite. {advice}")
