"""`RunningPlan`: what the running sequences get of the next step, in NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.core.pieces import MAX_PIECE, joined, pieces
from engine.core.state import IndexArray, Int32Array, SequenceTable


@dataclass(slots=True)
class RunningPlan:
    """Tokens and blocks for those running sequences that take part. R of them.

    Attributes:
        rows: [R] intp, state indices in order of admission.
        counts: [R] int32, tokens of each, >= 1.
        missing_blocks: [R] int32, blocks each needs beyond those it has; <= 0 for most.
        num_tokens: Sum of `counts`.
        num_new_blocks: Sum of the positive `missing_blocks`.
    """

    rows: IndexArray
    counts: Int32Array
    missing_blocks: Int32Array
    num_tokens: int
    num_new_blocks: int


def plan_running(
    table: SequenceTable,
    running: IndexArray,
    max_num_tokens: int,
    block_size: int,
) -> RunningPlan:
    """Share `max_num_tokens` among the running sequences, first admitted first. Changes nothing.

    Since a prompt takes all tokens that are left, at most one is unfinished at any time, it is
    the last one admitted, and nothing is left for the waiting while it is. Thus nobody who shares
    its prefix can be admitted before that is computed.

    Args:
        table: State of the sequences.
        running: [running] state indices in order of admission.
        max_num_tokens: Token budget of the step.
        block_size: Tokens per KV block.
    """
    if len(running) <= MAX_PIECE:
        return _plan_piece(table, running, max_num_tokens, block_size)
    plans: list[RunningPlan] = []
    for piece in pieces(len(running)):
        left = max_num_tokens - sum(plan.num_tokens for plan in plans)
        plans.append(_plan_piece(table, running[piece], left, block_size))
    return RunningPlan(
        rows=joined([plan.rows for plan in plans]),
        counts=joined([plan.counts for plan in plans]),
        missing_blocks=joined([plan.missing_blocks for plan in plans]),
        num_tokens=sum(plan.num_tokens for plan in plans),
        num_new_blocks=sum(plan.num_new_blocks for plan in plans),
    )


def _plan_piece(
    table: SequenceTable, rows: IndexArray, max_num_tokens: int, block_size: int
) -> RunningPlan:
    computed = table.num_computed_tokens[rows]
    num_tokens = table.num_tokens[rows]
    counts = num_tokens - computed
    # A sequence's last token needs no KV: it only waits for results in flight.
    counts[num_tokens >= table.max_total_tokens[rows]] = 0
    if table.num_host_synced:
        waits = table.needs_host_sync[rows] & (table.num_in_flight[rows] > 0)
        counts[waits & ~table.guesses[rows]] = 0
    total = int(counts.sum())
    if total > max_num_tokens:
        before = np.cumsum(counts, dtype=np.int32) - counts
        counts = np.clip(max_num_tokens - before, 0, counts)
        total = max_num_tokens
    if not counts.all():
        takes_part = counts > 0
        rows, counts, computed = rows[takes_part], counts[takes_part], computed[takes_part]
    needed = (computed + counts + (block_size - 1)) // block_size
    # Negative where the blocks of later chunks were allocated at admission.
    missing = needed - table.num_blocks[rows]
    return RunningPlan(rows, counts, missing, total, int(np.maximum(missing, 0).sum()))
