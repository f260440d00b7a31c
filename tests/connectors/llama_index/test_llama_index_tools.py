"""Tools and reasoning: shown, read out of answers by every endpoint, told back. Fake engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from llama_index.core.agent.workflow import (
    AgentStream,
    AgentWorkflow,
    FunctionAgent,
    ReActAgent,
    ToolCallResult,
)
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index_fake_engine import CHATML, NO_SYSTEM, FakeEngine
from pydantic import BaseModel

from llm_connectors.llama_index import LocalLLM, NoToolCallError, RequestError
from llm_connectors.llama_index.messages import template_messages

# LlamaIndex's agents use names that pydantic and they themselves have retired.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

WITH_TOOLS = "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}" + CHATML.replace(
    "{{ m.content }}",
    "{{ m.content }}{% if m.tool_calls %}<tool_call>{{ m.tool_calls | tojson }}{% endif %}",
)
THINKING = WITH_TOOLS + "{% if enable_thinking %}{% endif %}{# <think> </think> #}"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
SECOND = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bergen"}}\n</tool_call>'
USER = [ChatMessage(content="Weather in Oslo?")]
CHATS = ("chat", "achat", "stream_chat", "astream_chat")


class Point(BaseModel):
    x: int


def weather(city: str) -> str:
    """Weather in a city."""
    return f"Fog in {city}."


def clock() -> str:
    """The time."""
    return "Noon."


WEATHER = FunctionTool.from_defaults(weather)
CLOCK = FunctionTool.from_defaults(clock)


@pytest.fixture
def fake() -> Iterator[FakeEngine]:
    engine = FakeEngine(template=THINKING)
    yield engine
    engine.close()


def answering(fake: FakeEngine, *texts: str) -> None:
    """The texts one after the other, then the last one again."""
    waiting = list(texts)
    fake.answer = lambda _prompt, _params: waiting.pop(0) if len(waiting) > 1 else waiting[0]


def chunks_of(llm: LocalLLM, endpoint: str, *args: Any, **kwargs: Any) -> list[ChatResponse]:
    method = getattr(llm, endpoint)
    if not endpoint.startswith("a"):
        result = method(*args, **kwargs)
        return list(result) if "stream" in endpoint else [result]

    async def drain() -> list[ChatResponse]:
        result = await method(*args, **kwargs)
        return [chunk async for chunk in result] if "stream" in endpoint else [result]

    return asyncio.run(drain())


# ---- what the model is shown


def test_metadata_says_whether_the_model_can_call_tools(fake: FakeEngine) -> None:
    assert LocalLLM(engine=fake).metadata.is_function_calling_model is True
    plain = FakeEngine()
    llm = LocalLLM(engine=plain)
    assert llm.metadata.is_function_calling_model is False
    assert llm.with_options(tool_parser="hermes").metadata.is_function_calling_model is True
    base = FakeEngine(template=None)
    assert not LocalLLM(engine=base, tool_parser="hermes").metadata.is_function_calling_model
    plain.close()
    base.close()


@pytest.mark.parametrize("endpoint", CHATS)
def test_tools_reach_the_template(fake: FakeEngine, endpoint: str) -> None:
    llm = LocalLLM(engine=fake)
    tools = [WEATHER, CLOCK.metadata.to_openai_tool()]
    chunks_of(llm, endpoint, USER, tools=tools)
    prompt = fake.detokenize(fake.requests[-1].prompt_ids)
    assert "Weather in a city." in prompt
    assert "The time." in prompt
    assert len(fake.requests[-1].prompt_ids) == llm.count_messages(USER, tools)
    chunks_of(llm, endpoint, USER)
    assert "Weather in a city." not in fake.detokenize(fake.requests[-1].prompt_ids)


def test_a_template_without_tools_has_them_in_the_system_message() -> None:
    fake = FakeEngine(answer=lambda _prompt, _params: CALL)
    response = LocalLLM(engine=fake).chat(USER, tools=[WEATHER])
    assert "system" in fake.detokenize(fake.requests[0].prompt_ids)
    assert "Weather in a city." in fake.detokenize(fake.requests[0].prompt_ids)
    assert response.message.blocks[-1].tool_name == "weather"
    fake.close()


def test_a_completion_or_a_base_model_takes_no_tools(fake: FakeEngine) -> None:
    with pytest.raises(RequestError, match="complete"):
        LocalLLM(engine=fake).complete("Hi", tools=[WEATHER])
    base = FakeEngine(template=None)
    with pytest.raises(RequestError, match="template"):
        LocalLLM(engine=base).chat(USER, tools=[WEATHER])
    base.close()


def test_tools_are_described_once(fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = FunctionTool.from_defaults(weather)
    llm = LocalLLM(engine=fake)
    llm.chat(USER, tools=[tool])
    monkeypatch.setattr(type(tool.metadata), "get_parameters_dict", lambda _self: 1 / 0)
    llm.chat(USER, tools=[tool])
    tool.metadata.description = "Another."
    with pytest.raises(RequestError, match="cannot be described"):
        llm.chat(USER, tools=[tool])


def test_conversation_with_calls_as_templates_read_it() -> None:
    legacy = SimpleNamespace(id="b", function=SimpleNamespace(name="f", arguments='{"x": 1}'))
    messages = [
        ChatMessage("Weather?"),
        ChatMessage(
            role="assistant",
            blocks=[
                ThinkingBlock(content="Hm."),
                TextBlock(text="Let me see."),
                ToolCallBlock(tool_call_id="a", tool_name="weather", tool_kwargs={"city": "Oslo"}),
                ToolCallBlock(tool_call_id="c", tool_name="weather", tool_kwargs='{"city": "Bo"}'),
            ],
            additional_kwargs={"tool_calls": [legacy]},
        ),
        ChatMessage("Fog.", role=MessageRole.TOOL, additional_kwargs={"tool_call_id": "a"}),
        ChatMessage("", role="assistant", additional_kwargs={"tool_calls": [legacy]}),
    ]
    _, answer, result, old = template_messages(messages)
    assert answer["content"] == "Let me see."
    assert answer["reasoning_content"] == "Hm."
    assert [call["id"] for call in answer["tool_calls"]] == ["a", "c"]
    assert answer["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Oslo"}}
    assert result == {"role": "tool", "content": "Fog.", "tool_call_id": "a"}
    assert old["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"x": 1}'}


# ---- what is read out of answers


@pytest.mark.parametrize("endpoint", CHATS)
def test_calls_are_read_by_every_endpoint(fake: FakeEngine, endpoint: str) -> None:
    answering(fake, f"Let me look.\n{CALL}\n{SECOND}")
    llm = LocalLLM(engine=fake)
    chunks = chunks_of(llm, endpoint, USER, tools=[WEATHER])
    final = chunks[-1]
    assert final.message.content.strip() == "Let me look."
    calls = llm.get_tool_calls_from_response(final)
    assert [(call.tool_name, call.tool_kwargs) for call in calls] == [
        ("weather", {"city": "Oslo"}),
        ("weather", {"city": "Bergen"}),
    ]
    assert len({call.tool_id for call in calls}) == 2
    assert final.raw["finish_reason"] == "tool_calls"
    assert "".join(chunk.delta or "" for chunk in chunks[:-1]).strip() in ("", "Let me look.")
    legacy = final.message.additional_kwargs["tool_calls"]
    assert [call["id"] for call in legacy] == [call.tool_id for call in calls]
    assert json.loads(legacy[0]["function"]["arguments"]) == {"city": "Oslo"}
    # Ids and what is known of the arguments only grow while the answer is streamed.
    for chunk in chunks:
        for early, late in zip(
            llm.get_tool_calls_from_response(chunk, error_on_no_tool_call=False),
            calls,
            strict=False,
        ):
            assert early.tool_id == late.tool_id
            assert late.tool_kwargs.get("city", "").startswith(early.tool_kwargs.get("city", ""))


@pytest.mark.parametrize("endpoint", CHATS)
def test_half_a_call_is_not_made(fake: FakeEngine, endpoint: str) -> None:
    answering(fake, '<tool_call>\n{"name": "weather", "arguments": {"city": "Os')
    llm = LocalLLM(engine=fake)
    final = chunks_of(llm, endpoint, USER, tools=[WEATHER])[-1]
    assert llm.get_tool_calls_from_response(final, error_on_no_tool_call=False) == []
    with pytest.raises(NoToolCallError, match="tool_required"):
        llm.get_tool_calls_from_response(final)
    (broken,) = final.raw["invalid_tool_calls"]
    assert broken["name"] == "weather"
    assert broken["error"]


@pytest.mark.parametrize("endpoint", CHATS)
def test_reasoning_is_a_block_and_never_text(fake: FakeEngine, endpoint: str) -> None:
    answering(fake, "<think>\nFog is likely in Oslo today.\n</think>\n\nFoggy, I think.")
    chunks = chunks_of(LocalLLM(engine=fake), endpoint, USER)
    thinking, text = chunks[-1].message.blocks
    assert thinking.content == "Fog is likely in Oslo today."
    assert text.text == chunks[-1].message.content == "Foggy, I think."
    assert all("<think>" not in (chunk.message.content or "") for chunk in chunks)
    if "stream" in endpoint:
        deltas = [chunk.additional_kwargs.get("thinking_delta") or "" for chunk in chunks]
        assert "".join(deltas) == thinking.content
        assert "".join(chunk.delta or "" for chunk in chunks) == text.text


def test_completions_leave_reasoning_out_of_the_text(fake: FakeEngine) -> None:
    answering(fake, "<think>\nHm.\n</think>\n\nFoggy.")
    response = LocalLLM(engine=fake).complete("Weather?")
    assert response.text == "Foggy."
    assert response.raw["thinking"] == "Hm."


def test_thinking_switch_reaches_the_template(fake: FakeEngine) -> None:
    fake.template = CHATML + "{{ '<think>' if enable_thinking else 'no thoughts' }}"
    LocalLLM(engine=fake, thinking=False).chat(USER)
    assert "no thoughts" in fake.detokenize(fake.requests[-1].prompt_ids)
    answering(fake, "Hm.</think>Yes.")
    response = LocalLLM(engine=fake, thinking=False).chat(USER, thinking=True)
    assert [type(block) for block in response.message.blocks] == [ThinkingBlock, TextBlock]


@pytest.mark.parametrize("source", ["blocks", "legacy"])
def test_tool_calls_of_other_classes_are_read(fake: FakeEngine, source: str) -> None:
    llm = LocalLLM(engine=fake)
    texts = ['{"city": "Oslo"}', '{"city": "Os', "", "[1]"]
    if source == "blocks":
        blocks = [ToolCallBlock(tool_name="weather", tool_kwargs=text) for text in texts]
        message = ChatMessage(role="assistant", blocks=blocks)
    else:
        calls = [{"function": {"name": "weather", "arguments": text}} for text in texts]
        message = ChatMessage(role="assistant", additional_kwargs={"tool_calls": calls})
    found = llm.get_tool_calls_from_response(ChatResponse(message=message))
    assert [one.tool_kwargs for one in found] == [{"city": "Oslo"}, {"city": "Os"}, {}, {}]
    assert len({one.tool_id for one in found}) == 4


# ---- chat_with_tools


@pytest.mark.parametrize("endpoint", [f"{name}_with_tools" for name in CHATS])
def test_chat_with_tools_leaves_the_history_alone(fake: FakeEngine, endpoint: str) -> None:
    answering(fake, CALL)
    history = [ChatMessage(content="Hello."), ChatMessage(content="Hi.", role="assistant")]
    llm = LocalLLM(engine=fake)
    final = chunks_of(llm, endpoint, [WEATHER], user_msg="Weather in Oslo?", chat_history=history)[
        -1
    ]
    assert llm.get_tool_calls_from_response(final)[0].tool_kwargs == {"city": "Oslo"}
    assert len(history) == 2
    assert "Hello." in fake.detokenize(fake.requests[-1].prompt_ids)
    assert "Weather in Oslo?" in fake.detokenize(fake.requests[-1].prompt_ids)


@pytest.mark.parametrize("endpoint", [f"{name}_with_tools" for name in CHATS])
@pytest.mark.parametrize("parallel", [False, True])
def test_one_call_at_most_where_asked_for(fake: FakeEngine, endpoint: str, parallel: bool) -> None:
    answering(fake, f"{CALL}\n{SECOND}")
    llm = LocalLLM(engine=fake)
    chunks = chunks_of(
        llm, endpoint, [WEATHER], user_msg="Weather?", allow_parallel_tool_calls=parallel
    )
    for chunk in chunks:
        calls = llm.get_tool_calls_from_response(chunk, error_on_no_tool_call=False)
        assert len(calls) <= (2 if parallel else 1)
    assert len(calls) == (2 if parallel else 1)


def test_tool_choice_none_shows_no_tools(fake: FakeEngine) -> None:
    LocalLLM(engine=fake).chat_with_tools([WEATHER], user_msg="Hi", tool_choice="none")
    assert "Weather in a city." not in fake.detokenize(fake.requests[-1].prompt_ids)


def test_no_call_where_none_is_needed(fake: FakeEngine) -> None:
    answering(fake, "Just fog.")
    llm = LocalLLM(engine=fake)
    response = llm.predict_and_call([WEATHER], "Weather?", error_on_no_tool_call=False)
    assert response.response == "Just fog."
    assert response.sources == []


# ---- agents


def memory() -> ChatMemoryBuffer:
    return ChatMemoryBuffer.from_defaults(token_limit=3000, tokenizer_fn=str.split)


def test_function_agent_loop(fake: FakeEngine) -> None:
    answering(
        fake,
        f"<think>\nI must look.\n</think>\n{CALL}\n{SECOND}",
        "<think>\nNow I know.\n</think>\nFog everywhere.",
    )
    llm = LocalLLM(engine=fake, max_tokens=200)
    agent = FunctionAgent(tools=[WEATHER], llm=llm)

    async def main() -> tuple[str, list[Any]]:
        handler = agent.run(user_msg="Weather in Oslo and Bergen?", memory=memory())
        events = [event async for event in handler.stream_events()]
        return str(await handler), events

    answer, events = asyncio.run(main())
    assert answer == "Fog everywhere."
    results = [event for event in events if isinstance(event, ToolCallResult)]
    assert sorted(str(one.tool_output) for one in results) == ["Fog in Bergen.", "Fog in Oslo."]
    streams = [event for event in events if isinstance(event, AgentStream)]
    thoughts = "".join(event.thinking_delta or "" for event in streams)
    assert thoughts == "I must look.Now I know."
    second = fake.detokenize(fake.requests[1].prompt_ids)
    assert "Fog in Oslo." in second
    assert "Bergen" in second
    assert len(fake.requests) == 2


def test_agent_workflow_picks_the_function_agent(fake: FakeEngine) -> None:
    answering(fake, CALL, "Fog.")
    workflow = AgentWorkflow.from_tools_or_functions([weather], llm=LocalLLM(engine=fake))
    assert isinstance(next(iter(workflow.agents.values())), FunctionAgent)

    async def main() -> str:
        return str(await workflow.run(user_msg="Weather?", memory=memory()))

    assert asyncio.run(main()) == "Fog."


def test_react_agent_loop(fake: FakeEngine) -> None:
    answering(
        fake,
        'Thought: I must look.\nAction: weather\nAction Input: {"city": "Oslo"}',
        "Thought: I know.\nAnswer: Fog.",
    )
    agent = ReActAgent(tools=[WEATHER], llm=LocalLLM(engine=fake))

    async def main() -> str:
        return str(await agent.run(user_msg="Weather?", memory=memory()))

    assert asyncio.run(main()) == "Fog."
    assert "Fog in Oslo." in fake.detokenize(fake.requests[1].prompt_ids)


def test_agents_share_the_batch(fake: FakeEngine) -> None:
    fake.step_s = 0.01

    def answer(prompt: str, _params: Any) -> str:
        return "Fog." if "Fog in Oslo." in prompt else CALL

    fake.answer = answer
    llm = LocalLLM(engine=fake)

    async def main() -> list[str]:
        agents = [FunctionAgent(tools=[WEATHER], llm=llm) for _ in range(8)]
        runs = [agent.run(user_msg="Weather in Oslo?", memory=memory()) for agent in agents]
        return [str(await run) for run in runs]

    assert asyncio.run(main()) == ["Fog."] * 8
    assert fake.peak_running == 8
    assert len(fake.requests) == 16


def test_system_prompt_where_the_template_takes_no_system_message() -> None:
    fake = FakeEngine(template=NO_SYSTEM, answer=lambda _prompt, _params: '{"x": 1}')
    llm = LocalLLM(engine=fake, system_prompt="Be brief.")
    prompt = PromptTemplate("Weather?")
    assert llm.predict(prompt) == asyncio.run(llm.apredict(prompt)) == '{"x": 1}'
    assert llm.structured_predict(Point, prompt) == Point(x=1)
    for request in fake.requests:
        shown = fake.detokenize(request.prompt_ids)
        assert shown.count("Be brief.") == 1
        assert "system" not in shown
    fake.close()
