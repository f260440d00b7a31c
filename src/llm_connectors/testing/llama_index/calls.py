"""Checks of tool calls, structured answers and agents."""

from __future__ import annotations

import asyncio
import copy
import enum
from typing import Any, Literal

import pytest
from llama_index.core.agent.workflow import (
    AgentStream,
    AgentWorkflow,
    FunctionAgent,
    ReActAgent,
    ToolCallResult,
)
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, ToolCallBlock
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.program.utils import process_streaming_objects
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel, Field

from llm_connectors.testing.llama_index.subject import CHATS, Subject

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


class _Place(BaseModel):
    city: Literal["Oslo", "Rome"]


def weather(city: str) -> str:
    """Weather in a city."""
    return f"Fog in {city}."


class _Kind(enum.Enum):
    TOWN = "town"
    CAPITAL = "capital"


class _Street(BaseModel):
    name: str = Field(max_length=8)


class _City(BaseModel):
    """A city."""

    name: str = Field(max_length=8)
    kind: _Kind
    streets: list[_Street] = Field(max_length=1)
    mayor: str | None = Field(default=None, max_length=8)


class _Verdict(BaseModel):
    """A verdict."""

    is_good: bool
    marks: int = Field(ge=0, le=9)


def _tools() -> list[FunctionTool]:
    return [FunctionTool.from_defaults(weather, fn_schema=_Place)]


def _calling(subject: Subject) -> FunctionCallingLLM:
    llm = subject.llm
    assert isinstance(llm, FunctionCallingLLM), f"{type(llm).__name__} calls no tools"
    assert llm.metadata.is_function_calling_model, (
        "metadata.is_function_calling_model is False: the factory's model knows no tools"
    )
    return llm


def _last(llm: FunctionCallingLLM, endpoint: str, **kwargs: Any) -> Any:
    method = getattr(llm, f"{endpoint}_with_tools")
    if not endpoint.startswith("a"):
        result = method(_tools(), **kwargs)
        return list(result)[-1] if "stream" in endpoint else result

    async def main() -> Any:
        result = await method(_tools(), **kwargs)
        return [chunk async for chunk in result][-1] if "stream" in endpoint else result

    return asyncio.run(main())


def check_17_tools(subject: Subject) -> None:
    """Calls are forced, read, kept to one, answered by id; the caller's history is left alone."""
    llm = _calling(subject)
    history = [ChatMessage(content="Hello."), ChatMessage(content="Hi.", role="assistant")]
    before = copy.deepcopy(history)
    if subject.script is not None:
        # What is told is not held to anything, so nothing can be forced.
        _check_scripted_calls(subject, llm)
        return
    for endpoint in CHATS:
        response = _last(
            llm, endpoint, user_msg="Weather?", chat_history=history, tool_required=True
        )
        calls = llm.get_tool_calls_from_response(response)
        assert [call.tool_name for call in calls] == ["weather"], endpoint
        assert calls[0].tool_kwargs["city"] in ("Oslo", "Rome"), endpoint
        assert history == before, f"{endpoint}: the caller's history is changed"
    several = _last(
        llm, "chat", user_msg="Weather?", tool_required=True, allow_parallel_tool_calls=True
    )
    ids = [call.tool_id for call in llm.get_tool_calls_from_response(several)]
    assert len(set(ids)) == len(ids) >= 1
    blocks = [
        ToolCallBlock(tool_call_id="a", tool_name="weather", tool_kwargs={"city": "Oslo"}),
        ToolCallBlock(tool_call_id="b", tool_name="weather", tool_kwargs='{"city": "Rome"}'),
    ]
    answer = ChatMessage(role="assistant", blocks=blocks)
    found = llm.get_tool_calls_from_response(ChatResponse(message=answer))
    assert [(one.tool_id, one.tool_kwargs) for one in found] == [
        ("a", {"city": "Oslo"}),
        ("b", {"city": "Rome"}),
    ]
    results = [
        ChatMessage("Fog.", role="tool", additional_kwargs={"tool_call_id": name}) for name in "ab"
    ]
    _last(llm, "chat", chat_history=[*history, answer, *results])
    silent = ChatResponse(message=ChatMessage("No.", role="assistant"))
    assert llm.get_tool_calls_from_response(silent, error_on_no_tool_call=False) == []
    with pytest.raises(Exception, match=r"(?s).+"):
        llm.get_tool_calls_from_response(silent)


def _check_scripted_calls(subject: Subject, llm: FunctionCallingLLM) -> None:
    """Two calls of one tool: both with ids of their own, or one where only one is allowed."""
    script = subject.probe("script")
    for endpoint in CHATS:
        for is_parallel in (False, True):
            script(f"{CALL}\n{CALL.replace('Oslo', 'Rome')}")
            response = _last(
                llm, endpoint, user_msg="Weather?", allow_parallel_tool_calls=is_parallel
            )
            calls = llm.get_tool_calls_from_response(response)
            assert [call.tool_kwargs["city"] for call in calls] == (
                ["Oslo", "Rome"] if is_parallel else ["Oslo"]
            ), (endpoint, is_parallel)
            assert len({call.tool_id for call in calls}) == len(calls), endpoint
    script("Some answer.")


