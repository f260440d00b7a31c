"""`TokenMasks`: one packed row of allowed tokens per constrained sequence, in host memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from engine.core.batch import ScheduledBatch
from engine.core.state import SequenceTable

if TYPE_CHECKING:
    from engine.constraints.sequence import SequenceConstraint

_MOST_THREADS = 8
_FEW_MASKS = 8
"""Masks that are made one by one, because waking threads takes longer."""


class TokenMasks:
    """The masks by state index. Engine thread only.

    A GPU reads them where they are, in pinned memory: a row is written again only when the token
    that it chose has been read back, so that no step in flight still needs the old one.

    Args:
        num_rows: N, state indices and the dummy row.
        vocab_size: V.
        is_pinned: For a GPU.

    Attributes:
        tensor: [N, ceil(V / 32)] int32; bit i % 32 of word i / 32 stands for token i.
        array: The same memory.
    """

    def __init__(self, num_rows: int, vocab_size: int, *, is_pinned: bool) -> None:
        num_words = -(-vocab_size // 32)
        self.tensor = torch.zeros((num_rows, num_words), dtype=torch.int32, pin_memory=is_pinned)
        self.array: npt.NDArray[np.int32] = self.tensor.numpy()
        # Rows whose mask allows everything, so that it need not be written again.
        self._is_open = np.zeros(num_rows, np.bool_)
        from llguidance import LLExecutor

        # A CPU's cores are busy with the model. Few masks do not repay more threads.
        num_threads = min(len(os.sched_getaffinity(0)), _MOST_THREADS) if is_pinned else 1
        self._executor = LLExecutor(num_threads)

    def fill(self, batch: ScheduledBatch, table: SequenceTable) -> None:
        """Masks of the constrained sequences that sample in `batch`; see `SequenceConstraint`.

        Args:
            batch: Its constrained sequences have no token in flight, but those that guess.
            table: Has the sequences.
        """
        samples = batch.rows[batch.is_sampling & table.is_constrained[batch.rows]]
        guesses = table.guesses[samples]
        newly_open = samples[guesses & ~self._is_open[samples]]
        self.array[newly_open] = -1
        self._is_open[newly_open] = True
        rows = samples[~guesses]
        self._is_open[rows] = False
        constraints: list[tuple[SequenceConstraint, int]] = []
        for row in rows.tolist():
            seq = table.sequences[row]
            if seq is None or seq.constraint is None:
                continue
            if seq.constraint.has_own_mask:
                seq.constraint.write_mask(self.array[row])
            else:
                constraints.append((seq.constraint, row))
        self._compute(constraints)
        for constraint, row in constraints:
            if constraint.bars_early_end:
                constraint.bar_early_end(self.array[row])

    def _compute(self, constraints: list[tuple[SequenceConstraint, int]]) -> None:
        """The masks that are the matchers' own. Gives up the GIL."""
        first, num_bytes = self.array.ctypes.data, self.array.strides[0]
        if len(constraints) <= _FEW_MASKS:
            for constraint, row in constraints:
                constraint.matcher.unsafe_compute_mask_ptr(first + row * num_bytes, num_bytes)
            return
        # The threads take neighbours: those that share a lexer would wait for each other.
        constraints = sorted(constraints, key=_lexer_of)
        self._executor.unsafe_compute_mask_ptr(
            [(constraint.matcher, row) for constraint, row in constraints],
            first,
            num_bytes,
            len(self.array),
        )


def _lexer_of(pair: tuple[SequenceConstraint, int]) -> int:
    return pair[0].lexer
