"""Reasoning parted from answers, however they are cut; the switch; marks in the prompt."""

from __future__ import annotations

import pytest

from engine import ConfigError
from engine.text.answer_pieces import ParsedAnswer, ReasoningPiece, TextPiece, assemble
from engine.text.reasoning import (
    REASONING_MARKS,
    AnswerReader,
    ReasoningSplitter,
    check_reasoning_style,
    choose_reasoning,
)
from engine.text.tool_parsers import make_tool_parser

CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'

# style, whether the prompt opened the block, answer, reasoning, text
CASES = [
    ("think", False, "<think>\nhm < 3\n</think>\n\nFour.", "hm < 3", "Four."),
    ("think", True, "\nhm\n\nhm\n</think>\n\nFour.\n", "hm\n\nhm", "Four.\n"),
    ("think", True, "never closed </thin", "never closed </thin", ""),
    ("think", False, "<think>\n\n</think>\n\nFour.", "", "Four."),
    ("think", False, "  Four. <think>no</think>", "", "  Four. <think>no</think>"),
    ("think", False, "<thin", "", "<thin"),
    ("think", False, "<think>a</think> <think>b</think>", "a", "<think>b</think>"),
    ("mistral", False, "[THINK]a[/THINK]b", "a", "b"),
    ("granite", False, "Here is my thought process: a\n\nHere is my response: b", "a", "b"),
    ("gemma", False, "<|channel>thought\na\n<channel|>b", "a", "b"),
]


def read(style: str, is_open: bool, *parts: str) -> ParsedAnswer:
    reader = AnswerReader(ReasoningSplitter(style, is_open=is_open), None)
    pieces = [piece for part in parts for piece in reader.feed(part)]
    return assemble([*pieces, *reader.finish()])


@pytest.mark.parametrize(("style", "is_open", "answer", "reasoning", "text"), CASES)
def test_reasoning_is_parted_wherever_the_answer_is_cut(
    style: str, is_open: bool, answer: str, reasoning: str, text: str
) -> None:
    expected = ParsedAnswer(text, reasoning, ())
    assert read(style, is_open, answer) == expected
    assert read(style, is_open, *answer) == expected
    for place in range(1, len(answer)):
        assert read(style, is_open, answer[:place], answer[place:]) == expected, answer[:place]


def test_reasoning_and_text_stream_as_they_come() -> None:
    reader = AnswerReader(ReasoningSplitter("think", is_open=True), None)
    assert reader.feed("Let me") == [ReasoningPiece("Let me")]
    assert reader.feed(" see.") == [ReasoningPiece(" see.")]
    assert reader.feed("</think>") == []
    assert reader.feed("\n\nFour") == [TextPiece("Four")]
    assert reader.feed(" it") == [TextPiece(" it")]


def test_calls_follow_reasoning_and_calls_in_reasoning_are_not_made() -> None:
    tools = make_tool_parser("hermes", {"f": {}})
    reader = AnswerReader(ReasoningSplitter("think", is_open=False), tools)
    output = f"<think>I could {CALL}</think>\nSo:\n{CALL}"
    answer = assemble(
        [*(piece for char in output for piece in reader.feed(char)), *reader.finish()]
    )
    assert answer.reasoning == f"I could {CALL}"
    assert answer.text == "So:"
    assert [call.arguments for call in answer.calls] == ['{"a": 1}']


@pytest.mark.parametrize(
    ("template", "style"),
    [
        ("{% if enable_thinking %}<think>\n\n</think>{% endif %}", "think"),
        ("{{ content.split('</think>')[-1] }}", "think"),
        ("[THINK]", "mistral"),
        ("Here is my thought process:", "granite"),
        ("<|channel|>analysis<|message|>", "harmony"),
        ("<|im_start|>", "none"),
        (None, "none"),
    ],
)
def test_the_style_is_chosen_by_the_templates_marks(template: str | None, style: str) -> None:
    assert choose_reasoning(template) == style


def test_unknown_styles_are_refused() -> None:
    for style in REASONING_MARKS:
        check_reasoning_style(style)
    with pytest.raises(ConfigError, match=r"'thinks' is unknown.*Did you mean 'think'"):
        check_reasoning_style("thinks")
