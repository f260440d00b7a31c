"""Messages: what the chat template is given, and what is refused by name."""

import pytest
from langchain_core.messages import (
    AIMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)

from engine import RequestError
from llm_connectors.langchain._messages import to_conversation


def test_roles_and_extras():
    assert to_conversation(
        [
            SystemMessage("be brief"),
            HumanMessage("hi", name="ann"),
            AIMessage(
                "let me look",
                tool_calls=[{"name": "look", "args": {"at": 1}, "id": "c1"}],
            ),
            ToolMessage("found", tool_call_id="c1", name="look"),
            ChatMessage(role="developer", content="go on"),
        ]
    ) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi", "name": "ann"},
        {
            "role": "assistant",
            "content": "let me look",
            "tool_calls": [
                {
                    "type": "function",
                    "id": "c1",
                    "function": {"name": "look", "arguments": {"at": 1}},
                }
            ],
        },
        {"role": "tool", "content": "found", "name": "look", "tool_call_id": "c1"},
        {"role": "developer", "content": "go on"},
    ]


@pytest.mark.parametrize(
    "content",
    [
        ["one", "two"],
        [{"type": "text", "text": "one"}, {"type": "text", "text": "two", "index": 1}],
        ["one", {"type": "text", "text": "two", "cache_control": {"type": "ephemeral"}}],
    ],
)
def test_text_blocks_are_joined(content):
    assert to_conversation([HumanMessage(content)])[0]["content"] == "one\ntwo"


def test_v1_content_blocks_are_read():
    message = HumanMessage(content_blocks=[{"type": "text", "text": "one"}])
    assert to_conversation([message])[0]["content"] == "one"


@pytest.mark.parametrize(
    "answer",
    [
        AIMessage([{"type": "reasoning", "reasoning": "why"}, {"type": "text", "text": "so"}]),
        AIMessage([{"type": "thinking", "thinking": "why"}, "so"]),
        AIMessage("so", additional_kwargs={"reasoning_content": "why"}),
    ],
)
def test_reasoning_of_earlier_answers(answer):
    assert to_conversation([answer]) == [
        {"role": "assistant", "content": "so", "reasoning_content": "why"}
    ]


def test_tool_call_blocks_stand_in_tool_calls_already():
    call = {"name": "look", "args": {}, "id": "c1"}
    answer = AIMessage([{"type": "tool_call", **call}], tool_calls=[call])
    (rendered,) = to_conversation([answer])
    assert rendered["content"] == ""
    assert len(rendered["tool_calls"]) == 1
    with pytest.raises(RequestError, match="tool_use"):
        to_conversation([AIMessage([{"type": "tool_use", "name": "look"}])])


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image_url", "image_url": {"url": "data:"}},
        {"type": "image", "base64": "AA==", "mime_type": "image/png"},
        {"type": "input_audio", "input_audio": {}},
        {"type": "file", "id": "f"},
        {"type": "reasoning", "reasoning": "not an answer"},
        {"text": "no type"},
    ],
)
def test_other_blocks_are_refused_by_type_and_place(block):
    messages = [SystemMessage("s"), HumanMessage(["see", block])]
    with pytest.raises(RequestError, match=f"Message 1 .*{block.get('type')!r}"):
        to_conversation(messages)


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (ChatMessage(role="narrator", content="x"), "narrator"),
        (FunctionMessage(name="f", content="x"), "FunctionMessage"),
        (RemoveMessage(id="1"), "RemoveMessage"),
    ],
)
def test_unknown_roles_are_refused(message, named):
    with pytest.raises(RequestError, match=f"Message 1 .*{named}"):
        to_conversation([HumanMessage("a"), message])


@pytest.mark.parametrize("verb", ["invoke", "ainvoke", "stream", "batch", "get_num_tokens"])
def test_refusals_reach_the_caller(chat, verb):
    import asyncio

    messages = [HumanMessage([{"type": "image", "url": "x"}])]
    calls = {
        "invoke": lambda: chat.invoke(messages),
        "ainvoke": lambda: asyncio.run(chat.ainvoke(messages)),
        "stream": lambda: list(chat.stream(messages)),
        "batch": lambda: chat.batch([messages, messages]),
        "get_num_tokens": lambda: chat.get_num_tokens_from_messages(messages),
    }
    with pytest.raises(RequestError, match=r"Message 0 .*'image'"):
        calls[verb]()


def test_empty_conversation(chat):
    with pytest.raises(RequestError, match="empty"):
        chat.invoke([])
    assert chat.get_num_tokens_from_messages([]) == 0


def test_token_counts_come_from_the_engine(chat, llm, fake_engine):
    assert chat.get_token_ids("ab") == llm.get_token_ids("ab") == [97, 98]
    assert chat.get_num_tokens("abc") == 3
    assert chat.get_num_tokens_from_messages([HumanMessage("abcd"), AIMessage("ef")]) == 6

    def tool(x: int) -> int:
        """A tool."""
        return x

    chat.get_num_tokens_from_messages([HumanMessage("a")], tools=[tool])
    assert fake_engine.last_render.tools[0]["function"]["name"] == "tool"
    chat.custom_get_token_ids = lambda text: [7]
    assert chat.get_token_ids("ab") == [7]
