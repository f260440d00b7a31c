"""What sampled tokens mean for the constraints of their sequences. Python per constrained one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.core.batch import CompletedStep
from engine.core.request import Sequence
from engine.core.sampled_tokens import SampledTokens
from engine.core.state import BoolArray, IndexArray, SequenceTable

_MISSING_SHARE = 8
"""A step ahead is not worth while where one in this many sequences would miss it."""


def waits_for_masks(table: SequenceTable, running: IndexArray, rows: IndexArray) -> bool:
    """Whether a step of `rows` had better wait for the one in flight.

    Every sequence whose mask depends on the step in flight would miss this one. Where all rows are
    constrained, and not only a few of them miss it, more steps would be run than time is saved.

    Args:
        table: Has the sequences.
        running: [running] state indices.
        rows: [R] of these, who could take part.
    """
    if not table.num_constrained or not table.is_constrained[rows].all():
        return False
    num_missing = len(running) - len(rows)
    return num_missing * _MISSING_SHARE >= len(running)


def accept_tokens(
    table: SequenceTable, rows: IndexArray, token_ids: npt.NDArray[np.int64], samples: BoolArray
) -> BoolArray:
    """Show each constraint its sequence's new token; those that it refuses are taken back.

    A sequence whose token was taken back is as it was before the step: the next one computes its
    last token again and samples another. What later steps have sampled for it is dropped.

    Args:
        table: Changed in place for tokens taken back.
        rows: [B] state indices.
        token_ids: [B] what was sampled; -1 where nothing could be.
        samples: [B] bool, entries of live sequences that sampled.

    Returns:
        [B] bool: `samples` without the tokens taken back.
    """
    if not table.num_constrained:
        return samples
    kept = samples.copy()
    places = np.flatnonzero(samples & table.is_constrained[rows])
    held = rows[places]
    num_left = table.max_total_tokens[held] - table.num_tokens[held] + table.num_in_flight[held] - 1
    for index, row, token_id, left in zip(
        places.tolist(), held.tolist(), token_ids[places].tolist(), num_left.tolist(), strict=True
    ):
        constraint = _owner(table, row).constraint
        assert constraint is not None, "the row says that it is constrained"
        if token_id < 0 or constraint.accept(token_id, left):
            continue
        kept[index] = False
        table.guesses[row] = False
        num_known = int(table.num_tokens[row] - table.num_in_flight[row])
        table.drop_in_flight(row, num_known - 1)
    return kept


def append_forced(table: SequenceTable, sampled: SampledTokens, done: CompletedStep) -> None:
    """Append what must follow the new tokens, and end those whose constraint is complete.

    Where tokens are forced, what later steps have sampled in their place is dropped. Where none are
    and the next token needs a mask again, that which is sampled without one may do all the same.

    Args:
        table: Gets the forced tokens, as if they had been sampled.
        sampled: Stored already; `is_stop` and `is_finished` are set where an answer is complete.
        done: Gets the sequences whose constraint has an error, and the number of forced tokens.
    """
    if not table.num_constrained:
        return
    # Without a token (-1) the request is about to end with an error.
    has_token = table.is_constrained[sampled.rows] & (sampled.token_ids >= 0)
    places = np.flatnonzero(has_token)
    rows = sampled.rows[places]
    # Lists: one element of an array costs as much as a call of the library.
    starts = (table.num_tokens[rows] - table.num_in_flight[rows]).tolist()
    limits = table.max_total_tokens[rows].tolist()
    is_finished = sampled.is_finished[places].tolist()
    guesses: list[bool] = []
    for place, row in enumerate(rows.tolist()):
        seq, index = _owner(table, row), places[place]
        constraint = seq.constraint
        assert constraint is not None, "the row says that it is constrained"
        if constraint.error:
            done.failed.append(seq)
            guesses.append(False)
            continue
        if not is_finished[place]:
            start, limit = starts[place], limits[place]
            forced = constraint.take_forced(limit - start)
            if forced:
                if table.num_in_flight[row]:
                    table.drop_in_flight(row, start)
                end = start + len(forced)
                table.token_ids[row, start:end] = forced
                table.num_tokens[row] = end
                table.note_tokens_changed(row)
                done.num_new_tokens += len(forced)
                sampled.is_finished[index] = end == limit
        guesses.append(constraint.guesses)
        if constraint.is_complete:
            sampled.is_stop[index] = sampled.is_finished[index] = True
    table.guesses[rows] = guesses


def _owner(table: SequenceTable, row: int) -> Sequence:
    seq = table.sequences[row]
    assert seq is not None, f"row {row} has no owner"
    return seq
