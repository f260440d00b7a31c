"""Checks of the eight endpoints: identity, types, chunks, options, prompts, metadata."""

from __future__ import annotations

import asyncio
import builtins
import inspect
import os
import socket
import threading
import timeit
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any

import pytest
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    MessageRole,
)
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.loading import load_llm
from llama_index.core.prompts import PromptTemplate
from pydantic import BaseModel

from llm_connectors.testing.llama_index.recorder import Recorder
from llm_connectors.testing.llama_index.subject import (
    CHATS,
    ENDPOINTS,
    MESSAGES,
    PROMPT,
    Subject,
    responses,
    text_of,
)

_STREAMS = tuple(name for name in ENDPOINTS if "stream" in name)


class _Answer(BaseModel):
    """An answer."""

    is_good: bool


def check_01_identity(subject: Subject) -> None:
    """Class hierarchy, stable name, round trips that load no second engine."""
    llm: Any = subject.llm
    assert BaseLLM in type(llm).__mro__
    if llm.metadata.is_function_calling_model:
        assert FunctionCallingLLM in type(llm).__mro__
    assert llm.class_name() == type(llm).class_name()
    twin = type(llm).from_dict(llm.to_dict())
    loaded = load_llm(llm.to_dict())
    others: list[Any] = [twin, loaded]
    for other in others:
        assert type(other) is type(llm)
        assert other.to_dict() == llm.to_dict(), "a round trip changes options"
        if hasattr(llm, "engine"):
            assert other.engine is llm.engine, "a round trip makes another engine"


def check_02_types(subject: Subject) -> None:
    """All eight endpoints return what they promise; `astream_*` is awaited for a generator."""
    llm = subject.llm
    for endpoint in ENDPOINTS:
        expected = ChatResponse if endpoint.endswith("chat") else CompletionResponse
        found = responses(llm, endpoint)
        assert found, endpoint
        assert all(isinstance(one, expected) for one in found), endpoint
    for endpoint in _STREAMS:
        source = MESSAGES if endpoint in CHATS else PROMPT
        result = getattr(llm, endpoint)(source)
        if not inspect.iscoroutine(result):
            assert isinstance(result, Generator), endpoint
            result.close()
            continue

        async def close(pending: Any = result, name: str = endpoint) -> None:
            stream = await pending
            assert isinstance(stream, AsyncGenerator), name
            await stream.aclose()

        asyncio.run(close())


def check_03_streams_equal_answers(subject: Subject) -> None:
    """Chunks are cumulative, their deltas join to the text, which is that of a whole answer."""
    for endpoint in _STREAMS:
        chunks = responses(subject.llm, endpoint, temperature=0.0)
        (whole,) = responses(subject.llm, endpoint.replace("stream_", ""), temperature=0.0)
        so_far = ""
        for chunk in chunks:
            so_far += chunk.delta or ""
            assert text_of(chunk) == so_far, f"{endpoint} is not cumulative"
        assert so_far == text_of(whole), endpoint


def check_04_one_final_chunk(subject: Subject) -> None:
    """One last chunk with usage and finish reason, however the answer ends."""
    ends: list[dict[str, Any]] = [{"max_tokens": 1}, {}]
    ends.append({"max_tokens": 8, "stop": ["e", "a", "\n"]})
    for endpoint in _STREAMS:
        for options in ends:
            raw = _final(subject, endpoint, **options)
            assert raw["usage"]["completion_tokens"] <= options.get("max_tokens", 10**9)
        if subject.empty is not None:
            assert _final(subject, endpoint, **subject.empty)["finish_reason"] == "stop"
        if subject.script is not None:
            subject.script("")
            assert _final(subject, endpoint)["finish_reason"] == "stop"
            subject.script("Some answer.")


def _final(subject: Subject, endpoint: str, **options: Any) -> dict[str, Any]:
    """`raw` of a stream's last chunk, which alone must have one."""
    chunks = responses(subject.llm, endpoint, temperature=0.0, **options)
    assert [chunk for chunk in chunks if chunk.raw] == chunks[-1:] != [], (endpoint, options)
    raw = dict(chunks[-1].raw)
    assert raw["finish_reason"] in ("stop", "length"), endpoint
    assert "usage" in raw, endpoint
    return raw


def check_05_whole_characters(subject: Subject) -> None:
    """No delta ends inside a character; a broken one can only be the last of a cut answer."""
    text = "🦀🚀 你好 é 🦀🚀 你好 é"
    for endpoint in _STREAMS:
        source = [ChatMessage(content=text)] if endpoint in CHATS else text
        if subject.script is not None:
            subject.script(text)
        chunks = responses(subject.llm, endpoint, source, temperature=0.0)
        (whole,) = responses(subject.llm, endpoint.replace("stream_", ""), source, temperature=0.0)
        deltas = [chunk.delta or "" for chunk in chunks]
        for delta in deltas:
            delta.encode("utf-8")
        # Bytes that are no character at all show as U+FFFD in the whole text too.
        assert "".join(deltas) == text_of(whole), endpoint
        if subject.script is not None:
            assert text_of(whole) == text


