"""`SequenceTable`: the state of all running sequences as a struct of NumPy arrays."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.core.request import Sequence, SequenceStatus

IndexArray = npt.NDArray[np.intp]
Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]
Allocate = Callable[[tuple[int, ...], Any], npt.NDArray[Any]]
"""(shape, dtype) -> zeroed, contiguous array; `np.zeros`, or a runner's pinned memory."""

IN_FLIGHT_TOKEN = -1
"""Stands in `token_ids` for a token sampled by a step whose result is not back yet."""
_INITIAL_STOP_IDS = 8


class SequenceTable:
    """One row, its *state index*, per running sequence. Arrays first, Python objects second.

    Steps read and write these arrays by `array[rows]` with intp `rows`, and by `array[:, column]
    [rows]`: such calls keep the GIL below 500 elements. NumPy gives it up for pairs of indices, for
    a scalar beside an array of indices, for int32 indices and for values of another dtype, and
    beside a busy thread of the application it takes 5 ms to come back (counted with NumPy 2.4).

    A row belongs to a sequence from admission until it finishes or is preempted. Reading and
    writing is left to the engine thread. S is `max_num_seqs`::

        token_ids[row]   | prompt … | known new tokens … | -1 -1 | unused
                                                         ▲       ▲
                              num_tokens - num_in_flight ┘       └ num_tokens

    Attributes:
        token_ids: [S, max_model_len] int32. Memory is committed by the system as it is written.
        block_table: [S, max_blocks] int32, logical to physical block ids, 0 where unused.
        num_blocks: [S] int32, entries of `block_table` in use.
        num_tokens: [S] int32, tokens known on the host plus tokens in flight.
        num_computed_tokens: [S] int32, tokens whose KV exists once all launched steps have run.
        num_in_flight: [S] int32, tokens sampled by launched steps and not returned yet.
        num_prompt_tokens: [S] int32.
        min_total_tokens: [S] int32, `num_tokens` below which stop ids are ignored.
        max_total_tokens: [S] int32, `num_tokens` at which the sequence ends.
        stop_ids: [S, K] int32, padded with -1. Replaced by a wider array when a sequence brings
            more than K ids, so read the attribute anew for each step.
        num_stop_columns: Columns of `stop_ids` that any sequence so far has used.
        epoch: [S] int64, counts how often the row was freed or what was in flight dropped: a result
            launched under another epoch belongs to a former owner, or to nobody.
        wants_tokens: [S] bool, the host looks at every token.
        wants_logprobs: [S] bool, `params.logprobs` is set.
        needs_host_sync: [S] bool, see `Sequence`.
        is_constrained: [S] bool, the answer must satisfy a constraint.
        guesses: [S] bool, its next token needs neither a mask nor the last one on the host.
        needs_prompt_logprobs: [S] bool, chunks of the prompt report log probabilities.
        sequences: Owner of each row, or None.
        num_wanting_logprobs: Rows with `wants_logprobs`. Counted, as the next three, so that a step
            need not look through all rows for what is rare.
        num_host_synced: Rows with `needs_host_sync`.
        num_constrained: Rows with `is_constrained`.
        num_reporting_prompts: Rows with `needs_prompt_logprobs`.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        allocate: Allocate = np.zeros,
    ) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.max_blocks = -(-max_model_len // block_size)
        self._allocate = allocate
        self.token_ids: Int32Array = allocate((max_num_seqs, max_model_len), np.int32)
        self.block_table: Int32Array = allocate((max_num_seqs, self.max_blocks), np.int32)
        self.num_blocks: Int32Array = allocate((max_num_seqs,), np.int32)
        self.num_tokens: Int32Array = allocate((max_num_seqs,), np.int32)
        self.num_computed_tokens: Int32Array = allocate((max_num_seqs,), np.int32)
        self.num_in_flight: Int32Array = allocate((max_num_seqs,), np.int32)
        self.num_prompt_tokens: Int32Array = allocate((max_num_seqs,), np.int32)
        self.min_total_tokens: Int32Array = allocate((max_num_seqs,), np.int32)
        self.max_total_tokens: Int32Array = allocate((max_num_seqs,), np.int32)
        self.stop_ids: Int32Array = self._new_stop_ids(_INITIAL_STOP_IDS)
        self.num_stop_columns = 0
        self.epoch: npt.NDArray[np.int64] = allocate((max_num_seqs,), np.int64)
        self.wants_tokens: BoolArray = allocate((max_num_seqs,), np.bool_)
        self.wants_logprobs: BoolArray = allocate((max_num_seqs,), np.bool_)
        self.needs_host_sync: BoolArray = allocate((max_num_seqs,), np.bool_)
        self.is_constrained: BoolArray = allocate((max_num_seqs,), np.bool_)
        self.guesses: BoolArray = allocate((max_num_seqs,), np.bool_)
        self.needs_prompt_logprobs: BoolArray = allocate((max_num_seqs,), np.bool_)
        self.sequences: list[Sequence | None] = [None] * max_num_seqs
        self.num_wanting_logprobs = self.num_host_synced = self.num_reporting_prompts = 0
        self.num_constrained = 0
        self._rows_with_changed_tokens: set[int] = set()
        # A heap: low rows are used first, so that a small load touches few pages.
        self._free_rows = list(range(max_num_seqs))

    @property
    def num_free_rows(self) -> int:
        """Sequences that can still be admitted."""
        return len(self._free_rows)

    def admit(self, seq: Sequence, num_cached_tokens: int) -> int:
        """Give `seq` a row and fill it from its prompt and the new tokens it has already.

        Args:
            seq: A waiting sequence; its `row` and `status` are set.
            num_cached_tokens: Leading tokens whose KV exists already.

        Returns:
            The state index. Block table entries are left to `BlockTables`.
        """
        request, params = seq.request, seq.request.params
        row = heapq.heappop(self._free_rows)
        num_prompt_tokens = request.num_prompt_tokens
        # As memory: a long copy between arrays gives up the GIL.
        self.token_ids[row, :num_prompt_tokens].data[:] = request.prompt_array().data
        if seq.output_token_ids:
            self.token_ids[row, num_prompt_tokens : seq.num_tokens] = seq.output_token_ids
        self.num_tokens[row] = seq.num_tokens
        self.num_computed_tokens[row] = num_cached_tokens
        self.num_in_flight[row] = 0
        self.num_prompt_tokens[row] = num_prompt_tokens
        self.min_total_tokens[row] = min(
            num_prompt_tokens + params.min_tokens, request.max_total_tokens
        )
        self.max_total_tokens[row] = request.max_total_tokens
        self._set_stop_ids(row, sorted(request.stop_token_ids))
        self.wants_tokens[row] = seq.wants_tokens
        self.wants_logprobs[row] = params.logprobs is not None
        self.needs_host_sync[row] = seq.needs_host_sync
        self.is_constrained[row] = seq.constraint is not None
        self.guesses[row] = False
        self.needs_prompt_logprobs[row] = reports_prompt_logprobs(seq)
        self._count_kinds(row, 1)
        self.sequences[row] = seq
        seq.row, seq.status = row, SequenceStatus.RUNNING
        return row

    def free(self, row: int) -> None:
        """Take the row from its owner, whose `output_token_ids` get all tokens known by now."""
        seq = self.sequences[row]
        assert seq is not None, f"row {row} is freed twice"
        seq.output_token_ids = self.output_tokens(row)
        seq.row = -1
        self._count_kinds(row, -1)
        self.sequences[row] = None
        self.epoch[row] += 1
        self._rows_with_changed_tokens.discard(row)
        # Whoever gathers over rows by mistake sees nothing to do in a free one.
        for counts in (self.num_tokens, self.num_computed_tokens, self.num_in_flight):
            counts[row] = 0
        heapq.heappush(self._free_rows, row)

    def put_tokens(self, rows: IndexArray, places: Int32Array, token_ids: Int32Array | int) -> None:
        """Write one token id of each row.

        Args:
            rows: [R] state indices.
            places: [R] positions.
            token_ids: [R] int32, or one for all.
        """
        self.token_ids.reshape(-1)[rows * self.max_model_len + places] = token_ids

    def output_tokens(self, row: int, start: int = 0) -> list[int]:
        """New token ids known on the host, from the `start`-th on."""
        first = int(self.num_prompt_tokens[row]) + start
        end = int(self.num_tokens[row] - self.num_in_flight[row])
        return self.token_ids[row, first:end].tolist()  # type: ignore[no-any-return]

    def drop_in_flight(self, row: int, num_computed_tokens: int) -> None:
        """What launched steps sample for the row does not count, and its newest token is known.

        Args:
            row: State index.
            num_computed_tokens: Leading tokens whose KV is right, if that many are computed.
        """
        num_dropped = int(self.num_in_flight[row])
        self.num_tokens[row] -= num_dropped
        self.num_in_flight[row] = 0
        self.num_computed_tokens[row] = min(int(self.num_computed_tokens[row]), num_computed_tokens)
        self.epoch[row] += 1
        self.note_tokens_changed(row)

    def note_tokens_changed(self, row: int) -> None:
        """The host has appended tokens to the row, or taken one back, of its own accord."""
        self._rows_with_changed_tokens.add(row)

    def take_rows_with_changed_tokens(self) -> list[int]:
        """Rows where that has happened since the last call, for whoever copies tokens."""
        if not self._rows_with_changed_tokens:
            return []
        rows = sorted(self._rows_with_changed_tokens)
        self._rows_with_changed_tokens.clear()
        return rows

    def rows_needing_host_sync(self, rows: npt.NDArray[Any]) -> list[int]:
        """Those of `rows` [B] with `needs_host_sync`; usually none."""
        if not self.num_host_synced:
            return []
        return rows[self.needs_host_sync[rows]].tolist()  # type: ignore[no-any-return]

    def _count_kinds(self, row: int, change: int) -> None:
        self.num_wanting_logprobs += change * int(self.wants_logprobs[row])
        self.num_host_synced += change * int(self.needs_host_sync[row])
        self.num_constrained += change * int(self.is_constrained[row])
        self.num_reporting_prompts += change * int(self.needs_prompt_logprobs[row])

    def _set_stop_ids(self, row: int, stop_ids: list[int]) -> None:
        width = self.stop_ids.shape[1]
        if len(stop_ids) > width:
            wider = self._new_stop_ids(1 << (len(stop_ids) - 1).bit_length())
            wider[:, :width] = self.stop_ids
            self.stop_ids = wider
        self.num_stop_columns = max(self.num_stop_columns, len(stop_ids))
        self.stop_ids[row] = -1
        self.stop_ids[row, : len(stop_ids)] = stop_ids

    def _new_stop_ids(self, width: int) -> Int32Array:
        stop_ids: Int32Array = self._allocate((self.max_num_seqs, width), np.int32)
        stop_ids[...] = -1
        return stop_ids


def reports_prompt_logprobs(seq: Sequence) -> bool:
    """True while log probabilities of the prompt are still to be computed with `seq`.

    The n answers share one prompt, so only the first computes them, and not again when it is
    resumed with new tokens: those cannot exist before the whole prompt was computed.
    """
    return (
        seq.request.params.prompt_logprobs is not None
        and seq.index == 0
        and not seq.output_token_ids
    )
