"""What is checked, what can be seen of its engine, and how endpoints are called."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import os
import subprocess
import sys
import textwrap
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
        admitted: Prompt tokens that its engine has begun to work on so far.
        blocks: KV blocks, or other memory, that requests hold now.
        memory: What its engine holds as a whole; 0 after `llm.close()`.
        prompt_ids: Token ids of a conversation by an independent implementation.
        sent_ids: Token ids of the last prompt that the engine was given.
        empty: Options of a call whose answer ends before its first token.
        script: Makes the engine give these answers to the next requests, one after the other; the
            last one stays. Calls are in `<tool_call>` tags, reasoning is in `<think>` tags.
        embedding: An embedding model of the same package.
        embedding_prompts: What that model puts before each query, and before each text.
        plain_embedding: Vector of a text by that model, with nothing put before it.
        embedding_steps: Batches that its engine has run so far.
        reopen: Makes the model again after `llm.close()`.
        factory: "module:function" that makes the subject, or the LLM, in a process of its own; the
            command line sets it.
    """

    llm: LLM
    running: Callable[[], int] | None = None
    peak: Callable[[], int] | None = None
    admitted: Callable[[], int] | None = None
    blocks: Callable[[], int] | None = None
    memory: Callable[[], int] | None = None
    prompt_ids: Callable[[Sequence[ChatMessage]], list[int]] | None = None
    sent_ids: Callable[[], list[int]] | None = None
    empty: dict[str, Any] | None = None
    script: Callable[..., None] | None = None
    embedding: BaseEmbedding | None = None
    embedding_prompts: tuple[str, str] | None = None
    plain_embedding: Callable[[str], list[float]] | None = None
    embedding_steps: Callable[[], int] | None = None
    reopen: Callable[[], LLM] | None = None
    factory: str | None = None

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


MAKE = """
import importlib, sys
from llama_index.core.base.llms.types import ChatMessage
made = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])()
llm = getattr(made, "llm", made)
messages = [ChatMessage(content="Name three colours.")]
"""
"""What a process of its own begins with: `llm` and `messages`."""


def run_apart(code: str, *arguments: str) -> str:
    """What `code` prints in a Python process of its own that finds the same modules."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    return done.stdout.strip()


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
