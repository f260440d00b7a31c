"""Tools: shown to the model, read out of its answers by every verb, told back to it."""

import asyncio
import gc
import json
import operator
import time
import timeit
from functools import reduce

import pytest
from langchain_calls import VERBS
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import StructuredTool, tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_fake_engine import FakeEngine
from langchain_tests.utils.stream_lifecycle import assert_valid_event_stream
from pydantic import BaseModel, ValidationError

from engine import RequestError
from llm_connectors.langchain import ChatLocal

# The protocol events of LangChain and LangGraph are called experimental there.
pytestmark = pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning")

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
SECOND = '<tool_call>{"name": "get_weather", "arguments": {"city": "Bergen"}}</tool_call>'
BROKEN = '<tool_call>{"name": "get_weather", "arguments": {"city": "Os'


@tool
def get_weather(city: str) -> str:
    """Weather in a city."""
    return f"fog in {city}"


@tool
def get_time() -> str:
    """The time."""
    return "noon"


@pytest.fixture
def engine():
    made = FakeEngine(template="<tool_call><think>{{ enable_thinking }}")
    yield made
    made.close()


@pytest.fixture
def chat(engine):
    return ChatLocal(engine=engine)


def answering(engine, text):
    engine.answer_with = lambda prompt: text


def whole(chunks):
    return reduce(operator.add, chunks)


def test_tools_reach_the_template(chat, engine):
    chat.bind_tools([get_weather]).invoke("hi")
    assert engine.last_render.tools == [convert_to_openai_tool(get_weather)]
    chat.invoke("hi")
    assert engine.last_render.tools is None


def test_tools_are_described_where_the_template_knows_none():
    engine = FakeEngine(shows_tools=False)
    answering(engine, CALL)
    answer = ChatLocal(engine=engine).bind_tools([get_weather]).invoke("Weather in Oslo?")
    assert engine.last_render.tools is None
    system = engine.last_render.messages[0]
    assert system["role"] == "system"
    assert "Weather in a city." in system["content"]
    assert [call["name"] for call in answer.tool_calls] == ["get_weather"]
    engine.close()


@pytest.mark.parametrize("verb", VERBS)
def test_calls_are_read_by_every_verb(chat, engine, verb):
    answering(engine, f"Let me look.\n{CALL}\n{SECOND}")
    bound = {"tools": [get_weather]}
    if "generate" in verb:
        outcomes = [one[0].message for one in VERBS[verb](chat, "hi", **bound)]
    else:
        outcomes = VERBS[verb](chat, "hi", **bound)
    answer = whole(outcomes) if "stream" in verb else outcomes[0]
    assert answer.content == "Let me look."
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [
        ("get_weather", {"city": "Oslo"}),
        ("get_weather", {"city": "Bergen"}),
    ]
    assert len({call["id"] for call in answer.tool_calls}) == 2
    assert answer.invalid_tool_calls == []
    assert answer.response_metadata["finish_reason"] == "tool_calls"
    assert answer.usage_metadata["output_tokens"] > 0


@pytest.mark.parametrize("verb", ["invoke", "batch", "stream", "astream", "agenerate"])
def test_a_call_that_breaks_off_is_not_made(chat, engine, verb):
    """LangChain completes half JSON in streams; half an argument must not be acted upon."""
    answering(engine, f"Hm. {BROKEN}")
    outcomes = VERBS[verb](chat, "hi", tools=[get_weather])
    if "generate" in verb:
        outcomes = [one[0].message for one in outcomes]
    answer = whole(outcomes) if "stream" in verb else outcomes[0]
    assert answer.tool_calls == []
    (call,) = answer.invalid_tool_calls
    assert call["name"] == "get_weather"
    assert call["args"].startswith('{"city": "Os')
    assert answer.content == "Hm."
    assert answer.response_metadata["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "output",
    [
        "<tool_call>[1, 2]</tool_call>",
        '<tool_call>{"name": "f", "arguments": {"a": [1}',
        "<tool_call>",
    ],
)
def test_nonsense_calls_keep_their_text(chat, engine, output):
    answering(engine, output)
    bound = chat.bind_tools([get_weather])
    for answer in (bound.invoke("hi"), whole(list(bound.stream("hi")))):
        assert answer.tool_calls == []
        assert len(answer.invalid_tool_calls) == 1


