"""Prompts with tools for templates that know them and such that do not; the reasoning switch."""

from __future__ import annotations

from typing import Any

import pytest
from text_chat_templates import CHATML, GEMMA, LLAMA3, QWEN3, WEATHER_TOOL
from text_tokenizers import trained_byte_level, write_folder

from engine import ConfigError, RequestError
from engine.text.answer_format import AnswerFormat, check_parser_names
from engine.text.chat_template import ChatTemplate
from engine.text.tokenizer import Tokenizer

QWEN_WITH_TAGS = QWEN3.replace("</tools>", "</tools>\\n<tool_call>")
MISTRAL_WITH_IDS = """{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}\
{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS]{% for c in m.tool_calls %}\
{% if c.id | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}{{ c.id }}\
{% endfor %}{% else %}{{ m.role }}:{{ m.tool_call_id }}:{{ m.content }}{% endif %}{% endfor %}"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    backend = trained_byte_level("qwen2")
    return Tokenizer.from_folder(write_folder(folder, backend, bos_token="<s>", eos_token="</s>"))


def make(tokenizer: Tokenizer, source: str, **options: Any) -> tuple[ChatTemplate, AnswerFormat]:
    template = ChatTemplate(source, tokenizer)
    return template, AnswerFormat(template, **options)


def call(call_id: str, name: str, **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


HISTORY: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [call("c1", "get_weather", city="A"), call("c2", "get_weather", city="B")],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "fog"},
    {"role": "tool", "tool_call_id": "c2", "content": "sun"},
]


def test_a_template_that_knows_tools_is_given_them(tokenizer: Tokenizer) -> None:
    template, form = make(tokenizer, QWEN_WITH_TAGS)
    assert (form.tool_parser, form.reasoning) == ("hermes", "think")
    messages, tools = form.fitted(HISTORY, [WEATHER_TOOL])
    assert messages == HISTORY
    prompt = template.render(messages, tools=tools)
    assert '"get_weather"' in prompt.partition("</tools>")[0]
    assert '{"name": "get_weather", "arguments": {"city": "B"}}' in prompt


def test_a_template_without_tools_has_them_described(tokenizer: Tokenizer) -> None:
    template, form = make(tokenizer, CHATML)
    assert form.tool_parser == "hermes"
    messages, tools = form.fitted(HISTORY, [WEATHER_TOOL])
    assert tools is None
    prompt = template.render(messages)
    system, _, rest = prompt.partition("<|im_end|>")
    assert "Be brief." in system
    assert WEATHER_TOOL["function"]["description"].replace('"', '\\"') in system
    assert '<tool_call>\n{"name": "function-name"' in system
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "A"}}\n</tool_call>' in rest
    # Results of one turn come as one message of the user.
    assert rest.count("<|im_start|>user") == 2
    assert "<tool_response>\nfog\n</tool_response>\n<tool_response>\nsun" in rest
    assert HISTORY[2]["tool_calls"], "the caller's messages stay as they were"


def test_what_is_described_can_be_read_back(tokenizer: Tokenizer) -> None:
    for name in ("hermes", "json", "llama3_json", "mistral", "granite", "phi4", "deepseek"):
        _, form = make(tokenizer, CHATML, tool_parser=name)
        messages, _ = form.fitted(HISTORY, [WEATHER_TOOL])
        reader = form.reader({"get_weather": {}})
        assert reader is not None
        pieces = [*reader.feed(messages[2]["content"]), *reader.finish()]
        ended = [one for one in pieces if type(one).__name__ == "CallEnd"]
        assert [one.error for one in ended] == [None, None], name


def test_a_template_without_system_role_gets_the_description_in_the_first_message(
    tokenizer: Tokenizer,
) -> None:
    template, form = make(tokenizer, GEMMA)
    messages, tools = form.fitted([{"role": "user", "content": "Weather?"}], [WEATHER_TOOL])
    assert tools is None
    prompt = template.render(messages)
    assert prompt.index("get_weather") < prompt.index("Weather?")


def test_llama3_sees_one_call_a_message(tokenizer: Tokenizer) -> None:
    template, form = make(tokenizer, LLAMA3)
    assert form.tool_parser == "llama3_json"
    with pytest.raises(RequestError, match="single tool-calls"):
        template.render(HISTORY)
    messages, _ = form.fitted(HISTORY, [WEATHER_TOOL])
    roles = [message["role"] for message in messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant", "tool"]
    assert [messages[place]["content"] for place in (3, 5)] == ["fog", "sun"]
    assert template.render(messages, tools=[WEATHER_TOOL])


def test_mistral_sees_ids_of_nine_characters(tokenizer: Tokenizer) -> None:
    template, form = make(tokenizer, MISTRAL_WITH_IDS)
    assert form.tool_parser == "mistral"
    messages, tools = form.fitted(HISTORY, [WEATHER_TOOL])
    made = [one["id"] for one in messages[2]["tool_calls"]]
    assert made == [messages[3]["tool_call_id"], messages[4]["tool_call_id"]]
    assert len(set(made)) == 2
    assert template.render(messages, tools=tools)


@pytest.mark.parametrize(
    ("source", "asked", "variables", "must_close"),
    [
        (QWEN3, True, {"enable_thinking": True}, False),
        (QWEN3, False, {"enable_thinking": False}, False),
        (QWEN3, None, {}, False),
        (CHATML, False, {}, False),
        (CHATML + "{# <think> #}", False, {}, True),
        (CHATML + "{# <think> #}", True, {}, False),
        (CHATML + "{{ thinking }}", True, {"thinking": True}, False),
        (CHATML + "{{ reasoning_effort }}", "low", {"reasoning_effort": "low"}, False),
    ],
)
def test_the_reasoning_switch(
    tokenizer: Tokenizer, source: str, asked: Any, variables: dict[str, Any], must_close: bool
) -> None:
    _, form = make(tokenizer, source)
    assert form.reasoning_variables(asked) == variables
    assert form.closes_reasoning(asked) is must_close


@pytest.mark.parametrize(
    ("ending", "default"),
    [
        (
            '{% if not reasoning_effort %}{% set reasoning_effort = "medium" %}{% endif %}',
            "medium",
        ),
        ("{{ reasoning_effort | default('low') }}", "low"),
        ("{{ 'Think hard.' if reasoning_effort == 'high' }}", None),
        ("{{ reasoning_effort or raise_exception('name one') }}", None),
        ("", None),
    ],
)
def test_the_default_effort_is_the_one_that_changes_nothing(
    tokenizer: Tokenizer, ending: str, default: str | None
) -> None:
    shown = "{{ reasoning_effort }}" if "set" in ending else ""
    _, form = make(tokenizer, CHATML + ending + shown)
    assert form.default_effort == default


def test_reasoning_that_is_not_there_cannot_be_switched(tokenizer: Tokenizer) -> None:
    _, form = make(tokenizer, CHATML)
    with pytest.raises(RequestError, match="knows no reasoning"):
        form.reasoning_variables(True)
    with pytest.raises(RequestError, match="reasoning='low'"):
        form.reasoning_variables("low")
    _, harmony = make(tokenizer, "<|channel|><|message|>{{ reasoning_effort }}")
    with pytest.raises(RequestError, match="reasoning='none'"):
        harmony.reasoning_variables("none")
    assert harmony.closing_text("", with_tools=False) == "<|channel|>final<|message|>"
    with pytest.raises(RequestError, match="cannot be combined with tools"):
        harmony.closing_text("", with_tools=True)


def test_a_block_that_the_prompt_opens_is_seen(tokenizer: Tokenizer) -> None:
    _, form = make(tokenizer, QWEN3)
    assert form.is_open("<|im_start|>assistant\n<think>\n")
    assert not form.is_open("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert form.closing_text("assistant\n<think>\n", with_tools=True) == "\n</think>\n\n"
    assert form.closing_text("assistant\n", with_tools=True) == "<think>\n\n</think>\n\n"
    assert form.closing_text("<think>\n\n</think>\n\n", with_tools=True) == ""
    assert not form.opens_reasoning({})
    opening = QWEN3.removesuffix("{%- endif %}") + "{{- '<think>\\n' }}{%- endif %}"
    _, opened = make(tokenizer, opening)
    assert opened.opens_reasoning({})


def test_names_of_parsers_are_checked(tokenizer: Tokenizer) -> None:
    check_parser_names("auto", "auto")
    check_parser_names("pythonic", "none")
    with pytest.raises(ConfigError, match="tool_parser='x' is unknown"):
        check_parser_names("x", "auto")
    with pytest.raises(ConfigError, match="reasoning_parser='x' is unknown"):
        check_parser_names("auto", "x")
    with pytest.raises(ConfigError, match="are names"):
        check_parser_names(1, "auto")  # type: ignore[arg-type]
    _, form = make(tokenizer, QWEN3, tool_parser="pythonic", reasoning_parser="none")
    assert (form.tool_parser, form.reasoning) == ("pythonic", "none")
    assert form.reader(None) is None


@pytest.mark.parametrize(
    ("source", "is_shown"),
    [
        (CHATML, True),
        ("{{ raise_exception('roles must alternate') }}", False),
        ("{{ messages[0].content }}", False),
        (
            "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
            "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
            False,  # moved to the front
        ),
    ],
)
def test_late_system_messages_are_known_to_be_shown(
    tokenizer: Tokenizer, source: str, is_shown: bool
) -> None:
    assert make(tokenizer, source)[1].shows_late_system_messages is is_shown
