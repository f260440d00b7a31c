"""From the chosen rows and token counts to a `ScheduledBatch`, in NumPy alone."""

from __future__ import annotations

import numpy as np

from engine.core.batch import BlockUpdate, Int32Array, ScheduledBatch
from engine.core.state import IN_FLIGHT_TOKEN, IndexArray, SequenceTable


def build_batch(
    table: SequenceTable,
    rows: IndexArray,
    counts: Int32Array,
    *,
    step_id: int,
    new_rows: list[int],
    block_updates: list[BlockUpdate],
) -> tuple[ScheduledBatch, IndexArray]:
    """Order the sequences of a step and note in `table` that their next tokens are in flight.

    Args:
        table: Has `num_computed_tokens` advanced already.
        rows: [B] intp, state indices.
        counts: [B] int32, tokens of each in this step.
        step_id: Of the batch.
        new_rows: Of the batch.
        block_updates: Of the batch.

    Returns:
        The batch, and its rows as intp, the type that indexes fastest.
    """
    num_tokens = int(counts.sum())
    if num_tokens > len(rows):
        is_decode = counts == 1
        order = np.concatenate([np.flatnonzero(is_decode), np.flatnonzero(~is_decode)])
        rows, counts = rows[order], counts[order]
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