def test_calls_stream_name_first_then_arguments_while_text_streams(chat, engine):
    answering(engine, f"Well then {CALL}")
    chunks = list(chat.bind_tools([get_weather]).stream("hi"))
    calls = [chunk.tool_call_chunks[0] for chunk in chunks if chunk.tool_call_chunks]
    assert calls[0]["name"] == "get_weather"
    assert calls[0]["id"]
    assert {one["index"] for one in calls} == {0}
    assert all(one["name"] is None and one["id"] is None for one in calls[1:])
    assert "".join(one["args"] for one in calls) == '{"city": "Oslo"}'
    assert "".join(chunk.content for chunk in chunks) == "Well then"
    assert chunks[-1].chunk_position == "last"
    assert [bool(chunk.usage_metadata) for chunk in chunks].count(True) == 1


def test_answers_without_tools_are_never_taken_apart(chat, engine):
    answering(engine, CALL)
    answer = chat.invoke("hi")
    assert answer.content == CALL
    assert answer.tool_calls == []


def test_no_parallel_calls_means_one_call(chat, engine):
    answering(engine, f"{CALL}\n{SECOND} more")
    bound = chat.bind_tools([get_weather], parallel_tool_calls=False)
    for answer in (bound.invoke("hi"), whole(list(bound.stream("hi")))):
        assert [call["args"] for call in answer.tool_calls] == [{"city": "Oslo"}]
        assert answer.content == ""


def test_no_tools_are_shown_where_none_may_be_called(chat, engine):
    answering(engine, "none")
    chat.bind_tools([get_weather], tool_choice="none").invoke("hi")
    assert engine.last_render.tools is None


# ------------------------------------------------------------------ histories


def test_a_history_with_calls_is_rendered(chat, engine):
    call = {"name": "get_weather", "args": {"city": "Oslo"}, "id": "c1"}
    broken = {"name": "get_time", "args": "{", "id": "c2", "error": "malformed"}
    messages = [
        HumanMessage("hi"),
        AIMessage("", tool_calls=[call], invalid_tool_calls=[broken]),
        ToolMessage("fog", tool_call_id="c1"),
        ToolMessage([{"type": "text", "text": "malformed"}], tool_call_id="c2", status="error"),
    ]
    chat.bind_tools([get_weather]).invoke(messages)
    shown = engine.last_render.messages
    assert [one["function"]["arguments"] for one in shown[1]["tool_calls"]] == [
        {"city": "Oslo"},
        "{",
    ]
    assert [one["content"] for one in shown[2:]] == ["fog", "malformed"]


@pytest.mark.parametrize("verb", ["invoke", "stream", "batch"])
def test_a_result_without_its_call_is_refused(chat, verb):
    with pytest.raises(RequestError, match=r"Message 1 is the result of tool call 'c9'"):
        VERBS[verb](chat, [HumanMessage("hi"), ToolMessage("fog", tool_call_id="c9")])


# ------------------------------------------------------------------ bad input


def test_two_tools_of_one_name_are_refused(chat, engine):
    other = {"name": "get_weather", "parameters": {"type": "object", "properties": {"at": {}}}}
    with pytest.raises(RequestError, match="Two tools are named 'get_weather'"):
        chat.bind_tools([get_weather, other])
    # The same tool twice, in two forms, is one.
    chat.bind_tools([get_weather, convert_to_openai_tool(get_weather)]).invoke("hi")
    assert len(engine.last_render.tools) == 1


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("get_wether", r"names no tool.*Did you mean 'get_weather'"),
        ({"type": "function", "function": {"name": "other"}}, "'other' names no tool"),
        ({"type": "allowed_tools"}, "names no tool"),
        (7, "is none of 'auto'"),
    ],
)
def test_choices_that_name_no_tool_are_refused(chat, choice, message):
    with pytest.raises(RequestError, match=message):
        chat.bind_tools([get_weather], tool_choice=choice)


