"""`Request` and `Sequence`: what a caller submitted, and the streams of tokens grown from it."""

from __future__ import annotations

import enum
from collections import abc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from engine.outputs import FinishReason, RequestMetrics, TokenLogprobs
from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.constraints.compiler import CompiledConstraint
    from engine.constraints.sequence import SequenceConstraint

_MASK64 = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


class SequenceStatus(enum.Enum):
    """Where a sequence is. WAITING -> RUNNING (-> WAITING when preempted) -> FINISHED."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One submitted prompt with its options. Owned by the engine thread after submit.

    Attributes:
        request_id: Unique in the process.
        prompt_token_ids: What the model sees, BOS included; at least one id.
        params: Options; never changed.
        stop_token_ids: End-of-sequence ids of the model (unless `ignore_eos`) and the caller's.
        max_total_tokens: Prompt plus new tokens at most, already bounded by the context.
        seed: Base of the draws; the caller's or a fresh one.
        prompt: The prompt as text, if it came as text.
        priority: Smaller runs sooner; equal ones first come, first served.
        cache_salt: Requests with different salts never share prefix-cache blocks.
        bad_words_ids: `params.bad_words` as token ids, one or two spellings each.
        constraint: What the answers must satisfy; None for free text.
        metrics: Timings, written by the engine thread.
        sequences: `params.n` of them.
        prompt_logprobs: Filled chunk by chunk when asked for; entry 0 is None.
        prompt_block_hashes: Hashes of the prompt's full KV blocks, kept by the scheduler so that
            n > 1 answers hash the prompt once.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    stop_token_ids: frozenset[int]
    max_total_tokens: int
    seed: int
    metrics: RequestMetrics
    prompt: str | None = None
    priority: int = 0
    cache_salt: str | None = None
    bad_words_ids: abc.Sequence[list[int]] = ()
    constraint: CompiledConstraint | None = None
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    prompt_block_hashes: list[bytes] = field(default_factory=list)
    _prompt_array: npt.NDArray[np.int32] | None = field(default=None, init=False, repr=False)

    def prompt_array(self) -> npt.NDArray[np.int32]:
        """The prompt as [num_prompt_tokens] int32, made once.

        A long list takes a while to convert (about 40 µs per 1000 ids): call this or
        `set_prompt_array` before submit, and that time is spent on the caller's thread.
        """
        if self._prompt_array is None:
            self._prompt_array = np.array(self.prompt_token_ids, dtype=np.int32)
        return self._prompt_array

    def set_prompt_array(self, token_ids: npt.NDArray[np.int32]) -> None:
        """Give what `prompt_array` would make."""
        self._prompt_array = token_ids

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def is_finished(self) -> bool:
        """True once every answer has ended."""
        return all(seq.status is SequenceStatus.FINISHED for seq in self.sequences)

    def forget_sequences(self) -> None:
        """Let go of the sequences once all have ended, so that both are freed at once.

        They refer to each other. Left to Python's collector, a dozen objects a request bring on the
        full collections that stop the process for tenths of a second.
        """
        self.sequences.clear()


@dataclass(slots=True, eq=False)
class Sequence:
    """One stream of token ids: the prompt of its request and one answer to it.

    Attributes:
        request: Whom it answers.
        index: 0 … n-1 within the request.
        row: State index while RUNNING, else -1.
        status: See `SequenceStatus`.
        output_token_ids: New tokens; written when the sequence leaves its row (finished or
            preempted). While it runs, `Scheduler.output_tokens` reads them from the table.
        num_cached_tokens: Prompt tokens taken from the prefix cache at first admission.
        arrival_index: Order of arrival over all sequences of the engine; set by the scheduler.
        needs_host_sync: The next step needs this sequence's last token on the host (bad words of
            several tokens, constraints), so it is never scheduled ahead of its own output. Set
            before `add`.
        constraint: Follows the answer's tokens; None for free text. Set before `add`.
        wants_tokens: The host looks at each new token. The scheduler sets it for stop strings and
            logprobs.
        num_preemptions: Times it lost its row and KV blocks and was recomputed.
        block_hashes: Hashes of its full KV blocks as far as needed; kept by the scheduler.
        finish_reason: Set when FINISHED.
        stop_reason: As in `CompletionOutput`.
    """

    request: Request
    index: int
    row: int = -1
    status: SequenceStatus = SequenceStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    arrival_index: int = -1
    needs_host_sync: bool = False
    constraint: SequenceConstraint | None = None
    wants_tokens: bool = False
    num_preemptions: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt tokens plus `output_token_ids`; not up to date while RUNNING."""
        return self.request.num_prompt_tokens + len(self.output_token_ids)

    @property
    def seed(self) -> int:
        """Base of this answer's draws (see `answer_seed`)."""
        return answer_seed(self.request.seed, self.index)


def answer_seed(seed: int, index: int) -> int:
    """Unsigned 64-bit seed of answer `index` of a request, so that answers differ under one seed.

    The finalizer of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", OOPSLA 2014) over the seed advanced by its golden-ratio step.

    Args:
        seed: The request's seed; negative ones count modulo 2^64.
        index: Which of the `n` answers, >= 0.
    """
    z = (seed + (index + 1) * _GOLDEN_GAMMA) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
