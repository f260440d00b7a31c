"""Answers of requests that were submitted together, each with events of its own.

LlamaIndex's callback decorators emit the events of one request around one function call. Here
they are put around a function that merely collects an answer already under way, so that a batch
is observed, and its tokens counted, exactly as that many single calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback

from llm_connectors.llama_index.observation import is_observed

if TYPE_CHECKING:
    from llama_index.core.llms.llm import LLM

    from llm_connectors.llama_index.requests import PendingAnswer


def completions(
    llm: LLM, prompts: Sequence[str], pending: list[PendingAnswer], call: dict[str, Any]
) -> list[CompletionResponse]:
    """Wait for all completions; if one fails, the rest is aborted."""
    try:
        return [
            _completion(llm, prompt, item, call)
            for prompt, item in zip(prompts, pending, strict=True)
        ]
    finally:
        _abort(pending)


async def acompletions(
    llm: LLM, prompts: Sequence[str], pending: list[PendingAnswer], call: dict[str, Any]
) -> list[CompletionResponse]:
    """`completions`, awaited."""
    try:
        waiting = [
            _acompletion(llm, prompt, item, call)
            for prompt, item in zip(prompts, pending, strict=True)
        ]
        return list(await asyncio.gather(*waiting))
    finally:
        _abort(pending)


def chats(
    llm: LLM,
    conversations: Sequence[Sequence[ChatMessage]],
    pending: list[PendingAnswer],
    call: dict[str, Any],
) -> list[ChatResponse]:
    """Wait for all chats; if one fails, the rest is aborted."""
    try:
        return [
            _chat(llm, messages, item, call)
            for messages, item in zip(conversations, pending, strict=True)
        ]
    finally:
        _abort(pending)


async def achats(
    llm: LLM,
    conversations: Sequence[Sequence[ChatMessage]],
    pending: list[PendingAnswer],
    call: dict[str, Any],
) -> list[ChatResponse]:
    """`chats`, awaited."""
    try:
        waiting = [
            _achat(llm, messages, item, call)
            for messages, item in zip(conversations, pending, strict=True)
        ]
        return list(await asyncio.gather(*waiting))
    finally:
        _abort(pending)


def _abort(pending: list[PendingAnswer]) -> None:
    for item in pending:
        item.abort()


def _completion(
    llm: LLM, prompt: str, pending: PendingAnswer, call: dict[str, Any]
) -> CompletionResponse:
    if not is_observed(llm):
        return pending.wait().as_completion()

    @llm_completion_callback()
    def collect(_llm: LLM, _prompt: str, **_call: Any) -> CompletionResponse:
        return pending.wait().as_completion()

    response: CompletionResponse = collect(llm, prompt, **call)
    return response


async def _acompletion(
    llm: LLM, prompt: str, pending: PendingAnswer, call: dict[str, Any]
) -> CompletionResponse:
    if not is_observed(llm):
        return (await pending.wait_async()).as_completion()

    @llm_completion_callback()
    async def collect(_llm: LLM, _prompt: str, **_call: Any) -> CompletionResponse:
        return (await pending.wait_async()).as_completion()

    response: CompletionResponse = await collect(llm, prompt, **call)
    return response


def _chat(
    llm: LLM, messages: Sequence[ChatMessage], pending: PendingAnswer, call: dict[str, Any]
) -> ChatResponse:
    if not is_observed(llm):
        return pending.wait().as_chat()

    @llm_chat_callback()
    def collect(_llm: LLM, _messages: Sequence[ChatMessage], **_call: Any) -> ChatResponse:
        return pending.wait().as_chat()

    response: ChatResponse = collect(llm, messages, **call)
    return response


async def _achat(
    llm: LLM, messages: Sequence[ChatMessage], pending: PendingAnswer, call: dict[str, Any]
) -> ChatResponse:
    if not is_observed(llm):
        return (await pending.wait_async()).as_chat()

    @llm_chat_callback()
    async def collect(_llm: LLM, _messages: Sequence[ChatMessage], **_call: Any) -> ChatResponse:
        return (await pending.wait_async()).as_chat()

    response: ChatResponse = await collect(llm, messages, **call)
    return response
