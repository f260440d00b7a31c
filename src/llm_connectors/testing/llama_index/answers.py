"""Checks of the eight endpoints: identity, types, chunks, options, metadata, usage, events."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import Counter
from collections.abc import AsyncGenerator, Generator
from typing import Any

import llama_index_instrumentation as instrument
import pytest
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    ImageBlock,
    LogProb,
    MessageRole,
    TextBlock,
    ThinkingBlock,
)
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.llms.loading import load_llm
from llama_index.core.prompts import PromptTemplate
from llama_index_instrumentation.event_handlers import BaseEventHandler
from pydantic import BaseModel

from llm_connectors.testing.llama_index.subject import (
    CHATS,
    ENDPOINTS,
    MESSAGES,
    PROMPT,
    Subject,
    is_swallowed,
    responses,
    text_of,
)

_STREAMS = tuple(name for name in ENDPOINTS if "stream" in name)
_MANY_ACCESSES = 1000


class _Recorder(BaseEventHandler):
    """Keeps the events of a `with` block."""

    events: list[Any] = []  # noqa: RUF012

    def handle(self, event: Any, **_: Any) -> None:
        self.events.append(event)

    def __enter__(self) -> _Recorder:
        self.events = []
        instrument.get_dispatcher().add_event_handler(self)
        return self

    def __exit__(self, *_: object) -> None:
        instrument.get_dispatcher().event_handlers.remove(self)


class _Answer(BaseModel):
    """An answer."""

    is_good: bool


def check_01_identity(subject: Subject) -> None:
    """Class hierarchy, stable name, round trips that load no second engine."""
    llm: Any = subject.llm
    assert BaseLLM in type(llm).__mro__
    assert llm.class_name() == type(llm).class_name()
    twin = type(llm).from_dict(llm.to_dict())
    loaded = load_llm(llm.to_dict())
    others: list[Any] = [twin, loaded]
    for other in others:
        assert type(other) is type(llm)
        assert other.to_dict() == llm.to_dict()
        if hasattr(llm, "engine"):
            assert other.engine is llm.engine


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
            assert text_of(chunk) == so_far, endpoint
        assert so_far == text_of(whole), endpoint


def check_04_one_final_chunk(subject: Subject) -> None:
    """One last chunk with usage and finish reason, however the answer ends."""
    for endpoint in _STREAMS:
        for options in ({"max_tokens": 1}, {}, {"max_tokens": 8, "stop": ["e", "a", "\n"]}):
            chunks = responses(subject.llm, endpoint, temperature=0.0, **options)
            finals = [chunk for chunk in chunks if chunk.raw]
            assert finals == chunks[-1:], endpoint
            raw = dict(finals[0].raw)
            assert raw["finish_reason"] in ("stop", "length"), endpoint
            assert raw["usage"]["completion_tokens"] <= options.get("max_tokens", 10**9)


def check_05_whole_characters(subject: Subject) -> None:
    """No delta ends inside a character; a broken one can only be the last of a cut answer."""
    prompt = "Repeat: 🦀🚀 你好 é 🦀🚀 你好 é"
    for endpoint in _STREAMS:
        source = [ChatMessage(content=prompt)] if endpoint in CHATS else prompt
        chunks = responses(subject.llm, endpoint, source, temperature=0.0)
        (whole,) = responses(subject.llm, endpoint.replace("stream_", ""), source, temperature=0.0)
        deltas = [chunk.delta or "" for chunk in chunks]
        for delta in deltas:
            delta.encode("utf-8")
        # Bytes that are no character at all show as U+FFFD in the whole text too.
        assert "".join(deltas) == text_of(whole), endpoint


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
        assert llm.to_dict() == before, endpoint
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
    for endpoint in CHATS:
        final = responses(subject.llm, endpoint, conversation, max_tokens=1)[-1]
        assert final.raw["usage"]["prompt_tokens"] == len(prompt_ids(conversation)), endpoint
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
        with _Recorder() as recorder:
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
    """Limits are set, and reading them costs nothing."""
    metadata = subject.llm.metadata
    assert metadata.context_window > 0
    assert metadata.model_name not in ("", "unknown")
    if getattr(subject.llm, "max_tokens", None):
        assert metadata.num_output == subject.llm.max_tokens  # type: ignore[attr-defined]
    started_s = time.perf_counter()
    for _ in range(_MANY_ACCESSES):
        _ = subject.llm.metadata
    assert (time.perf_counter() - started_s) / _MANY_ACCESSES < 1e-3


def check_21_usage(subject: Subject) -> None:
    """Token counts stand where LlamaIndex looks, and are counted once."""
    for endpoint in ENDPOINTS:
        handler = TokenCountingHandler(tokenizer=lambda text: [0] * len(text))
        llm = subject.llm.model_copy(update={"callback_manager": CallbackManager([handler])})
        final = responses(llm, endpoint, temperature=0.0, max_tokens=4)[-1]
        usage = dict(final.raw)["usage"]
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert usage[name] == final.additional_kwargs[name], endpoint
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        (counted,) = handler.llm_token_counts
        assert counted.prompt_token_count == usage["prompt_tokens"], endpoint
        assert counted.completion_token_count == usage["completion_tokens"], endpoint


def check_22_events(subject: Subject) -> None:
    """One start and one end per request, of one span; an error has no end."""
    for endpoint in ENDPOINTS:
        with _Recorder() as recorder:
            responses(subject.llm, endpoint, max_tokens=4)
        events = [event for event in recorder.events if type(event).__name__.startswith("LLM")]
        counts = Counter(type(event).__name__ for event in events)
        kind = "Chat" if endpoint in CHATS else "Completion"
        assert counts[f"LLM{kind}StartEvent"] == 1, (endpoint, counts)
        assert counts[f"LLM{kind}EndEvent"] == 1, (endpoint, counts)
        assert {name for name in counts if "InProgress" not in name} == {
            f"LLM{kind}StartEvent",
            f"LLM{kind}EndEvent",
        }, (endpoint, counts)
        assert len({event.span_id for event in events}) == 1, endpoint
        with _Recorder() as recorder, pytest.raises(Exception, match=r"(?s).*"):
            responses(subject.llm, endpoint, max_tokens=10**9)
        names = {type(event).__name__ for event in recorder.events}
        assert f"LLM{kind}EndEvent" not in names, endpoint


def check_23_logprobs(subject: Subject) -> None:
    """A list of lists of `LogProb`, one row per token, on chat and completion."""
    for endpoint in ENDPOINTS:
        final = responses(subject.llm, endpoint, temperature=0.0, max_tokens=4, logprobs=2)[-1]
        rows = final.logprobs
        assert rows, endpoint
        assert len(rows) == final.raw["usage"]["completion_tokens"], endpoint
        for row in rows:
            assert row, endpoint
            assert all(isinstance(item, LogProb) and item.logprob <= 1e-6 for item in row)


def check_24_blocks(subject: Subject) -> None:
    """A block that cannot be read is refused by name; reasoning is a block, never text."""
    image = ChatMessage(blocks=[TextBlock(text="Look."), ImageBlock(image=b"x")])
    for endpoint in CHATS:
        with pytest.raises(Exception, match="ImageBlock") as caught:
            responses(subject.llm, endpoint, [image])
        assert not is_swallowed(caught.value), endpoint
    if subject.script is None:
        return
    for endpoint in CHATS:
        subject.script("<think>\nHm.\n</think>\n\nYes.")
        chunks = responses(subject.llm, endpoint)
        blocks = chunks[-1].message.blocks
        assert [type(block) for block in blocks] == [ThinkingBlock, TextBlock], endpoint
        assert blocks[0].content == "Hm.", endpoint
        assert all("Hm" not in text_of(chunk) for chunk in chunks), endpoint