def test_a_forced_call_needs_a_tool(chat):
    with pytest.raises(RequestError, match="there are no tools"):
        chat.bind_tools([], tool_choice="any")
    assert chat.bind_tools([]).invoke("ab").content == "ba"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("get_weather", "tools must be a list"),
        ([{"type": "web_search_preview"}], "can call functions only"),
        ([{"type": "function", "function": {"name": ""}}], "the name ''"),
        ([{"type": "function", "function": {"name": "a", "parameters": 3}}], "no JSON schema"),
        ([object()], "cannot be described"),
        ([{"type": "object"}], "cannot be described"),
    ],
)
def test_tools_that_are_none_are_refused(chat, bad, message):
    with pytest.raises(RequestError, match=message):
        chat.bind_tools(bad)


def test_schemas_that_are_no_json_are_refused_by_path(chat):
    cyclic = {"type": "object", "properties": {}}
    cyclic["properties"]["self"] = cyclic
    deep = {"type": "string"}
    for _ in range(500):
        deep = {"type": "object", "properties": {"a": deep}}
    strange = {"type": "object", "properties": {"a": {"default": {1, 2}}}}
    for parameters, message in (
        (cyclic, r"contains itself at \$\.properties\.self"),
        (deep, "nested deeper than 100 levels"),
        (strange, r"holds a set at \$\.properties\.a\.default"),
    ):
        given = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        with pytest.raises(RequestError, match=message):
            chat.bind_tools([given])


def test_other_bad_options_are_refused(chat):
    with pytest.raises(RequestError, match="parallel_tool_calls='no'"):
        chat.bind_tools([get_weather], parallel_tool_calls="no")
    with pytest.raises(RequestError, match="Use tools="):
        chat.invoke("hi", functions=[{"name": "f"}])
    with pytest.raises(ValidationError, match="tool_parser='hermse' is unknown"):
        ChatLocal(model="m", tool_parser="hermse")
    with pytest.raises(RequestError, match="force"):
        chat.bind_tools([get_weather], tool_choice="any", response_format={"type": "json_object"})


# ------------------------------------------------------------------ binding again


def test_binding_again_converts_nothing_and_sees_changes(chat, engine, monkeypatch):
    from llm_connectors.langchain import _tools

    conversions = []
    original = _tools.convert_to_openai_tool

    def counting(given, **kwargs):
        conversions.append(given)
        return original(given, **kwargs)

    monkeypatch.setattr(_tools, "convert_to_openai_tool", counting)

    @tool
    def fresh(a: int) -> int:
        """A tool."""
        return a

    class Fields(BaseModel):
        """Fields."""

        a: int

    described = {"name": "described", "description": "d", "parameters": {"type": "object"}}
    given = [fresh, Fields, described]
    for _ in range(3):
        chat.bind_tools(given).invoke("hi")
    assert len(conversions) == 3
    fresh.description = "Another description."
    described["description"] = "other"
    chat.bind_tools(given).invoke("hi")
    assert len(conversions) == 5
    shown = [one["function"]["description"] for one in engine.last_render.tools]
    assert shown == ["Another description.", "Fields.", "other"]


def test_binding_again_costs_microseconds(chat):
    """The goal is 100 µs; ten tools take about 15. The best of many runs: the CPU is shared."""
    tools = [
        StructuredTool.from_function(get_weather.func, name=f"tool_{index}") for index in range(10)
    ]
    timer = timeit.Timer(lambda: chat.bind_tools(tools, tool_choice="any"))
    assert min(timer.repeat(repeat=40, number=20)) / 20 < 100e-6


# ------------------------------------------------------------------ reasoning


def test_reasoning_is_parted_by_every_way(chat, engine):
    answering(engine, f"<think>\nhm {CALL}\n</think>\n\nIt is fog.")
    bound = chat.bind_tools([get_weather])
    streamed = whole(list(bound.stream("hi")))
    for answer in (bound.invoke("hi"), bound.batch(["hi", "ho"])[1], streamed):
        assert answer.content == "It is fog."
        assert answer.additional_kwargs["reasoning_content"] == f"hm {CALL}"
        assert answer.tool_calls == []
        assert answer.content_blocks[0] == {"type": "reasoning", "reasoning": f"hm {CALL}"}
        details = answer.usage_metadata["output_token_details"]
        assert details["reasoning"] == len(f"hm {CALL}")