def check_18_streamed_objects(subject: Subject) -> None:
    """Streamed objects fill up and end whole; none of them stays blank."""
    found: list[Any] = list(
        subject.llm.stream_structured_predict(_City, PromptTemplate("Describe {it}."), it="Oslo")
    )
    assert isinstance(found[-1], _City), "the last object is not whole"
    counts = [len(one.model_dump(exclude_none=True)) for one in found]
    assert counts[-1] >= 3, "the last object is blank"
    assert counts == sorted(counts), "objects do not fill up"
    # LlamaIndex's own programs read calls out of a stream's chunks, in either of two places.
    llm = subject.llm
    if isinstance(llm, FunctionCallingLLM) and llm.metadata.is_function_calling_model:
        chunks = list(llm.stream_chat_with_tools(_tools(), user_msg="Hi", tool_required=True))
        calls = [
            llm.get_tool_calls_from_response(one, error_on_no_tool_call=False) for one in chunks
        ]
        assert calls[-1], "the last chunk has no call"
        for chunk, seen in zip(chunks, calls, strict=True):
            blocks = [one for one in chunk.message.blocks if isinstance(one, ToolCallBlock)]
            legacy = chunk.message.additional_kwargs.get("tool_calls") or []
            assert len({len(blocks), len(seen), len(legacy)}) == 1, "a call is not in both places"
        whole: Any = process_streaming_objects(chunks[-1], _Place, flexible_mode=True, llm=llm)
        assert whole.city in ("Oslo", "Rome")


def check_19_structured(subject: Subject) -> None:
    """All four methods always give a valid object; two classes can share one prompt at once."""
    llm = subject.llm
    prompt = PromptTemplate("Describe {it}.")

    async def stream(cls: type[BaseModel]) -> Any:
        objects = await llm.astream_structured_predict(cls, prompt, it="Oslo")
        return [one async for one in objects][-1]

    for cls in (_City, _Verdict):
        assert type(llm.structured_predict(cls, prompt, it="Oslo")) is cls
        assert type(list(llm.stream_structured_predict(cls, prompt, it="Oslo"))[-1]) is cls
        assert type(asyncio.run(stream(cls))) is cls

    async def together() -> list[Any]:
        asked = [llm.astructured_predict(cls, prompt, it="it") for cls in (_City, _Verdict) * 4]
        return await asyncio.gather(*asked)

    assert [type(one) for one in asyncio.run(together())] == [_City, _Verdict] * 4


def _memory() -> ChatMemoryBuffer:
    return ChatMemoryBuffer.from_defaults(token_limit=3000, tokenizer_fn=str.split)


async def _events(agent: Any) -> tuple[str, list[Any]]:
    handler = agent.run(user_msg="Weather in Oslo?", memory=_memory(), max_iterations=4)
    events = [event async for event in handler.stream_events()]
    return str(await handler), events


def check_20_agents(subject: Subject) -> None:
    """`FunctionAgent`, `AgentWorkflow` and `ReActAgent` run a loop of two steps."""
    llm = _calling(subject)
    if subject.script is None:
        # Whatever the model writes, its first call can be forced.
        agent = FunctionAgent(tools=_tools(), llm=llm, initial_tool_choice="weather")
        for runner in (agent, AgentWorkflow(agents=[agent])):
            _, events = asyncio.run(_events(runner))
            results = [event for event in events if isinstance(event, ToolCallResult)]
            assert results, "no tool was called"
            assert str(results[0].tool_output).startswith("Fog in")
        return
    for runner in (
        FunctionAgent(tools=_tools(), llm=llm),
        AgentWorkflow(agents=[FunctionAgent(tools=_tools(), llm=llm)]),
    ):
        subject.script(f"<think>\nHm.\n</think>\n{CALL}", "Fog.")
        answer, events = asyncio.run(_events(runner))
        assert answer == "Fog."
        assert any(isinstance(event, ToolCallResult) for event in events), "no tool was called"
        assert _thoughts(events) == "Hm.", "the reasoning is not streamed"
    subject.script(
        '<think>\nHm.\n</think>\nThought: I look.\nAction: weather\nAction Input: {"city": "Oslo"}',
        "Thought: I know.\nAnswer: Fog.",
    )
    answer, events = asyncio.run(_events(ReActAgent(tools=_tools(), llm=llm)))
    assert answer == "Fog."
    assert any(isinstance(event, ToolCallResult) for event in events), "no tool was called"
    assert _thoughts(events) == "Hm.", "the reasoning is not streamed"


def _thoughts(events: list[Any]) -> str:
    deltas = [event.thinking_delta for event in events if isinstance(event, AgentStream)]
    return "".join(filter(None, deltas))
