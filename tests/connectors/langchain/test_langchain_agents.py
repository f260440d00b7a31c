"""Agents and graphs: strategies, middleware, fan-out, checkpoints, many agents on one engine."""

import asyncio
import json
import operator
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Annotated

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import (
    AgentMiddleware,
    ModelRetryMiddleware,
    SummarizationMiddleware,
)
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain.chat_models import init_chat_model
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_fake_engine import FakeEngine
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send
from pydantic import BaseModel
from tiny_checkpoints import write_tiny_llama
from typing_extensions import TypedDict

import engine as engine_package
from engine import Engine, StepError
from llm_connectors.langchain import ChatLocal, register

# The protocol events of LangChain and LangGraph are called experimental there.
pytestmark = pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning")

CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>'


@tool
def get_weather(city: str) -> str:
    """Weather in a city."""
    return f"fog in {city}"


class Report(BaseModel):
    """A weather report."""

    summary: str


def weather_model(prompt):
    """Calls the tool first, and answers once its result is there."""
    return "It is fog." if "fog in" in prompt else f"I look. {CALL}"


@pytest.fixture
def engine():
    made = FakeEngine(template="<tool_call>")
    made.answer_with = weather_model
    yield made
    made.close()


@pytest.fixture
def chat(engine):
    return ChatLocal(engine=engine)


def question(text="Weather in Oslo?"):
    return {"messages": [HumanMessage(text)]}


# ------------------------------------------------------------------ create_agent


def test_an_agent_calls_its_tool_and_answers(chat, engine):
    agent = create_agent(chat, [get_weather])
    messages = agent.invoke(question())["messages"]
    kinds = [type(message) for message in messages]
    assert kinds == [HumanMessage, AIMessage, ToolMessage, AIMessage]
    assert messages[1].tool_calls[0]["args"] == {"city": "Oslo"}
    assert messages[2].tool_call_id == messages[1].tool_calls[0]["id"]
    assert messages[-1].content == "It is fog."
    assert engine.last_render.tools[0]["function"]["name"] == "get_weather"


async def test_an_agent_in_an_event_loop_streams_messages_and_events(chat):
    agent = create_agent(chat, [get_weather])
    pieces = [
        message async for message, _metadata in agent.astream(question(), stream_mode="messages")
    ]
    texts = "".join(piece.text for piece in pieces if piece.type == "AIMessageChunk")
    assert "I look." in texts
    assert "It is fog." in texts
    called = [chunk["name"] for piece in pieces for chunk in getattr(piece, "tool_call_chunks", [])]
    assert "get_weather" in called


def test_an_agent_streams_protocol_events(chat, monkeypatch):
    """Through the native hook, not through chunks."""
    monkeypatch.setattr(ChatLocal, "_stream", None)
    run = create_agent(chat, [get_weather]).stream_events(question(), version="v3")
    events = [event for event in run if event["method"] == "messages"]
    kinds = [event["params"]["data"][0]["event"] for event in events]
    assert kinds.count("message-start") == kinds.count("message-finish") >= 2
    assert "content-block-delta" in kinds


def test_a_schema_makes_a_provider_strategy(chat, engine):
    """The profile says that the model keeps to schemas, so no tool stands for the answer."""
    engine.answer_with = lambda prompt: '{"summary": "fog"}' if "fog in" in prompt else CALL
    result = create_agent(chat, [get_weather], response_format=Report).invoke(question())
    assert result["structured_response"] == Report(summary="fog")
    assert [type(one) for one in result["messages"]][1:3] == [AIMessage, ToolMessage]
    assert len(engine.last_render.tools) == 1
    explicit = create_agent(chat, [get_weather], response_format=ProviderStrategy(Report))
    assert explicit.invoke(question())["structured_response"] == Report(summary="fog")
    alone = create_agent(chat, [], response_format=Report)
    engine.answer_with = lambda prompt: '{"summary": "dry"}'
    assert alone.invoke(question())["structured_response"] == Report(summary="dry")


