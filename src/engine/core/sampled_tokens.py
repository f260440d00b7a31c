"""`SampledTokens`: what the tokens of a completed step mean, in NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.core.state import BoolArray, IndexArray, SequenceTable


@dataclass(slots=True)
class SampledTokens:
    """The new tokens of R live sequences.

    Attributes:
        rows: [R] intp, state indices.
        token_ids: [R] int64.
        is_stop: [R] bool, a stop id, and `min_tokens` is reached.
        is_finished: [R] bool, that, or the sequence has its full length.
        is_first: [R] bool, the sequence's first new token.
    """

    rows: IndexArray
    token_ids: npt.NDArray[np.int64]
    is_stop: BoolArray
    is_finished: BoolArray
    is_first: BoolArray


def store_sampled(
    table: SequenceTable, rows: IndexArray, token_ids: npt.NDArray[np.int64]
) -> SampledTokens:
    """Write each sequence's oldest token in flight into `table` and see what follows from it.

    Args:
        table: Changed in place.
        rows: [R] state indices of live sequences.
        token_ids: [R] their tokens.
    """
    places = table.num_tokens[rows] - table.num_in_flight[rows]
    table.put_tokens(rows, places, token_ids.astype(np.int32))
    table.num_in_flight[rows] -= 1
    num_known = places + 1
    is_stop = np.zeros(len(rows), dtype=np.bool_)
    # Column by column, one index each: see `SequenceTable` on the GIL.
    for column in range(table.num_stop_columns):
        is_stop |= table.stop_ids[:, column][rows] == token_ids
    is_stop &= num_known >= table.min_total_tokens[rows]
    # Unused columns are -1, and so is a token where nothing could be sampled.
    is_stop &= token_ids >= 0
    return SampledTokens(
        rows=rows,
        token_ids=token_ids,
        is_stop=is_stop,
        is_finished=is_stop | (num_known >= table.max_total_tokens[rows]),
        is_first=num_known == table.num_prompt_tokens[rows] + 1,
    )
