"""What the scheduler counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class SchedulerCounters:
    """Running totals; see `SchedulerStats` for their meaning."""

    peak_running: int = 0
    steps: int = 0
    preemptions: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0


@dataclass(slots=True, frozen=True)
class SchedulerStats:
    """A snapshot: totals since the start, and the load of now.

    Attributes:
        num_running: Sequences with a row.
        num_waiting: Sequences without one.
        num_steps_in_flight: Batches whose result is not back.
        peak_running: Most sequences that ever ran at once.
        steps: Batches scheduled.
        preemptions: Times a sequence lost its blocks.
        prefix_query_tokens: Prompt tokens looked up in the prefix cache at first admission.
        prefix_hit_tokens: Of these, tokens found.
        blocks_used: KV blocks with a user.
        blocks_cached: KV blocks that the prefix cache can find, in use or not.
        blocks_total: KV blocks that sequences can have (the padding block is not among them).
    """

    num_running: int
    num_waiting: int
    num_steps_in_flight: int
    peak_running: int
    steps: int
    preemptions: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    blocks_used: int
    blocks_cached: int
    blocks_total: int
