"""Tool parsers: every recorded answer, cut at every place, and answers that break off."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import pytest
from tool_outputs import RECORDED, TOOLS, Recorded

from engine import ConfigError
from engine.text.answer_pieces import CallEnd, CallPiece, ParsedAnswer, Piece, TextPiece, assemble
from engine.text.tool_parsers import TOOL_PARSERS, choose_tool_parser, make_tool_parser

IDS = [f"{one.parser}: {one.name}" for one in RECORDED]


def pieces_of(parser_name: str, parts: Sequence[str]) -> list[Piece]:
    parser = make_tool_parser(parser_name, TOOLS)
    pieces: list[Piece] = []
    for part in parts:
        pieces += parser.feed(part)
    return pieces + parser.finish()


def read(parser_name: str, *parts: str) -> ParsedAnswer:
    return assemble(pieces_of(parser_name, parts))


@pytest.mark.parametrize("recorded", RECORDED, ids=IDS)
def test_recorded_answers_are_read(recorded: Recorded) -> None:
    answer = read(recorded.parser, recorded.output)
    good = [call for call in answer.calls if call.error is None]
    assert [(call.name, call.parsed_arguments()) for call in good] == recorded.calls
    assert answer.text == recorded.text
    assert answer.reasoning == recorded.reasoning
    assert len(answer.calls) - len(good) == recorded.num_broken
    assert [call.index for call in answer.calls] == list(range(len(answer.calls)))
    for call in answer.calls:
        assert call.raw
        assert call.raw in recorded.output


@pytest.mark.parametrize("recorded", RECORDED, ids=IDS)
def test_where_an_answer_is_cut_does_not_matter(recorded: Recorded) -> None:
    output = recorded.output
    whole = read(recorded.parser, output)
    assert read(recorded.parser, *output) == whole
    for place in range(1, len(output)):
        assert read(recorded.parser, output[:place], output[place:]) == whole, output[:place]
    drawn = random.Random(recorded.name)
    for _ in range(20):
        places = sorted(drawn.sample(range(len(output)), min(5, len(output))))
        ends = [*places, len(output)]
        parts = [output[a:b] for a, b in zip([0, *places], ends, strict=True)]
        assert read(recorded.parser, *parts) == whole, parts


@pytest.mark.parametrize("recorded", RECORDED, ids=IDS)
def test_an_answer_that_breaks_off_loses_nothing(recorded: Recorded) -> None:
    """Every prefix ends in order: each call once, its error told, its text kept."""
    for end in range(len(recorded.output)):
        output = recorded.output[:end]
        pieces = pieces_of(recorded.parser, [output])
        begun = [one.index for one in pieces if isinstance(one, CallPiece) and one.name]
        ended = [one for one in pieces if isinstance(one, CallEnd)]
        assert [one.index for one in ended] == list(range(len(ended)))
        assert set(begun) <= {one.index for one in ended}
        answer = assemble(pieces)
        for call in answer.calls:
            if call.error is None:
                assert isinstance(json.loads(call.arguments, strict=False), dict)
            assert call.raw in output
        shown = answer.text + answer.reasoning + "".join(call.raw for call in answer.calls)
        for word in ("Tokyo", "Hello", "Sure", "First", "Vineyard", "John Doe"):
            assert (word in output) <= (word in shown), output


@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_text_streams_as_it_comes(name: str) -> None:
    parser = make_tool_parser(name, TOOLS)
    for word in ("The", " answer", " is", " 42"):
        assert parser.feed(word) == [TextPiece(word)]


@pytest.mark.parametrize(
    "beginning",
    [
        '<tool_call>{"name": "get_weather", "arguments": {"city": "',
        '[TOOL_CALLS]get_weather{"city": "',
        '<|channel|>commentary to=functions.get_weather<|message|>{"city": "',
    ],
)
def test_arguments_stream_as_they_come(beginning: str) -> None:
    name = {"<t": "hermes", "[T": "mistral", "<|": "harmony"}[beginning[:2]]
    parser = make_tool_parser(name, TOOLS)
    begun = parser.feed(beginning)
    assert begun[0] == CallPiece(0, "get_weather", "")
    assert parser.feed("Tok") == [CallPiece(0, None, "Tok")]
    assert parser.feed("yo ") == [CallPiece(0, None, "yo ")]


@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_deep_nesting_and_junk_end_in_order(name: str) -> None:
    deep = "[" * 100_000
    for output in (
        f'<tool_call>{{"name": "get_time", "arguments": {{"a": {deep}',
        f'[TOOL_CALLS]get_time{{"a": {deep}',
        f'{{"name": "get_time", "parameters": {{"a": {deep}{"]" * 100_000}}}}}',
        f"[get_time(a={deep})]",
        f"<|tool_call>call:get_time{{a:{deep}}}<tool_call|>",
    ):
        for call in read(name, output).calls:
            assert call.error
    drawn = random.Random(name)
    marks = [*TOOL_PARSERS[name].markers, "{", "}", "[", "]", '"', "\\", ":", ",", "get_time", "("]
    for _ in range(200):
        parts = drawn.choices(marks, k=12)
        whole = read(name, "".join(parts))
        assert read(name, *parts) == whole
        assert read(name, *"".join(parts)) == whole


def test_names_are_taken_on_trust_where_no_tools_are_known() -> None:
    parser = make_tool_parser("llama3_json", None)
    answer = assemble([*parser.feed('{"name": "any", "parameters": {}}'), *parser.finish()])
    assert [call.name for call in answer.calls] == ["any"]


def test_unknown_parsers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'hermse' is unknown.*Did you mean 'hermes'"):
        make_tool_parser("hermse", None)


@pytest.mark.parametrize(
    ("template", "model_type", "name"),
    [
        ("{{ tools }}<tool_call>\n{\"name\"", "qwen3", "hermes"),
        ("{{ tools }}<tool_call>\n<function=example>", "qwen3_moe", "qwen_xml"),
        ("[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS]", "mistral", "mistral"),
        ("<|tool|>{{ tools }}<|/tool|><|tool_call|>", "phi3", "phi4"),
        ("<|tool_call|>{{ tools }}", "granite", "granite"),
        ("<start_function_declaration>{{ tools }}<start_function_call>", "gemma3", "gemma"),
        ("<|start|><|channel|>analysis<|message|>{{ tools }}", "gpt_oss", "harmony"),
        ("{{ tools }}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "deepseek_v3", "deepseek"),
        ("Environment: ipython {{ tools }} <|python_tag|>", "llama", "llama3_json"),
        ("{{ tools }}<|python_start|>", "llama4", "pythonic"),
        ("{{ tools }}", "llama4", "pythonic"),
        ("{{ tools }}", "llama", "json"),
        ("{{ messages }}", "llama", "hermes"),
        (None, None, "hermes"),
    ],
)  # fmt: skip
def test_the_parser_is_chosen_by_the_templates_marks(
    template: str | None, model_type: str | None, name: str
) -> None:
    assert choose_tool_parser(template, model_type) == name
