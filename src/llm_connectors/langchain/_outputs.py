"""The engine's outputs as LangChain's messages, generations, usage and metadata."""

from __future__ import annotations

from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.ai import (
    InputTokenDetails,
    OutputTokenDetails,
    UsageMetadata,
)
from langchain_core.outputs import (
    ChatGeneration,
    ChatGenerationChunk,
    ChatResult,
    Generation,
    GenerationChunk,
)

from engine import (
    CompletionOutput,
    Delta,
    Logprob,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    Usage,
    assemble,
)
from llm_connectors._answer_plan import AnswerPlan
from llm_connectors.langchain._tool_calls import split_calls

PROVIDER = "llm-connectors"
"""`model_provider` of answers and `ls_provider` of traces; LangChain compares the two."""


def usage_metadata(
    usage: Usage, block_size: int | None, reasoning_tokens: int = 0
) -> UsageMetadata:
    """LangChain's token counts.

    `cache_read` are prompt tokens taken from the prefix cache, `cache_creation` those put into it:
    whole blocks.

    Args:
        usage: The engine's counts.
        block_size: Tokens per block of the prefix cache; None where it is off.
        reasoning_tokens: Tokens of the reasoning, which are output tokens too.
    """
    created = 0
    if block_size is not None:
        cached_end = usage.prompt_tokens // block_size * block_size
        created = max(0, cached_end - usage.cached_tokens)
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        input_token_details=InputTokenDetails(
            cache_read=usage.cached_tokens, cache_creation=created
        ),
        output_token_details=OutputTokenDetails(
            reasoning=min(reasoning_tokens, usage.completion_tokens)
        ),
    )


def token_usage(*usages: Usage) -> dict[str, int]:
    """The sum of token counts under the names of `LLMResult.llm_output["token_usage"]`."""
    return {
        "prompt_tokens": sum(usage.prompt_tokens for usage in usages),
        "completion_tokens": sum(usage.completion_tokens for usage in usages),
        "total_tokens": sum(usage.total_tokens for usage in usages),
        "cached_tokens": sum(usage.cached_tokens for usage in usages),
    }


def chat_result(output: RequestOutput, model_name: str, plan: AnswerPlan) -> ChatResult:
    """A finished request as a chat result with one generation per answer.

    The usage of the whole request stands on the first generation alone, so that sums over
    generations are right; `invoke` returns that one.

    Args:
        output: What the engine gave back.
        model_name: As told in the metadata.
        plan: How the answers are read.
    """
    messages = answer_messages(output, model_name, plan)
    generations = [
        ChatGeneration(message=message, generation_info=dict(message.response_metadata))
        for message in messages
    ]
    return ChatResult(generations=generations, llm_output=llm_output(output, model_name))


def llm_output(output: RequestOutput, model_name: str) -> dict[str, Any]:
    """What is told of a request beside its answers."""
    return {"token_usage": token_usage(output.usage), "model_name": model_name}


def answer_messages(output: RequestOutput, model_name: str, plan: AnswerPlan) -> list[AIMessage]:
    """The messages of `chat_result`, one per answer; arguments as there."""
    params = plan.params
    messages: list[AIMessage] = []
    reasoning_tokens = 0
    for answer in output.outputs:
        metadata = _answer_metadata(answer, model_name) | _request_metadata(output, params)
        metadata |= logprobs_info(answer, params)
        stream = plan.stream(output.prompt_token_ids)
        if stream is None:
            messages.append(AIMessage(content=answer.text, response_metadata=metadata))
            continue
        is_complete = answer.finish_reason == "stop"
        parsed = assemble([*stream.feed(answer.text), *stream.finish(is_complete=is_complete)])
        calls, broken = split_calls(parsed.calls)
        metadata["finish_reason"] = finish_reason(answer.finish_reason, has_calls=bool(calls))
        reasoning_tokens += plan.count_tokens(parsed.reasoning)
        thoughts = {"reasoning_content": parsed.reasoning} if parsed.reasoning else {}
        messages.append(
            AIMessage(
                content=parsed.text,
                additional_kwargs=thoughts,
                response_metadata=metadata,
                tool_calls=calls,
                invalid_tool_calls=broken,
            )
        )
    messages[0].usage_metadata = usage_metadata(
        output.usage, plan.cached_block_size, reasoning_tokens
    )
    return messages