def check_06_stop_strings(subject: Subject) -> None:
    """A stop string inside words ends the answer and never shows, not even in part."""
    for endpoint in ENDPOINTS:
        free = text_of(responses(subject.llm, endpoint, temperature=0.0)[-1])
        middle = len(free) // 2
        stop = free[middle : middle + 3]
        if not stop:
            pytest.skip("the model's answer is empty")
        chunks = responses(subject.llm, endpoint, temperature=0.0, stop=[stop])
        assert text_of(chunks[-1]) == free[: free.index(stop)], endpoint
        if "stream" in endpoint:
            assert "".join(chunk.delta or "" for chunk in chunks) == text_of(chunks[-1])


def check_07_call_options(subject: Subject) -> None:
    """Options of a call count for that call alone, and unknown ones are refused."""
    llm = subject.llm
    before = llm.to_dict()
    for endpoint in ENDPOINTS:
        short = responses(llm, endpoint, temperature=0.0, max_tokens=2)[-1]
        long = responses(llm, endpoint, temperature=0.0, max_tokens=5)[-1]
        assert short.raw["usage"]["completion_tokens"] <= 2, endpoint
        assert text_of(long).startswith(text_of(short)) or "\ufffd" in text_of(short), endpoint
        assert llm.to_dict() == before, f"an option of {endpoint} persists"
        with pytest.raises(Exception, match="temprature"):
            responses(llm, endpoint, temprature=0.5)


def check_08_prompt_tokens(subject: Subject) -> None:
    """The model sees exactly what its own template makes, with one BOS at most."""
    prompt_ids = subject.probe("prompt_ids")
    conversation = [
        ChatMessage(role=MessageRole.USER, content="Hi."),
        ChatMessage(role=MessageRole.ASSISTANT, content="Hello."),
        ChatMessage(role=MessageRole.USER, content=PROMPT),
    ]
    wanted = prompt_ids(conversation)
    for endpoint in CHATS:
        final = responses(subject.llm, endpoint, conversation, max_tokens=1)[-1]
        count = final.raw["usage"]["prompt_tokens"]
        assert count == len(wanted), f"{endpoint}: {count} tokens, not {len(wanted)}"
        if subject.sent_ids is not None:
            assert subject.sent_ids() == wanted, f"{endpoint}: other tokens"
    final = responses(subject.llm, "complete", max_tokens=1)[-1]
    assert final.raw["usage"]["prompt_tokens"] == len(prompt_ids(MESSAGES))
    counts = [
        responses(subject.llm, "complete", text, formatted=True, max_tokens=1)[-1].raw["usage"][
            "prompt_tokens"
        ]
        for text in ("x", "x x")
    ]
    assert counts[0] == 1, "formatted=True must add nothing"
    assert counts[1] > counts[0]


def check_09_system_prompt(subject: Subject) -> None:
    """`system_prompt` reaches predict, apredict and the four structured methods alike."""
    llm = subject.llm.model_copy(update={"system_prompt": "You are brief."})
    prompt = PromptTemplate("Is {it} good?")
    call: dict[str, Any] = {"it": "tea"}

    async def astream() -> None:
        async for _ in await llm.astream_structured_predict(_Answer, prompt, **call):
            pass

    ways: dict[str, Any] = {
        "predict": lambda: llm.predict(prompt, **call),
        "apredict": lambda: asyncio.run(llm.apredict(prompt, **call)),
        "structured_predict": lambda: llm.structured_predict(_Answer, prompt, **call),
        "astructured_predict": lambda: asyncio.run(
            llm.astructured_predict(_Answer, prompt, **call)
        ),
        "stream_structured_predict": lambda: list(
            llm.stream_structured_predict(_Answer, prompt, **call)
        ),
        "astream_structured_predict": lambda: asyncio.run(astream()),
    }
    for name, way in ways.items():
        with Recorder() as recorder:
            way()
        starts = [
            event
            for event in recorder.events
            if type(event).__name__ in ("LLMChatStartEvent", "LLMCompletionStartEvent")
        ]
        assert len(starts) == 1, name
        shown = str(getattr(starts[0], "messages", None) or starts[0].prompt)
        assert shown.count("You are brief.") == 1, name
        assert "tea" in shown, name


def check_10_metadata(subject: Subject) -> None:
    """Limits are true, and reading them costs nothing and touches nothing."""
    llm: Any = subject.llm
    metadata = llm.metadata
    assert metadata.model_name not in ("", "unknown"), "the model's name is missing"
    if getattr(llm, "max_tokens", None):
        assert metadata.num_output == llm.max_tokens
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((socket.socket, "connect"), (builtins, "open"), (os, "open")):
            patch.setattr(owner, name, _refused_here(getattr(owner, name)))
        # Others on the machine can only make it slower, so the best of ten is the class's own.
        per_access_s = min(timeit.repeat(lambda: llm.metadata, number=100, repeat=10)) / 100
    assert per_access_s < 1e-4, f"{1e6 * per_access_s:.0f} µs"
    # A request that just fits starts; one token more is refused.
    used = responses(llm, "chat", max_tokens=1)[-1].raw["usage"]["prompt_tokens"]
    room = metadata.context_window - used
    stream = llm.stream_chat(MESSAGES, max_tokens=room)
    next(stream)
    stream.close()
    with pytest.raises(Exception, match=r"(?s).+"):
        responses(llm, "chat", max_tokens=room + 1)


def _refused_here(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which this thread must not call; the engine's own threads may."""
    here = threading.get_ident()

    def call(*args: Any, **kwargs: Any) -> Any:
        assert threading.get_ident() != here, "metadata opens a file or a socket"
        return function(*args, **kwargs)

    return call
