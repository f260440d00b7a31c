"""What the scheduler asks for, what the runner answers, and what a completed step means."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.core.pieces import pieces
from engine.core.request import Sequence

Int32Array = npt.NDArray[np.int32]


@dataclass(slots=True)
class BlockUpdate:
    """New entries of one row of the block table since the last batch.

    Attributes:
        row: State index.
        start: First logical block that changed.
        block_ids: Physical ids of `start`, `start + 1`, …
    """

    row: int
    start: int
    block_ids: list[int]


@dataclass(slots=True, frozen=True)
class PrefixGroup:
    """Decoding sequences of one batch with equal leading KV blocks (see `core.prefix_groups`).

    Attributes:
        members: [M] int32, their places in the batch.
        num_blocks: Leading blocks that all of them share: full ones, and fewer than any member
            has.
    """

    members: Int32Array
    num_blocks: int


@dataclass(slots=True)
class ScheduledBatch:
    """Who runs in this step, and how many tokens each. No phase flag: only counts.

    Arrays have one entry per scheduled sequence, sequences with one token first (a prompt whose
    rest is one token counts among them). The arrays are new for every batch and never written
    again, so a runner may keep them while later batches are scheduled.

    An input token that was sampled by a step still in flight is -1 in
    `SequenceTable.token_ids`; the runner takes it from the device. All sequences of a batch may
    share KV blocks written in this very step: in every layer the KV of all tokens has to be
    written before any attention reads it.

    Attributes:
        step_id: Counts up from 0.
        rows: [B] intp, state index of each sequence (its row in `SequenceTable` and in every
            device table).
        num_scheduled_tokens: [B] int32, >= 1.
        num_computed_tokens: [B] int32, tokens whose KV exists before this step.
        is_sampling: [B] bool, True where the step reaches the sequence's last token, so that a
            new one is sampled. The others are chunks of a longer prompt.
        needs_prompt_logprobs: [B] bool.
        new_rows: State indices (re)admitted in this step; the runner loads their settings.
        block_updates: Changes of the block table since the last batch. For a new row one update
            from block 0 on, which replaces the row.
        num_tokens: Sum of `num_scheduled_tokens`.
        prefix_groups: Sequences with one token that share KV blocks; disjoint. Empty where the
            scheduler was not asked to look.
    """

    step_id: int
    rows: npt.NDArray[np.intp]
    num_scheduled_tokens: Int32Array
    num_computed_tokens: Int32Array
    is_sampling: npt.NDArray[np.bool_]
    needs_prompt_logprobs: npt.NDArray[np.bool_]
    new_rows: list[int] = field(default_factory=list)
    block_updates: list[BlockUpdate] = field(default_factory=list)
    num_tokens: int = 0
    prefix_groups: list[PrefixGroup] = field(default_factory=list)

    @property
    def num_seqs(self) -> int:
        """Sequences in the batch."""
        return len(self.rows)

    @property
    def num_decodes(self) -> int:
        """Leading sequences with one token."""
        if self.num_tokens == len(self.rows):
            return len(self.rows)
        counts = self.num_scheduled_tokens
        return sum(int(np.count_nonzero(counts[one] == 1)) for one in pieces(len(counts)))


@dataclass(slots=True)
class TokenLogprobArrays:
    """Raw log probabilities of R positions, on the host.

    Attributes:
        token_ids: [R, K+1] int64: column 0 is the position's own token, then the top K.
        logprobs: [R, K+1] float32.
        ranks: [R] int64, rank of the position's own token, 1 = likeliest.
    """

    token_ids: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int64]


@dataclass(slots=True)
class StepOutput:
    """What one step produced, on the host.

    Attributes:
        token_ids: [B] int64 in the order of the batch; -1 where `is_sampling` is False.
        logprobs: For rows that asked for logprobs and sampled: row -> arrays with R = 1.
        prompt_logprobs: For rows with `needs_prompt_logprobs`: row -> arrays with one R per prompt
            token predicted in this step (a token at position p predicts position p + 1).
    """

    token_ids: npt.NDArray[np.int64]
    logprobs: dict[int, TokenLogprobArrays] = field(default_factory=dict)
    prompt_logprobs: dict[int, TokenLogprobArrays] = field(default_factory=dict)


class SequenceRow(NamedTuple):
    """A sequence and the state index it ran in; `seq.row` is -1 once it has finished."""

    seq: Sequence
    row: int


@dataclass(slots=True)
class CompletedStep:
    """What the host learned from one step. Sequences that ended before it came back are left out.

    Attributes:
        step_id: Of the batch.
        finished: Sequences that ended with this step by a stop id or their length, in batch order.
            Their `finish_reason`, `stop_reason` and `output_token_ids` are set; row and blocks
            are free again.
        watched: Sequences with `wants_tokens` that got a token, finished ones included, in batch
            order. `Scheduler.output_tokens(seq, start)` has it; the row is the key into
            `StepOutput.logprobs`.
        first_tokens: Sequences whose first new token this step has brought.
        failed: Sequences whose constraint cannot go on; still running, the caller has to end them.
        num_new_tokens: Tokens sampled for live sequences, watched or not.
    """

    step_id: int
    finished: list[SequenceRow] = field(default_factory=list)
    watched: list[SequenceRow] = field(default_factory=list)
    first_tokens: list[Sequence] = field(default_factory=list)
    failed: list[Sequence] = field(default_factory=list)
    num_new_tokens: int = 0
