"""Engine outputs and deltas -> LlamaIndex responses.

Token counts stand in `raw["usage"]`, where `TokenCountingHandler` looks, and flat in
`additional_kwargs`, where the vendors' classes put them. `raw` is a plain dict: some LlamaIndex
code calls `dict(response.raw)` on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LogProb,
    MessageRole,
    TextBlock,
)

from engine import Delta, Logprob, RequestMetrics, RequestOutput, Usage


@dataclass(slots=True)
class Answer:
    """What is known of the one answer of a request, whole or so far.

    Attributes:
        text: The answer's text up to now.
        delta: What the last delta added; None where nothing was streamed.
        raw: Set once the answer is complete: model, request id, finish and stop reason, usage and
            timings in seconds.
        usage: The counts of `raw["usage"]`, or empty.
        logprobs: Per token the sampled one first, then the likeliest others; set with `raw`.
    """

    text: str = ""
    delta: str | None = None
    raw: dict[str, Any] | None = None
    usage: dict[str, int] = field(default_factory=dict)
    logprobs: list[list[LogProb]] | None = None

    def as_chat(self) -> ChatResponse:
        """The answer as an assistant message of one text block."""
        message = ChatMessage(role=MessageRole.ASSISTANT, blocks=[TextBlock(text=self.text)])
        return ChatResponse(
            message=message,
            delta=self.delta,
            raw=self.raw,
            logprobs=self.logprobs,
            additional_kwargs=dict(self.usage),
        )

    def as_completion(self) -> CompletionResponse:
        """The answer as a completion."""
        return CompletionResponse(
            text=self.text,
            delta=self.delta,
            raw=self.raw,
            logprobs=self.logprobs,
            additional_kwargs=dict(self.usage),
        )


def whole_answer(output: RequestOutput, model_name: str) -> Answer:
    """The single answer of a finished request."""
    answer = output.outputs[0]
    return Answer(
        text=answer.text,
        raw=_raw(
            model_name,
            output.request_id,
            answer.finish_reason,
            answer.stop_reason,
            output.usage,
            output.metrics,
        ),
        usage=_usage_dict(output.usage),
        logprobs=_logprob_rows(zip(answer.token_ids, answer.logprobs, strict=True))
        if answer.logprobs is not None
        else None,
    )


class AnswerStream:
    """Grows an `Answer` from deltas. One stream, one reader."""

    def __init__(self, request_id: str, model_name: str) -> None:
        self._request_id = request_id
        self._model_name = model_name
        self._text = ""
        self._logprobs: list[list[LogProb]] | None = None

    def add(self, delta: Delta) -> Answer | None:
        """The answer so far, or None where there is nothing to show yet.

        The delta that ends the request always gives an answer, so that every stream has exactly
        one chunk with usage and finish reason, even when no text was generated at all. It also
        carries the log probabilities of the whole answer: LlamaIndex agents keep the last chunk
        as the response.
        """
        self._text += delta.text
        if delta.logprobs is not None:
            rows = _logprob_rows(zip(delta.token_ids, delta.logprobs, strict=True))
            self._logprobs = [*(self._logprobs or []), *rows]
        if delta.usage is None:
            return Answer(text=self._text, delta=delta.text) if delta.text else None
        return Answer(
            text=self._text,
            delta=delta.text,
            raw=_raw(
                self._model_name,
                self._request_id,
                delta.finish_reason,
                delta.stop_reason,
                delta.usage,
                delta.metrics,
            ),
            usage=_usage_dict(delta.usage),
            logprobs=self._logprobs,
        )


def _raw(
    model_name: str,
    request_id: str,
    finish_reason: str | None,
    stop_reason: str | int | None,
    usage: Usage,
    metrics: RequestMetrics | None,
) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "model": model_name,
        "request_id": request_id,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
        "usage": {**_usage_dict(usage), "cached_tokens": usage.cached_tokens},
    }
    if metrics is not None:
        raw["metrics"] = {
            "queue_s": metrics.queue_s,
            "time_to_first_token_s": metrics.time_to_first_token_s,
            "total_s": metrics.total_s,
            "tokens_per_s": metrics.tokens_per_s(usage.completion_tokens),
        }
    return raw


def _usage_dict(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }


def _logprob_rows(tokens: Iterable[tuple[int, dict[int, Logprob]]]) -> list[list[LogProb]]:
    """One row per token: the sampled token, then the other reported ones, likeliest first."""
    rows: list[list[LogProb]] = []
    for token_id, at_position in tokens:
        others = sorted(
            (item for key, item in at_position.items() if key != token_id),
            key=lambda item: item.rank,
        )
        rows.append([_logprob(at_position[token_id]), *map(_logprob, others)])
    return rows


def _logprob(item: Logprob) -> LogProb:
    return LogProb(
        token=item.decoded_token,
        logprob=item.logprob,
        bytes=list(item.decoded_token.encode("utf-8")),
    )
