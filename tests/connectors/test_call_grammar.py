"""Grammars for answers with tool calls, held against llguidance's own matcher."""

import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from tool_outputs import TOOLS

from engine import CallSyntax
from engine.text.tool_parsers import TOOL_PARSERS
from llm_connectors._call_grammar import (
    Thinking,
    answer_grammar,
    call_or_answer_grammar,
    forced_call_grammar,
    free_text_grammar,
)

FAMILIES = ["hermes", "granite", "phi4", "mistral", "llama3_json", "json"]
MARKS = ["<|tool_call|>", "[TOOL_CALLS]", "<think>", "</think>"]
SPECIALS = {mark: 256 + index for index, mark in enumerate(MARKS)}
ANSWER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
OSLO = ("get_weather", {"city": "Oslo"})
NOON = ("get_time", {"timezone": "CET"})


class Bytes:
    """A tokenizer of bytes, a few control tokens and an end."""

    bos_token_id = None
    eos_token_id = 256 + len(SPECIALS)
    tokens = [bytes([byte]) for byte in range(256)] + [*(mark.encode() for mark in MARKS), b"</s>"]
    special_token_ids = (*SPECIALS.values(), eos_token_id)

    def __call__(self, text):
        return list(text if isinstance(text, bytes) else text.encode())


@pytest.fixture(scope="module")
def tokenizer():
    return LLTokenizer(TokenizerWrapper(Bytes()), n_vocab=257 + len(SPECIALS))


def fits(tokenizer, grammar, *parts, specials=SPECIALS):
    """Whether the whole of `parts` is an answer; a part that is a control token is one token."""
    ids = []
    for part in parts:
        ids += [specials[part]] if part in specials else list(part.encode())
    matcher = LLMatcher(tokenizer, grammar)
    assert not matcher.get_error(), matcher.get_error()
    return matcher.validate_tokens(ids) == len(ids) and _may_end(matcher, ids)


def _may_end(matcher, ids):
    matcher.consume_tokens(ids)
    return matcher.is_accepting()


def syntax_of(name) -> CallSyntax:
    return TOOL_PARSERS[name].syntax


@pytest.mark.parametrize("name", FAMILIES)
def test_text_is_free_and_calls_fit(tokenizer, name):
    syntax = syntax_of(name)
    grammar = free_text_grammar(syntax, TOOLS, {}, at_most_one=False)
    calls = syntax.write([OSLO, NOON])
    assert fits(tokenizer, grammar, "Plain text, { and [ too. 日本")
    assert fits(tokenizer, grammar, calls)
    assert fits(tokenizer, grammar, f"First: {calls} and then.")
    assert not fits(tokenizer, grammar, syntax.write([("get_wether", {})]))
    assert not fits(tokenizer, grammar, syntax.write([("get_weather", {"city": 3})]))
    assert not fits(tokenizer, grammar, "Cut: " + syntax.trigger)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_call_at_most_ends_the_answer(tokenizer, name):
    syntax = syntax_of(name)
    grammar = free_text_grammar(syntax, TOOLS, {}, at_most_one=True)
    assert fits(tokenizer, grammar, "Text.")
    assert fits(tokenizer, grammar, "Text. " + syntax.write([OSLO]))
    assert not fits(tokenizer, grammar, syntax.write([OSLO]) + " more")
    assert not fits(tokenizer, grammar, syntax.write([OSLO, NOON]))


def test_marks_that_are_control_tokens_are_control_tokens(tokenizer):
    syntax = syntax_of("granite")
    grammar = free_text_grammar(
        syntax, TOOLS, SPECIALS, at_most_one=False, other_marks=("<think>", "</think>")
    )
    body = syntax.write([OSLO]).removeprefix("<|tool_call|>")
    assert fits(tokenizer, grammar, "Text ", "<|tool_call|>", body, " more")
    assert fits(tokenizer, grammar, "<think>", "hm", "</think>", "Text ", "<|tool_call|>", body)
    assert not fits(tokenizer, grammar, "<|tool_call|>", "nonsense")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_call_or_the_answer_and_nothing_else(tokenizer, name):
    syntax = syntax_of(name)
    grammar = call_or_answer_grammar(syntax, TOOLS, ANSWER, {}, at_most_one=False)
    assert fits(tokenizer, grammar, '{"a": 1}')
    assert fits(tokenizer, grammar, syntax.write([OSLO]))
    assert not fits(tokenizer, grammar, "Text.")
    assert not fits(tokenizer, grammar, '{"a": 1} ' + syntax.write([OSLO]))
    thinking = Thinking("<think>", "</think>", is_open=False)
    grammar = call_or_answer_grammar(
        syntax, TOOLS, ANSWER, {}, at_most_one=False, thinking=thinking
    )
    assert fits(tokenizer, grammar, '<think>so {</think>\n\n{"a": 1}')
    assert fits(tokenizer, grammar, '{"a": 1}')


@pytest.mark.parametrize("specials", [{}, SPECIALS])
def test_reasoning_comes_before_the_answer(tokenizer, specials):
    opener, closer = "<think>", "</think>"
    closed = answer_grammar(ANSWER, specials, Thinking(opener, closer, is_open=False))
    opened = answer_grammar(ANSWER, specials, Thinking(opener, closer, is_open=True))

    def check(grammar, *parts):
        return fits(tokenizer, grammar, *parts, specials=specials)

    assert check(closed, '{"a": 1}')
    assert check(closed, opener, "hm", closer, "\n\n", '{"a": 1}')
    assert not check(closed, "hm", closer, '{"a": 1}')
    assert check(opened, "hm", closer, "\n", '{"a": 1}')
    assert not check(opened, '{"a": 1}')
    assert not check(closed, opener, "hm", closer, "text")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("is_list", [False, True])
def test_reasoning_comes_before_a_forced_call(tokenizer, name, is_list):
    syntax = syntax_of(name)
    thinking = Thinking("<think>", "</think>", is_open=False)
    grammar = forced_call_grammar(syntax, TOOLS, {}, thinking, is_list=is_list)
    call = syntax.write([OSLO])
    assert fits(tokenizer, grammar, f"<think>hm</think>\n\n{call}")
    assert fits(tokenizer, grammar, call)
    assert not fits(tokenizer, grammar, f"Text {call}")