def test_a_tool_strategy_works_as_well(chat, engine):
    final = {"name": "Report", "arguments": {"summary": "fog"}}
    first = {"name": "get_weather", "arguments": {"city": "Oslo"}}
    engine.answer_with = lambda prompt: json.dumps(final if "fog in" in prompt else first)
    agent = create_agent(chat, [get_weather], response_format=ToolStrategy(Report))
    result = agent.invoke(question())
    assert result["structured_response"] == Report(summary="fog")
    schema = json.loads(engine.requests[-1].params.json_schema)
    names = [one["properties"]["name"]["const"] for one in schema["anyOf"]]
    assert names == ["get_weather", "Report"]


def test_a_checkpointer_carries_the_conversation(chat, engine):
    agent = create_agent(chat, [get_weather], checkpointer=InMemorySaver())
    config = {"configurable": {"thread_id": "one"}}
    agent.invoke(question(), config)
    agent.invoke(question("And now?"), config)
    contents = [message["content"] for message in engine.last_render.messages]
    assert contents[0] == "Weather in Oslo?"
    assert contents[-1] == "And now?"


def test_summaries_begin_by_the_profile_and_our_token_counts(engine):
    """`fraction` needs the profile's max_input_tokens, and counts need our provider's name."""
    engine.answer_with = lambda prompt: "a summary" if "summary" in prompt.lower() else "fine"
    chat = ChatLocal(engine=engine)
    assert chat.profile["max_input_tokens"] == engine.max_model_len
    summarize = SummarizationMiddleware(
        chat, trigger=("fraction", 0.01), keep=("messages", 1), token_counter=len
    )
    agent = create_agent(chat, [], middleware=[summarize])
    history = [HumanMessage("x" * 300), AIMessage("y" * 300), HumanMessage("go on")]
    history[1].usage_metadata = {"input_tokens": 600, "output_tokens": 1, "total_tokens": 601}
    history[1].response_metadata = {"model_provider": "llm-connectors"}
    result = agent.invoke({"messages": history})
    assert "a summary" in result["messages"][0].text


def test_steps_that_fail_are_retried_and_bad_requests_are_not(chat, engine):
    attempts = []

    def flaky(prompt):
        attempts.append(prompt)
        return "fine"

    engine.answer_with = flaky
    original = engine._advance

    def failing(request, handle):
        if len(attempts) == 1:
            return handle.publish(error=StepError("The step failed."))
        return original(request, handle)

    engine._advance = failing
    retry = ModelRetryMiddleware(max_retries=2, initial_delay=0.0, on_failure="error")
    agent = create_agent(chat, [], middleware=[retry])
    assert agent.invoke(question())["messages"][-1].content == "fine"
    assert len(attempts) == 2


# ------------------------------------------------------------------ graphs


class State(TypedDict):
    topics: list[str]
    notes: Annotated[list[str], operator.add]


def fan_out_graph(node):
    graph = StateGraph(State)
    graph.add_node("note", node)
    graph.add_conditional_edges(
        START, lambda state: [Send("note", {"topic": one}) for one in state["topics"]], ["note"]
    )
    graph.add_edge("note", END)
    return graph.compile()


TOPICS = {"topics": [f"topic {index}" for index in range(40)], "notes": []}


def test_branches_of_an_async_graph_share_one_batch(chat, engine):
    engine.step_s = 0.005

    async def note(state):
        return {"notes": [(await chat.ainvoke(state["topic"])).content]}

    result = asyncio.run(fan_out_graph(note).ainvoke(TOPICS))
    assert len(result["notes"]) == 40
    assert engine.peak_running == 40


def test_branches_of_a_sync_graph_share_a_batch_too(chat, engine):
    engine.step_s = 0.02
    together = threading.Barrier(4)

    def note(state):
        together.wait(timeout=20)
        return {"notes": [chat.invoke(state["topic"]).content]}

    result = fan_out_graph(note).invoke({"topics": TOPICS["topics"][:4], "notes": []})
    assert len(result["notes"]) == 4
    assert engine.peak_running == 4