def text_generations(
    output: RequestOutput, model_name: str, params: SamplingParams
) -> list[Generation]:
    """A finished request as plain generations, one per answer; the first has the usage."""
    generations = []
    for answer in output.outputs:
        info = _answer_metadata(answer, model_name) | _request_metadata(output, params)
        info |= logprobs_info(answer, params)
        if answer.index == 0:
            info["usage"] = token_usage(output.usage)
        generations.append(Generation(text=answer.text, generation_info=info))
    return generations


def chat_chunk(
    delta: Delta,
    output: RequestOutput | None,
    model_name: str,
    params: SamplingParams,
    usage: UsageMetadata | None,
) -> ChatGenerationChunk:
    """A delta of plain text as a chat chunk.

    Args:
        delta: What is new.
        output: The finished request, with its last delta: that chunk also has the metadata.
        model_name: As told in the metadata.
        params: What was asked for.
        usage: Token counts to put on the last chunk.
    """
    if output is None:
        return ChatGenerationChunk(
            message=AIMessageChunk(content=delta.text),
            generation_info=logprobs_info(delta, params) or None,
        )
    message = AIMessageChunk(
        content=delta.text,
        usage_metadata=usage,
        chunk_position="last",
    )
    info = last_chunk_info(delta, output, model_name, params)
    return ChatGenerationChunk(message=message, generation_info=info)


def text_chunk(
    delta: Delta, output: RequestOutput | None, model_name: str, params: SamplingParams
) -> GenerationChunk:
    """A delta as a plain text chunk; arguments as in `chat_chunk`."""
    if output is None:
        info = logprobs_info(delta, params)
    else:
        info = last_chunk_info(delta, output, model_name, params)
        info["usage"] = token_usage(output.usage)
    return GenerationChunk(text=delta.text, generation_info=info or None)


def finish_reason(reason: str | None, *, has_calls: bool) -> str | None:
    """The engine's reason, or "tool_calls" where the answer ended with calls, as OpenAI's API."""
    return "tool_calls" if has_calls and reason == "stop" else reason


def last_chunk_info(
    delta: Delta, output: RequestOutput, model_name: str, params: SamplingParams
) -> dict[str, Any]:
    """The metadata of a stream's end."""
    return (
        _answer_metadata(delta, model_name)
        | _request_metadata(output, params)
        | logprobs_info(delta, params)
    )


def _answer_metadata(answer: CompletionOutput | Delta, model_name: str) -> dict[str, Any]:
    return {
        "model_name": model_name,
        "model_provider": PROVIDER,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }


def _request_metadata(output: RequestOutput, params: SamplingParams) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "timings": _timings(output.metrics, output.usage.completion_tokens),
    }
    if output.prompt_logprobs is not None:
        num_top = params.prompt_logprobs or 0
        metadata["prompt_logprobs"] = [
            None if candidates is None else _position(token_id, candidates, num_top)
            for token_id, candidates in zip(
                output.prompt_token_ids, output.prompt_logprobs, strict=True
            )
        ]
    return metadata


def _timings(metrics: RequestMetrics, completion_tokens: int) -> dict[str, float]:
    """What is known of: seconds queued, to the first token, in all; tokens per second after it."""
    known = {
        "queue_s": metrics.queue_s,
        "time_to_first_token_s": metrics.time_to_first_token_s,
        "total_s": metrics.total_s,
        "tokens_per_s": metrics.tokens_per_s(completion_tokens),
    }
    return {name: value for name, value in known.items() if value is not None}


def logprobs_info(answer: CompletionOutput | Delta, params: SamplingParams) -> dict[str, Any]:
    """The answer's log probabilities in the shape of OpenAI's `logprobs`, when asked for."""
    if answer.logprobs is None or params.logprobs is None:
        return {}
    content = [
        _position(token_id, candidates, params.logprobs)
        for token_id, candidates in zip(answer.token_ids, answer.logprobs, strict=True)
    ]
    return {"logprobs": {"content": content}}


def _position(token_id: int, candidates: dict[int, Logprob], num_top: int) -> dict[str, Any]:
    ranked = sorted(candidates.values(), key=lambda candidate: candidate.rank)
    return {
        **_token(candidates[token_id]),
        "top_logprobs": [_token(one) for one in ranked if one.rank <= num_top],
    }


def _token(candidate: Logprob) -> dict[str, Any]:
    text = candidate.decoded_token
    is_partial = "\N{REPLACEMENT CHARACTER}" in text
    return {
        "token": text,
        "bytes": None if is_partial else list(text.encode()),
        "logprob": candidate.logprob,
    }