@pytest.mark.parametrize(("asked", "variable"), [(True, True), (False, False)])
def test_the_reasoning_switch_goes_to_the_template(chat, engine, asked, variable):
    chat.invoke("hi", reasoning=asked)
    assert engine.last_render.template_kwargs == {"enable_thinking": variable}
    ChatLocal(engine=engine, reasoning=asked).invoke("hi")
    assert engine.last_render.template_kwargs == {"enable_thinking": variable}


def test_reasoning_is_ended_in_the_prompt_where_the_template_has_no_switch():
    engine = FakeEngine(template="<think>")
    ChatLocal(engine=engine).invoke("hi", reasoning=False)
    prompt = "".join(map(chr, engine.requests[0].ids))
    assert prompt == "hi<think>\n\n</think>\n\n"
    engine.close()


def test_reasoning_that_the_prompt_opens_is_seen():
    engine = FakeEngine(template="<think>")
    answering(engine, "hm</think>so")
    for answer in (
        ChatLocal(engine=engine).invoke("hi <think>\n"),
        whole(list(ChatLocal(engine=engine).stream("hi <think>\n"))),
    ):
        assert (answer.content, answer.additional_kwargs) == ("so", {"reasoning_content": "hm"})
    assert ChatLocal(engine=engine, reasoning_parser="none").invoke("x").content == "hm</think>so"
    engine.close()


def test_marks_that_are_control_tokens_stay_in_sight_and_others_do_not():
    engine = FakeEngine(
        template="<|channel|><|message|>", special_tokens=("<|channel|>", "<|message|>", "<|pad|>")
    )
    answering(engine, "<|channel|>final<|message|>Hello<|pad|>.")
    answer = ChatLocal(engine=engine).invoke("hi")
    assert answer.content == "Hello."
    assert engine.requests[0].params.skip_special_tokens is False
    engine.close()


# ------------------------------------------------------------------ blocks and events

ANSWER = f"<think>why</think>Look: {CALL} and {SECOND} done {BROKEN}"


def test_blocks_of_version_1(engine):
    answering(engine, ANSWER)
    chat = ChatLocal(engine=engine, output_version="v1").bind_tools([get_weather])
    whole_answer = chat.invoke("hi")
    kinds = [block["type"] for block in whole_answer.content]
    assert kinds == ["reasoning", "text", "tool_call", "tool_call"]
    streamed = whole(list(chat.stream("hi")))
    blocks = [
        {key: value for key, value in block.items() if key not in ("index", "id")}
        for block in streamed.content
    ]
    assert blocks[:2] == [
        {"type": "reasoning", "reasoning": "why"},
        {"type": "text", "text": "Look:"},
    ]
    assert blocks[2] == {"type": "tool_call", "name": "get_weather", "args": {"city": "Oslo"}}
    assert [call["args"]["city"] for call in streamed.tool_calls] == ["Oslo", "Bergen"]
    assert len(streamed.invalid_tool_calls) == 1


def test_events_of_version_3_are_native_and_valid(chat, engine):
    answering(engine, ANSWER)
    bound = chat.bind_tools([get_weather])
    events = list(bound.stream_events("hi", version="v3"))
    assert_valid_event_stream(events)
    finished = [one["content"] for one in events if one["event"] == "content-block-finish"]
    kinds = [one["type"] for one in finished]
    assert kinds == [
        "reasoning",
        "text",
        "tool_call",
        "text",
        "tool_call",
        "text",
        "invalid_tool_call",
    ]
    assert finished[0]["reasoning"] == "why"
    assert "".join(one["text"] for one in finished if one["type"] == "text") == "Look:  and  done"
    assert finished[2]["args"] == {"city": "Oslo"}
    assert finished[6]["error"]
    assert events[-1]["metadata"]["finish_reason"] == "tool_calls"
    assert events[-1]["usage"]["output_tokens"] > 0

    async def collect():
        stream = await bound.astream_events("hi", version="v3")
        return [event async for event in stream]

    async_events = asyncio.run(collect())
    assert_valid_event_stream(async_events)
    shapes = [(one["event"], one.get("index")) for one in async_events]
    assert [one for one in shapes if one[0] != "content-block-delta"] == [
        (one["event"], one.get("index")) for one in events if one["event"] != "content-block-delta"
    ]