def test_many_agents_share_one_engine(chat, engine):
    engine.step_s = 0.02
    agent = create_agent(chat, [get_weather])
    results = asyncio.run(agent.abatch([question(f"Weather, {index}?") for index in range(64)]))
    assert all(result["messages"][-1].content == "It is fog." for result in results)
    assert engine.peak_running >= 48


def test_many_agents_on_a_real_engine_share_a_batch_and_find_their_history(tmp_path):
    """Two steps each: a forced call, held to its schema, then an answer to the tool's result."""
    folder = write_tiny_llama(tmp_path, max_position_embeddings=4096)
    engine = Engine(
        str(folder), device="cpu", num_threads=1, max_num_seqs=64, max_model_len=2048, block_size=16
    )
    chat = ChatLocal(engine=engine, max_tokens=24, seed=1)

    class CallsFirst(AgentMiddleware):
        """Random weights would not call a tool by themselves."""

        async def awrap_model_call(self, request, handler):
            is_first = not any(isinstance(one, ToolMessage) for one in request.messages)
            return await handler(request.override(tool_choice="any" if is_first else None))

    agent = create_agent(chat, [get_weather], middleware=[CallsFirst()])
    asked = [question(f"Weather in city number {index}?") for index in range(64)]
    results = asyncio.run(agent.abatch(asked))
    for result in results:
        _human, called, told, last = result["messages"]
        assert set(called.tool_calls[0]["args"]) == {"city"}
        assert told.content.startswith("fog in")
        # The whole first prompt but its last block is read from the cache by the second step.
        cached = last.usage_metadata["input_token_details"]["cache_read"]
        assert cached >= called.usage_metadata["input_tokens"] // 16 * 16 - 16
    stats = engine.stats()
    assert stats.peak_running >= 48
    assert stats.prefix_hit_rate > 0.8
    engine.close()


# ------------------------------------------------------------------ init_chat_model


def test_init_chat_model_knows_us_once_registered():
    code = (
        "from langchain.chat_models import init_chat_model\n"
        "import llm_connectors.langchain as ours\n"
        "try:\n    init_chat_model('llm-connectors:smollm2-135m')\n"
        "except ValueError: pass\n"
        "else: raise SystemExit('registered on import')\n"
        "ours.register(); ours.register()\n"
        "print(type(init_chat_model('llm-connectors:smollm2-135m', temperature=0)).__name__)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    source = str(Path(engine_package.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.strip() == "ChatLocal", done.stderr


def test_every_spelling_of_init_chat_model():
    register()
    for made in (
        init_chat_model("llm-connectors:smollm2-135m", max_tokens=3),
        init_chat_model("llm_connectors:smollm2-135m", max_tokens=3),
        init_chat_model("smollm2-135m", model_provider="llm-connectors", max_tokens=3),
    ):
        assert isinstance(made, ChatLocal)
        assert (made.model, made.max_tokens) == ("smollm2-135m", 3)


# ------------------------------------------------------------------ the profile


def test_the_profile_says_what_the_model_can_do():
    engine = FakeEngine(template="<think><tool_call>")
    chat = ChatLocal(engine=engine)
    chat.invoke("hi")
    profile = chat.profile
    expected = {
        "max_input_tokens": engine.max_model_len,
        "text_inputs": True,
        "image_inputs": False,
        "tool_calling": True,
        "tool_choice": True,
        "tool_call_streaming": True,
        "mid_conversation_tools": False,
        "structured_output": True,
        "reasoning_output": True,
        "temperature": True,
    }
    assert {name: profile.get(name) for name in expected} == expected
    engine.close()
    plain = FakeEngine()
    chat = ChatLocal(engine=plain)
    assert chat.profile["reasoning_output"] is False
    plain.close()
