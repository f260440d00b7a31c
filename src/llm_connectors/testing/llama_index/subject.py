"""What is checked, what can be seen of its engine, and how endpoints are called."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from typing import Any

import pytest
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.base.llms.types import ChatMessage, ChatResponse
from llama_index.core.llms.llm import LLM

CHATS = ("chat", "achat", "stream_chat", "astream_chat")
COMPLETIONS = ("complete", "acomplete", "stream_complete", "astream_complete")
ENDPOINTS = (*CHATS, *COMPLETIONS)
PROMPT = "Name three colours."
MESSAGES = [ChatMessage(content=PROMPT)]


@dataclasses.dataclass
class Subject:
    """An LLM to check, with probes into what is behind it.

    Attributes:
        llm: The model. For most checks greedy decoding (`temperature=0`) must be repeatable.
        running: Requests that its engine works on now.
        peak: Most requests that its engine ever worked on at once.
        prompt_ids: Token ids of a conversation by an independent implementation.
        script: Makes the engine give these answers to the next requests, one after the other; the
            last one stays.
        embedding: An embedding model of the same package.
        reopen: Makes the model again after `llm.close()`.
    """

    llm: LLM
    running: Callable[[], int] | None = None
    peak: Callable[[], int] | None = None
    prompt_ids: Callable[[Sequence[ChatMessage]], list[int]] | None = None
    script: Callable[..., None] | None = None
    embedding: BaseEmbedding | None = None
    reopen: Callable[[], LLM] | None = None

    def probe(self, name: str) -> Any:
        """The probe of this name; without it the check is skipped."""
        found = getattr(self, name)
        if found is None:
            pytest.skip(f"needs Subject({name}=...)")
        return found


def responses(llm: LLM, endpoint: str, source: Any = None, **kwargs: Any) -> list[Any]:
    """All responses of one endpoint; a non-streaming one gives a single response."""
    if source is None:
        source = MESSAGES if endpoint.endswith("chat") else PROMPT
    result = getattr(llm, endpoint)(source, **kwargs)
    if inspect.iscoroutine(result):

        async def drain() -> list[Any]:
            response = await result
            if isinstance(response, AsyncGenerator):
                return [chunk async for chunk in response]
            return [response]

        return asyncio.run(drain())
    return list(result) if isinstance(result, Generator) else [result]


def text_of(response: Any) -> str:
    """The text of a chat or completion response."""
    if isinstance(response, ChatResponse):
        return response.message.content or ""
    return str(response.text)


def wait_until(condition: Callable[[], bool], what: str, within_s: float = 10.0) -> None:
    """Wait for something that happens in other threads."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {within_s} s"
        time.sleep(0.005)


def is_swallowed(error: BaseException) -> bool:
    """Whether LlamaIndex turns such an error into an empty answer or another error."""
    return isinstance(error, ValueError | TypeError) or (
        isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError)
    )
