"""From the chosen rows and token counts to a `ScheduledBatch`, in NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.core.batch import BlockUpdate, Int32Array, ScheduledBatch
from engine.core.pieces import gathered, joined, pieces
from engine.core.state import IN_FLIGHT_TOKEN, BoolArray, IndexArray, SequenceTable


@dataclass(slots=True)
class StepInFlight:
    """A batch whose result is not back, with the owners of its rows at that time."""

    batch: ScheduledBatch
    rows: IndexArray
    epochs: npt.NDArray[np.int64]


@dataclass(slots=True)
class NewRows:
    """Sequences admitted by one `schedule`."""

    rows: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


def build_batch(
    table: SequenceTable,
    rows: IndexArray,
    counts: Int32Array,
    *,
    num_tokens: int,
    step_id: int,
    new_rows: list[int],
    block_updates: list[BlockUpdate],
) -> tuple[ScheduledBatch, IndexArray]:
    """Order the sequences of a step and note in `table` that their next tokens are in flight.

    Args:
        table: Has `num_computed_tokens` advanced already.
        rows: [B] intp, state indices.
        counts: [B] int32, tokens of each in this step.
        num_tokens: Sum of `counts`.
        step_id: Of the batch.
        new_rows: Of the batch.
        block_updates: Of the batch.

    Returns:
        The batch, and its rows as intp, the type that indexes fastest.
    """
    if num_tokens > len(rows):
        rows, counts = _decodes_first(rows, counts)
    parts = [_take_part(table, rows[piece], counts[piece]) for piece in pieces(len(rows))]
    starts, is_sampling, needs_prompt_logprobs = (
        joined(list(one)) for one in zip(*parts, strict=True)
    )
    batch = ScheduledBatch(
        step_id=step_id,
        rows=rows,
        num_scheduled_tokens=counts,
        num_computed_tokens=starts,
        is_sampling=is_sampling,
        needs_prompt_logprobs=needs_prompt_logprobs,
        new_rows=new_rows,
        block_updates=block_updates,
        num_tokens=num_tokens,
    )
    return batch, rows


def _decodes_first(rows: IndexArray, counts: Int32Array) -> tuple[IndexArray, Int32Array]:
    decodes, others = [], []
    for piece in pieces(len(rows)):
        is_decode = counts[piece] == 1
        decodes.append(np.flatnonzero(is_decode) + piece.start)
        others.append(np.flatnonzero(~is_decode) + piece.start)
    order = np.concatenate(decodes + others)
    return gathered(rows, order), gathered(counts, order)


def _take_part(
    table: SequenceTable, rows: IndexArray, counts: Int32Array
) -> tuple[Int32Array, BoolArray, BoolArray]:
    """`num_computed_tokens`, `is_sampling` and `needs_prompt_logprobs` of some rows of a batch."""
    ends = table.num_computed_tokens[rows]
    starts = ends - counts
    lengths = table.num_tokens[rows]
    is_sampling = ends == lengths

    needs_prompt_logprobs = table.needs_prompt_logprobs[rows]
    if table.num_reporting_prompts:
        # The last prompt token's logits are about the first new token.
        needs_prompt_logprobs &= starts < table.num_prompt_tokens[rows] - 1

    sampling_rows = rows[is_sampling]
    table.put_tokens(sampling_rows, lengths[is_sampling], IN_FLIGHT_TOKEN)
    table.num_tokens[sampling_rows] += 1
    table.num_in_flight[sampling_rows] += 1
    return starts, is_sampling, needs_prompt_logprobs
