"""`Request` and `Sequence`: what a caller submitted, and the streams of tokens grown from it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from engine.outputs import FinishReason, RequestMetrics, TokenLogprobs
from engine.sampling_params import SamplingParams


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
        metrics: Timings, written by the engine thread.
        sequences: `params.n` of them.
        prompt_logprobs: Filled chunk by chunk when asked for; entry 0 is None.
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
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def is_finished(self) -> bool:
        """True once every answer has ended."""
        return all(seq.status is SequenceStatus.FINISHED for seq in self.sequences)


@dataclass(slots=True, eq=False)
class Sequence:
    """One stream of token ids: the prompt of its request and one answer to it.

    Attributes:
        request: Whom it answers.
        index: 0 … n-1 within the request.
        row: State index while RUNNING, else -1.
        status: See `SequenceStatus`.
        output_token_ids: New tokens known on the host.
        num_cached_tokens: Prompt tokens taken from the prefix cache at first admission.
        arrival_index: Order of arrival over all sequences of the engine; set by the scheduler.
        needs_host_sync: The next step needs this sequence's last token on the host (bad words of
            several tokens), so it is never scheduled ahead of its own output.
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
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt tokens plus new tokens known on the host."""
        return self.request.num_prompt_tokens + len(self.output_token_ids)
