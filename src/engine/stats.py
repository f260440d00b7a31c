"""`EngineStats`: what an engine has done and is doing."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.core.scheduler_stats import SchedulerStats

_RATE_WINDOW_S = 5.0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of one engine. Counts run since the engine started.

    Attributes:
        running: Sequences in the current steps.
        waiting: Sequences submitted but not (or, after preemption, not again) admitted.
        peak_running: Most sequences that ever ran at once.
        kv_blocks_used: Blocks held by running sequences.
        kv_blocks_total: Blocks there are for sequences.
        prefix_hit_tokens: Prompt tokens whose KV was found in the prefix cache.
        prefix_query_tokens: Prompt tokens looked up.
        requests_finished: Requests that ended with an output, aborted ones included.
        requests_failed: Requests that ended with an error.
        requests_aborted: Requests given up by their callers.
        prompt_tokens: Prompt tokens of the requests admitted so far.
        output_tokens: Sampled tokens.
        preemptions: Times a sequence lost its blocks to another.
        steps: Steps run.
        tokens_per_s: Output tokens per second over the last 5 seconds.
        host_ms_per_step: Mean time of the engine thread per step without waiting for the device.
        weight_bytes: Size of the weights.
        kv_cache_bytes: Size of the KV cache.
        start_s: Seconds from the constructor to ready.
    """

    running: int
    waiting: int
    peak_running: int
    kv_blocks_used: int
    kv_blocks_total: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    requests_finished: int
    requests_failed: int
    requests_aborted: int
    prompt_tokens: int
    output_tokens: int
    preemptions: int
    steps: int
    tokens_per_s: float
    host_ms_per_step: float
    weight_bytes: int
    kv_cache_bytes: int
    start_s: float

    @property
    def prefix_hit_rate(self) -> float:
        """Share of looked-up prompt tokens found in the prefix cache, 0 to 1."""
        if self.prefix_query_tokens == 0:
            return 0.0
        return self.prefix_hit_tokens / self.prefix_query_tokens


class Counters:
    """The engine thread's running counts. Written by that thread, read by any."""

    def __init__(self) -> None:
        self.requests_finished = 0
        self.requests_failed = 0
        self.requests_aborted = 0
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.steps = 0
        self.host_s = 0.0
        self._recent: deque[tuple[float, int]] = deque()

    def count_steps(self, num_steps: int, num_new_tokens: int, host_s: float) -> None:
        """Steps ended: `num_new_tokens` were sampled, the host worked for `host_s` seconds."""
        now = time.monotonic()
        self.steps += num_steps
        self.output_tokens += num_new_tokens
        self.host_s += host_s
        self._recent.append((now, num_new_tokens))
        while self._recent and now - self._recent[0][0] > _RATE_WINDOW_S:
            self._recent.popleft()

    def snapshot(
        self,
        scheduler: SchedulerStats,
        *,
        weight_bytes: int,
        kv_cache_bytes: int,
        start_s: float,
    ) -> EngineStats:
        """These counts, the scheduler's and the engine's sizes as one `EngineStats`."""
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            peak_running=scheduler.peak_running,
            kv_blocks_used=scheduler.blocks_used,
            kv_blocks_total=scheduler.blocks_total,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            prefix_query_tokens=scheduler.prefix_query_tokens,
            requests_finished=self.requests_finished,
            requests_failed=self.requests_failed,
            requests_aborted=self.requests_aborted,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            preemptions=scheduler.preemptions,
            steps=self.steps,
            tokens_per_s=self.tokens_per_s(),
            host_ms_per_step=1e3 * self.host_s / max(self.steps, 1),
            weight_bytes=weight_bytes,
            kv_cache_bytes=kv_cache_bytes,
            start_s=start_s,
        )

    def tokens_per_s(self) -> float:
        """Output tokens per second over the last few seconds."""
        recent = list(self._recent)
        now = time.monotonic()
        recent = [(when, count) for when, count in recent if now - when <= _RATE_WINDOW_S]
        if len(recent) < 2:
            return 0.0
        duration_s = max(now - recent[0][0], 1e-6)
        return sum(count for _, count in recent) / duration_s
