"""`PoolingScheduler`: which texts run in the next step of an engine that embeds or scores.

Nothing is kept between steps, so there is no KV cache to share out and a text runs whole. A step
takes texts up to a budget of tokens, from every waiting request in turn: a query of one text does
not wait for the list of ten thousand that came before it.
"""

from __future__ import annotations

import time

import numpy as np

from engine.core.pooling_request import PoolingBatch, PoolingRequest, TextRun, make_batch
from engine.core.scheduler_stats import SchedulerStats


class PoolingScheduler:
    """Cuts requests into batches. Used by the engine thread; `stats` by any.

    Args:
        max_num_batched_tokens: Budget of a step. A longer text runs in a step of its own.
        max_num_seqs: Most texts of a step.
    """

    def __init__(self, max_num_batched_tokens: int, max_num_seqs: int) -> None:
        self._budget = max_num_batched_tokens
        self._max_texts = max_num_seqs
        self._waiting: dict[PoolingRequest, None] = {}
        self._in_flight: list[PoolingBatch] = []
        self._peak_running = 0
        self._steps = 0

    @property
    def has_unfinished(self) -> bool:
        """True while texts wait or run."""
        return bool(self._waiting or self._in_flight)

    def add(self, request: PoolingRequest) -> None:
        """Queue a request behind those that wait."""
        self._waiting[request] = None

    def remove(self, request: PoolingRequest) -> None:
        """Schedule no more of `request`; what runs of it comes back unasked for."""
        self._waiting.pop(request, None)

    def reset_prefix_cache(self) -> None:
        """Nothing is cached."""

    def schedule(self) -> PoolingBatch | None:
        """The next step, or None when no text waits.

        Every request may fill an equal share of the budget; what they leave goes to the oldest.
        """
        if not self._waiting:
            return None
        requests = list(self._waiting)[: self._max_texts]
        taken: dict[PoolingRequest, int] = {}
        room_tokens, room_texts = self._budget, self._max_texts
        share_tokens = self._budget // len(requests)
        share_texts = max(1, self._max_texts // len(requests))
        for limit_tokens, limit_texts in ((share_tokens, share_texts), (room_tokens, room_texts)):
            for request in requests:
                start = taken.get(request, 0)
                count, tokens = _fitting(
                    request,
                    start,
                    min(limit_tokens, room_tokens),
                    min(limit_texts, room_texts),
                    # The first text of a step always runs; so does a request's turn progress.
                    takes_one=not taken,
                )
                if count:
                    taken[request] = start + count
                    room_tokens, room_texts = room_tokens - tokens, room_texts - count
        runs = [self._take(request, count) for request, count in taken.items()]
        # Whoever was served goes behind whoever found no room.
        for request in taken:
            if request in self._waiting:
                del self._waiting[request]
                self._waiting[request] = None
        batch = make_batch(runs)
        self._in_flight.append(batch)
        self._steps += 1
        self._peak_running = max(self._peak_running, self._num_running())
        return batch

    def complete(self, batch: PoolingBatch) -> None:
        """The oldest step has come back."""
        assert self._in_flight[0] is batch, "steps complete in the order they were launched"
        del self._in_flight[0]

    def abandon_steps(self) -> list[PoolingRequest]:
        """Forget all steps in flight. Returns the requests that had texts in them, each once."""
        lost = {run.request: None for batch in self._in_flight for run in batch.runs}
        self._in_flight.clear()
        return list(lost)

    def clear(self) -> None:
        """Forget everything."""
        self._waiting.clear()
        self._in_flight.clear()

    def stats(self) -> SchedulerStats:
        """Counts of texts, in the terms of the other scheduler; without KV blocks."""
        waiting = sum(one.num_texts - one.num_scheduled for one in list(self._waiting))
        return SchedulerStats(
            num_running=self._num_running(),
            num_waiting=waiting,
            num_steps_in_flight=len(self._in_flight),
            peak_running=self._peak_running,
            steps=self._steps,
            preemptions=0,
            prefix_query_tokens=0,
            prefix_hit_tokens=0,
            blocks_used=0,
            blocks_cached=0,
            blocks_total=0,
        )

    def _num_running(self) -> int:
        return sum(batch.num_texts for batch in list(self._in_flight))

    def _take(self, request: PoolingRequest, count: int) -> TextRun:
        start = request.num_scheduled
        if request.metrics.first_scheduled_s is None:
            request.metrics.first_scheduled_s = time.monotonic()
        request.num_scheduled += count
        if request.num_scheduled == request.num_texts:
            del self._waiting[request]
        return TextRun(request, request.order[start : start + count])


def _fitting(
    request: PoolingRequest, start: int, max_tokens: int, max_texts: int, *, takes_one: bool
) -> tuple[int, int]:
    """(texts, their tokens) of `request`, `start` after those scheduled, that fit both limits."""
    first = request.num_scheduled + start
    lens = request.lens[request.order[first : first + max(max_texts, 0)]]
    if not len(lens):
        return 0, 0
    sums = np.cumsum(lens)
    count = int(np.searchsorted(sums, max_tokens, side="right"))
    if count == 0 and takes_one:
        count = 1
    return count, int(sums[count - 1]) if count else 0
