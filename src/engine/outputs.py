"""What a request gives back: whole outputs, streamed deltas, usage and timings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FinishReason = Literal["stop", "length", "abort"]


@dataclass(slots=True, frozen=True)
class Logprob:
    """Log probability of one token at one position, from the raw logits.

    Attributes:
        logprob: Natural logarithm of the probability, <= 0.
        rank: 1 for the likeliest token of the vocabulary.
        decoded_token: The token's text; bytes that are no UTF-8 by themselves show as U+FFFD.
    """

    logprob: float
    rank: int
    decoded_token: str


TokenLogprobs = dict[int, Logprob]
"""Token id -> `Logprob` for one position: the sampled (or prompt) token and the top ones."""


@dataclass(slots=True, frozen=True)
class Usage:
    """Token counts of one request.

    Attributes:
        prompt_tokens: Tokens of the prompt, counted once however many answers it has.
        completion_tokens: Tokens of all answers together.
        cached_tokens: Prompt tokens whose KV came from the prefix cache (first answer).
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion tokens together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(slots=True)
class RequestMetrics:
    """Timings of one request, seconds on the monotonic clock.

    Attributes:
        arrival_s: When `submit` was called.
        first_scheduled_s: When its first token entered a step.
        first_token_s: When its first new token was known on the host.
        finished_s: When its last answer ended.
        num_preemptions: Times it lost its KV blocks and was recomputed.
    """

    arrival_s: float
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    num_preemptions: int = 0

    @property
    def queue_s(self) -> float | None:
        """Seconds from submit to the first scheduled token."""
        if self.first_scheduled_s is None:
            return None
        return self.first_scheduled_s - self.arrival_s

    @property
    def time_to_first_token_s(self) -> float | None:
        """Seconds from submit to the first new token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def total_s(self) -> float | None:
        """Seconds from submit to the end."""
        return None if self.finished_s is None else self.finished_s - self.arrival_s

    def tokens_per_s(self, completion_tokens: int) -> float | None:
        """Decode rate after the first token; `None` while unknown or with fewer than 2 tokens."""
        if self.first_token_s is None or self.finished_s is None or completion_tokens < 2:
            return None
        duration_s = self.finished_s - self.first_token_s
        return (completion_tokens - 1) / duration_s if duration_s > 0 else None


@dataclass(slots=True)
class CompletionOutput:
    """One answer of a request.

    Attributes:
        index: 0 … n-1.
        text: The answer, without the stop string unless asked for.
        token_ids: Sampled ids, end-of-sequence and stop ids included when they were sampled.
        finish_reason: "stop", "length", "abort", or None while running.
        stop_reason: The stop string or stop token id that ended it; None for end-of-sequence.
        logprobs: One `TokenLogprobs` per token id, when asked for.
        cumulative_logprob: Sum of the sampled tokens' log probabilities, when asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """A finished request.

    Attributes:
        request_id: Unique in the process.
        prompt: The prompt as text; None where token ids were submitted.
        prompt_token_ids: What the model saw, BOS included.
        outputs: The answers by index.
        usage: Token counts.
        metrics: Timings.
        prompt_logprobs: One entry per prompt token, None for the first, when asked for.
        finished: Always True; there so that code written for vLLM reads on.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    usage: Usage
    metrics: RequestMetrics
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finished: bool = True

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens taken from the prefix cache, under vLLM's name."""
        return self.usage.cached_tokens


@dataclass(slots=True)
class PoolingOutput:
    """The vectors of one list of texts. N texts.

    Attributes:
        vectors: [N, width] float32: embeddings as `Engine.embed` was asked for them, or, of
            `Engine.score`, the one-column scores.
        usage: Tokens of all texts; none are generated.
        metrics: Timings of the list as a whole.
    """

    vectors: npt.NDArray[np.float32]
    usage: Usage
    metrics: RequestMetrics


@dataclass(slots=True)
class Delta:
    """What is new in one answer since the last delta. Deltas may cover several tokens.

    Attributes:
        index: Which answer of the request, 0 … n-1.
        text: New text; never part of a stop string, never half a UTF-8 character.
        token_ids: New ids.
        finish_reason: Set on the last delta of this answer.
        stop_reason: As in `CompletionOutput`.
        logprobs: One entry per new id, when asked for.
        usage: Token counts so far; set on the request's very last delta.
        metrics: Timings; set on the request's very last delta.
    """

    index: int
    text: str
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None
    usage: Usage | None = None
    metrics: RequestMetrics | None = None
