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
    ThinkingBlock,
    ToolCallBlock,
)

from engine import Delta, Logprob, RequestMetrics, RequestOutput, Usage
from llm_connectors._answer_plan import AnswerStream
from llm_connectors.llama_index.answer_parts import AnswerParts
from llm_connectors.llama_index.tools import as_legacy


@dataclass(slots=True)
class Answer:
    """What is known of the one answer of a request, whole or so far.

    Attributes:
        text: The answer's text up to now, without reasoning and calls.
        delta: What the last delta added to it; None where nothing was streamed.
        thinking: The reasoning before it up to now.
        thinking_delta: What the last delta added to that.
        calls: Tool calls up to now; of one still being written the arguments are JSON text.
        raw: Set once the answer is complete: model, request id, finish and stop reason, usage and
            timings in seconds.
        usage: The counts of `raw["usage"]`, or empty.
        logprobs: Per token the sampled one first, then the likeliest others; set with `raw`.
    """

    text: str = ""
    delta: str | None = None
    thinking: str = ""
    thinking_delta: str | None = None
    calls: list[ToolCallBlock] = field(default_factory=list)
    raw: dict[str, Any] | None = None
    usage: dict[str, int] = field(default_factory=dict)
    logprobs: list[list[LogProb]] | None = None

    def as_chat(self) -> ChatResponse:
        """The answer as an assistant message: reasoning, text and calls as blocks."""
        blocks: list[Any] = [TextBlock(text=self.text)]
        if self.thinking:
            blocks.insert(0, ThinkingBlock(content=self.thinking))
        message = ChatMessage(role=MessageRole.ASSISTANT, blocks=[*blocks, *self.calls])
        if self.calls:
            message.additional_kwargs["tool_calls"] = [as_legacy(call) for call in self.calls]
        return ChatResponse(
            message=message,
            delta=self.delta,
            raw=self.raw,
            logprobs=self.logprobs,
            additional_kwargs=self._extras(),
        )

    def as_completion(self) -> CompletionResponse:
        """The answer's text as a completion. Reasoning stands in `raw["thinking"]`."""
        if self.raw is not None and self.thinking:
            self.raw["thinking"] = self.thinking
        return CompletionResponse(
            text=self.text,
            delta=self.delta,
            raw=self.raw,
            logprobs=self.logprobs,
            additional_kwargs=self._extras(),
        )

    def _extras(self) -> dict[str, Any]:
        if self.thinking_delta:
            return {**self.usage, "thinking_delta": self.thinking_delta}
        return dict(self.usage)


def whole_answer(output: RequestOutput, model_name: str, reader: AnswerStream | None) -> Answer:
    """The single answer of a finished request.

    Args:
        output: What the engine gave back.
        model_name: For the response's `raw`.
        reader: Parts reasoning, text and calls; None for plain text.
    """
    one = output.outputs[0]
    parts = AnswerParts(reader)
    parts.feed(one.text, one.finish_reason)
    answer = _answer(parts)
    answer.raw = _raw(
        model_name,
        output.request_id,
        one.finish_reason,
        one.stop_reason,
        output.usage,
        output.metrics,
    )
    parts.complete(answer.raw)
    answer.usage = _usage_dict(output.usage)
    if one.logprobs is not None:
        answer.logprobs = _logprob_rows(zip(one.token_ids, one.logprobs, strict=True))
    return answer


class GrowingAnswer:
    """Grows an `Answer` from deltas. One stream, one reader."""

    def __init__(self, request_id: str, model_name: str, reader: AnswerStream | None) -> None:
        self._request_id = request_id
        self._model_name = model_name
        self._parts = AnswerParts(reader)
        self._logprobs: list[list[LogProb]] | None = None

    def add(self, delta: Delta) -> Answer | None:
        """The answer so far, or None where there is nothing to show yet.

        The delta that ends the request always gives an answer, so that every stream has exactly
        one chunk with usage and finish reason, even when no text was generated at all. It also
        carries the log probabilities of the whole answer: LlamaIndex agents keep the last chunk
        as the response.
        """
        is_last = delta.usage is not None
        reason = (delta.finish_reason or "stop") if is_last else None
        text, thinking, has_call = self._parts.feed(delta.text, reason)
        if delta.logprobs is not None:
            rows = _logprob_rows(zip(delta.token_ids, delta.logprobs, strict=True))
            self._logprobs = [*(self._logprobs or []), *rows]
        if not (is_last or text or thinking or has_call):
            return None
        answer = _answer(self._parts)
        answer.delta = text
        answer.thinking_delta = thinking or None
        if delta.usage is not None:
            answer.raw = _raw(
                self._model_name,
                self._request_id,
                delta.finish_reason,
                delta.stop_reason,
                delta.usage,
                delta.metrics,
            )
            self._parts.complete(answer.raw)
            answer.usage = _usage_dict(delta.usage)
            answer.logprobs = self._logprobs
        return answer


def _answer(parts: AnswerParts) -> Answer:
    return Answer(text=parts.text, thinking=parts.thinking, calls=parts.calls)


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
