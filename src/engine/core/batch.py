"""`ScheduledBatch` and `StepOutput`: what the scheduler asks for and what the runner answers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

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


@dataclass(slots=True)
class ScheduledBatch:
    """Who runs in this step, and how many tokens each. No phase flag: only counts.

    Arrays have one entry per scheduled sequence, sequences with one token first.

    Attributes:
        step_id: Counts up from 0.
        rows: [B] int32, state index of each sequence (its row in `SequenceTable` and in every
            device table).
        num_scheduled_tokens: [B] int32, >= 1.
        num_computed_tokens: [B] int32, tokens whose KV exists before this step.
        is_sampling: [B] bool, True where the step reaches the sequence's last token, so that a
            new one is sampled. The others are chunks of a longer prompt.
        needs_prompt_logprobs: [B] bool.
        new_rows: State indices (re)admitted in this step; the runner loads their settings.
        block_updates: Changes of the block table since the last batch.
        num_tokens: Sum of `num_scheduled_tokens`.
    """

    step_id: int
    rows: Int32Array
    num_scheduled_tokens: Int32Array
    num_computed_tokens: Int32Array
    is_sampling: npt.NDArray[np.bool_]
    needs_prompt_logprobs: npt.NDArray[np.bool_]
    new_rows: list[int] = field(default_factory=list)
    block_updates: list[BlockUpdate] = field(default_factory=list)
    num_tokens: int = 0

    @property
    def num_seqs(self) -> int:
        """Sequences in the batch."""
        return len(self.rows)


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