@pytest.mark.parametrize(
    "answer",
    [
        "plain text",
        f"<think>why</think>Look: {CALL}",
        f"Look: {CALL} and {SECOND} done",
        f"{CALL}{SECOND}",
        f"a {CALL} b {BROKEN}",
        "",
    ],
)
def test_native_events_say_what_langchains_bridge_makes_of_our_chunks(
    chat, engine, monkeypatch, answer
):
    """The bridge is what every model without native events goes through."""
    answering(engine, answer)
    bound = chat.bind_tools([get_weather])

    def said():
        stream = bound.stream_events("hi", version="v3")
        events = list(stream)
        assert_valid_event_stream(events)
        blocks = {}
        for event in events:
            if event["event"] != "content-block-finish":
                continue
            content = {
                key: value
                for key, value in event["content"].items()
                if key not in ("id", "index", "error", "extras")
            }
            kind = content["type"]
            if kind == "invalid_tool_call":
                # Chunks end such a call with a bracket that keeps LangChain from completing it.
                content["args"] = content["args"].removesuffix('"]')
            if kind in ("text", "reasoning"):
                blocks[kind] = blocks.get(kind, "") + content[kind]
            else:
                blocks.setdefault(kind, []).append(content)
        message = stream.output
        calls = [(call["name"], call["args"]) for call in message.tool_calls]
        broken = [call["name"] for call in message.invalid_tool_calls]
        return blocks, message.text, calls, broken, message.usage_metadata, events[-1]

    native = said()
    monkeypatch.setattr(ChatLocal, "_stream_chat_model_events", None)
    bridged = said()
    assert native[:5] == bridged[:5]
    assert native[5]["metadata"]["finish_reason"] == bridged[5]["metadata"]["finish_reason"]
    assert native[5]["usage"] == bridged[5]["usage"]


def test_the_message_of_an_event_stream_is_the_invoked_one(chat, engine):
    answering(engine, f"<think>why</think>Look: {CALL}")
    bound = chat.bind_tools([get_weather])
    stream = bound.stream_events("hi", version="v3")
    message = stream.output
    assert message.tool_calls[0]["args"] == {"city": "Oslo"}
    assert message.usage_metadata["input_tokens"] == 2
    assert message.response_metadata["model_provider"] == "llm-connectors"
    plain = chat.stream_events("hi", version="v3").output
    assert plain.text


def test_leaving_an_event_stream_aborts_the_request(chat, engine):
    answering(engine, "word " * 200)
    engine.step_s = 0.002
    stream = chat.stream_events("hi", version="v3")
    events = iter(stream)
    while next(events)["event"] != "content-block-delta":
        pass
    del events, stream
    gc.collect()

    async def leave():
        stream = await chat.astream_events("hi", version="v3")
        async for event in stream:
            if event["event"] == "content-block-delta":
                break
        await stream.aclose()

    asyncio.run(leave())
    deadline = time.monotonic() + 10
    while len(engine.aborted) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(engine.aborted) == 2


def test_events_of_version_2_have_the_calls(chat, engine):
    answering(engine, f"Look: {CALL}")

    async def collect():
        events = chat.bind_tools([get_weather]).astream_events("hi", version="v2")
        return [event async for event in events]

    events = asyncio.run(collect())
    streamed = [one["data"]["chunk"] for one in events if one["event"] == "on_chat_model_stream"]
    assert whole(streamed).tool_calls[0]["args"] == {"city": "Oslo"}


def test_chunks_are_coalesced_when_the_reader_lags(chat, engine):
    answering(engine, f"<think>{'why ' * 20}</think>{'so ' * 20}{CALL}")
    stream = chat.bind_tools([get_weather]).stream("hi")
    first = next(stream)
    while engine.requests[-1].finish_reason is None:
        pass
    rest = list(stream)
    assert len(rest) <= 6
    assert whole([first, *rest]).tool_calls[0]["args"] == {"city": "Oslo"}


def test_tool_arguments_survive_json(chat, engine):
    arguments = {"city": '</tool_call> "日本" \\ \n', "n": [1, {"a": None}]}
    written = json.dumps({"name": "get_weather", "arguments": arguments}, ensure_ascii=False)
    answering(engine, f"<tool_call>{written}</tool_call>")
    bound = chat.bind_tools([get_weather])
    for answer in (bound.invoke("hi"), whole(list(bound.stream("hi")))):
        assert answer.tool_calls[0]["args"] == arguments
