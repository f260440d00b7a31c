"""`Arrivals`: the tokens that a step has sampled, on their way into the sequence table.

A step cannot be scheduled before the tokens of the last one are known, where masks or jumps depend
on them. Where they do not, because the free text of a constrained answer goes on, they are
*postponed*: they count as in flight until the next step has been launched, and are looked at while
the device runs it (`settle`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.core.batch import CompletedStep, SequenceRow
from engine.core.batch_builder import StepInFlight
from engine.core.block_tables import BlockTables
from engine.core.constrained import accept_tokens, append_forced
from engine.core.pieces import pieces
from engine.core.request import Sequence
from engine.core.sampled_tokens import SampledTokens, store_sampled
from engine.core.state import BoolArray, IndexArray, SequenceTable


class _Postponed(NamedTuple):
    """Tokens that have arrived and have not been looked at: [R] each.

    `epochs` are those of the rows when the step was launched.
    """

    rows: IndexArray
    epochs: npt.NDArray[np.int64]
    token_ids: npt.NDArray[np.int64]


class Arrivals:
    """Takes in what steps have sampled. Engine thread only.

    Args:
        table: Gets the tokens.
        block_tables: Learn of blocks whose tokens are all known.
        postpones: Leave tokens for `settle`, where the device does not need them from the host.
    """

    def __init__(self, table: SequenceTable, block_tables: BlockTables, *, postpones: bool) -> None:
        self._table = table
        self._block_tables = block_tables
        self._postpones = postpones
        # [V] bool, of the model's vocabulary, once there is a constraint.
        self._is_plain: BoolArray | None = None
        self._postponed: list[_Postponed] = []

    @property
    def num_postponed(self) -> int:
        """Tokens that `settle` would look at."""
        return sum(len(one.rows) for one in self._postponed)

    def note_new(self, seq: Sequence) -> None:
        """A sequence will run."""
        if seq.constraint is not None:
            seq.constraint.may_guess &= self._postpones
            self._is_plain = seq.constraint.is_plain

    def take(
        self, step: StepInFlight, token_ids: npt.NDArray[np.int64], done: CompletedStep
    ) -> list[SampledTokens]:
        """A step's tokens; what was postponed before is settled already.

        Args:
            step: The oldest one.
            token_ids: [B] in the order of its batch; entries that do not sample are ignored.
            done: Is added to.

        Returns:
            Tokens of which some end their sequence: the caller has to end those.
        """
        table, batch = self._table, step.batch
        ended: list[SampledTokens] = []
        for piece in pieces(len(step.rows)):
            rows, epochs, ids = step.rows[piece], step.epochs[piece], token_ids[piece]
            is_live = table.epoch[rows] == epochs
            samples = batch.is_sampling[piece] & is_live
            computed = batch.num_computed_tokens[piece] + batch.num_scheduled_tokens[piece]
            self._block_tables.register_completed(rows[is_live], computed[is_live])
            if self._postpones and table.num_constrained and self._is_plain is not None:
                # Behind plain tokens text very likely goes on. -1 is no token.
                later = samples & table.guesses[rows] & (ids >= 0) & self._is_plain[ids]
                if later.any():
                    self._postponed.append(_Postponed(rows[later], epochs[later], ids[later]))
                    samples &= ~later
            self._take_in(rows, ids, samples, done, ended)
        return ended

    def settle(self, done: CompletedStep) -> list[SampledTokens]:
        """Look at the tokens that were postponed. As `take`."""
        ended: list[SampledTokens] = []
        postponed, self._postponed = self._postponed, []
        for rows, epochs, token_ids in postponed:
            self._take_in(rows, token_ids, self._table.epoch[rows] == epochs, done, ended)
        return ended

    def _take_in(
        self,
        rows: IndexArray,
        token_ids: npt.NDArray[np.int64],
        samples: BoolArray,
        done: CompletedStep,
        ended: list[SampledTokens],
    ) -> None:
        """Tokens of those of `rows` that `samples` names: store them and see what follows."""
        table = self._table
        samples = accept_tokens(table, rows, token_ids, samples)
        sampled = store_sampled(table, rows[samples], token_ids[samples])
        watched = sampled.rows[table.wants_tokens[sampled.rows]].tolist()
        done.watched += [SequenceRow(self._owner(row), row) for row in watched]
        first = sampled.rows[sampled.is_first].tolist()
        done.first_tokens += [self._owner(row) for row in first]
        done.num_new_tokens += len(sampled.rows)
        append_forced(table, sampled, done)
        if sampled.is_finished.any():
            ended.append(sampled)

    def _owner(self, row: int) -> Sequence:
        seq = self._table.sequences[row]
        assert seq is not None, f"row {row} has no owner"
        return seq
