"""Answers drawn at random under a constraint: valid, complete within the budget, forced exactly."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from constraint_cases import TOKENIZERS, allowed_ids, compiler, draw_answer, tokenizer

from engine.constraints.closing import ClosingSearch
from engine.sampling_params import SamplingParams

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "number": {"type": "number"}},
            "required": ["street", "number"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE: dict[str, Any] = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"enum": ["left", "right", 3, None, True]},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["value", "children"],
            "additionalProperties": False,
        }
    },
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("schema", [PERSON, TREE], ids=["person", "tree"])
@pytest.mark.parametrize("whitespace", ["spaced", "compact", "flexible"])
def test_every_answer_is_a_valid_document_whatever_the_budget(
    name: str, schema: dict[str, Any], whitespace: str
) -> None:
    params = SamplingParams(json_schema=schema, json_whitespace=whitespace)
    compiled = compiler(name).compile(params)
    assert compiled is not None
    tok = tokenizer(name)
    shortest = len(compiled._way)
    for seed in range(6 if name == "demo" else 20):
        budget = shortest + [0, 1, 2, 5, 13, 40, 200][seed % 7]
        answer = draw_answer(compiled, tok, budget, seed, wander=(seed % 3) / 2)
        assert answer.is_complete, answer
        assert len(answer.token_ids) <= budget
        value = json.loads(answer.text)
        jsonschema.validate(value, schema)
        if whitespace == "spaced":
            # Escapes and numbers are free, the layout is not.
            assert re.sub(r'"(\\.|[^"\\])*"|[^ ,:]', "", answer.text) == re.sub(
                r'"(\\.|[^"\\])*"|[^ ,:]', "", json.dumps(value)
            )


def test_tokens_that_leave_no_room_are_taken_back() -> None:
    """Without taking back, a string one token before its budget's end could not be closed."""
    schema = {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {
                "long key 1": {"type": "integer"},
                "long key 2": {"type": "integer"},
            },
            "required": ["long key 1", "long key 2"],
            "additionalProperties": False,
        },
    }
    compiled = compiler("bytes").compile(SamplingParams(json_schema=schema))
    assert compiled is not None
    num_taken_back = 0
    for seed in range(60):
        answer = draw_answer(compiled, tokenizer("bytes"), 42 + seed % 20, seed, wander=0.0)
        assert answer.is_complete
        jsonschema.validate(json.loads(answer.text), schema)
        num_taken_back += answer.num_taken_back
    assert num_taken_back > 0


@pytest.mark.parametrize("name", TOKENIZERS)
def test_forced_tokens_are_those_that_step_by_step_would_be_sampled(name: str) -> None:
    compiled = compiler(name).compile(SamplingParams(json_schema=PERSON))
    assert compiled is not None
    num_forced = 0
    for seed in range(2 if name == "demo" else 10):
        answer = draw_answer(compiled, tokenizer(name), 150, seed)
        num_forced += answer.num_forced
        step_by_step = compiled.start(SamplingParams(logprobs=0), 150)
        assert not step_by_step.may_jump
        for place, token_id in enumerate(answer.token_ids):
            assert token_id in allowed_ids(compiled, step_by_step)
            assert step_by_step.accept(token_id, 150 - place - 1)
    assert num_forced > 0
    jumping = compiled.start(SamplingParams(), 150)
    stepping = compiled.start(SamplingParams(), 150)
    first = allowed_ids(compiled, jumping)
    assert jumping.accept(first[0], 149)
    assert stepping.accept(first[0], 149)
    for place, token_id in enumerate(jumping.take_forced(149)):
        assert allowed_ids(compiled, stepping) == [token_id]
        assert stepping.accept(token_id, 148 - place)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    "pattern", [r"[0-9]{3}-[0-9]{4}", r"(yes|no|don't know)!*", r"a*b[^a]{2,5}", "日本|中文 ?語"]
)
def test_regex(name: str, pattern: str) -> None:
    compiled = compiler(name).compile(SamplingParams(regex=pattern))
    assert compiled is not None
    for seed in range(10):
        answer = draw_answer(compiled, tokenizer(name), 40, seed)
        assert answer.is_complete
        assert re.fullmatch(pattern, answer.text, re.DOTALL), answer.text


def test_digits_of_a_regex_are_the_ten_ascii_ones() -> None:
    compiled = compiler("bytes").compile(SamplingParams(regex=r"\d+"))
    assert compiled is not None
    constraint = compiled.start(SamplingParams(), 10)
    tok = tokenizer("bytes")
    assert {tok.token_bytes(i) for i in allowed_ids(compiled, constraint)} == {
        str(digit).encode() for digit in range(10)
    }


@pytest.mark.parametrize("name", TOKENIZERS)
def test_choice_takes_strings_as_they_are(name: str) -> None:
    choices = ["a.b", "a|b", "(", "Paris\n", "Paris", ' "q"', "é😀", "\\d"]
    compiled = compiler(name).compile(SamplingParams(choice=choices))
    assert compiled is not None
    found = {draw_answer(compiled, tokenizer(name), 12, seed).text for seed in range(120)}
    # A tokenizer in the manner of SentencePiece drops the space that a text begins with.
    assert {text.lstrip(" ") for text in found} == {text.lstrip(" ") for text in choices}


@pytest.mark.parametrize(
    "grammar",
    [
        'start: greeting ", " NAME "!"\ngreeting: "Hello" | "Bye"\nNAME: /[A-Z][a-z]{1,5}/',
        'root ::= greeting ", " name "!"\ngreeting ::= "Hello" | "Bye"\n'
        "name ::= [A-Z] [a-z] [a-z]? [a-z]?",
    ],
    ids=["lark", "ebnf"],
)
def test_grammars(grammar: str) -> None:
    compiled = compiler("bytes").compile(SamplingParams(grammar=grammar))
    assert compiled is not None
    for seed in range(20):
        text = draw_answer(compiled, tokenizer("bytes"), 30, seed).text
        assert re.fullmatch(r"(Hello|Bye), [A-Z][a-z]{1,5}!", text), text


def test_tool_calls_in_free_text() -> None:
    """Text until an opener, then arguments under a schema, then a closer, several times."""
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    call = json.dumps(
        {
            "type": "object",
            "properties": {"name": {"const": "weather"}, "arguments": schema},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
    )
    grammar = (
        "start: (opener arguments closer)* rest\n"
        "opener[lazy]: /(.|\\n)*<tool_call>/\n"
        f"arguments: %json {call}\n"
        'closer: "</tool_call>"\n'
        "rest: /(.|\\n)*/\n"
    )
    name = "qwen2"
    compiled = compiler(name).compile(SamplingParams(grammar=grammar))
    assert compiled is not None
    tok = tokenizer(name)
    text = 'Let me see.<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    bad = text.replace("Oslo", "Bonn")
    assert _num_accepted(compiled, tok.encode(text, add_special_tokens=False)) == -1
    assert _num_accepted(compiled, tok.encode(text + " and\n" + text, add_special_tokens=False)) < 0
    assert _num_accepted(compiled, tok.encode("No call.", add_special_tokens=False)) == -1
    assert _num_accepted(compiled, tok.encode(bad, add_special_tokens=False)) > 0


def test_control_tokens_of_a_grammar_are_the_tokens_themselves() -> None:
    name = "llama3"
    compiled = compiler(name).compile(
        SamplingParams(grammar='start: <|im_start|> %json {"type": "boolean"} <|endoftext|>')
    )
    assert compiled is not None
    tok = tokenizer(name)
    ids = [tok.special_tokens["<|im_start|>"], *tok.encode("true", add_special_tokens=False)]
    ids.append(tok.special_tokens["<|endoftext|>"])
    assert _num_accepted(compiled, ids) == -1
    spelled = tok.encode("<|im_start|>true", add_special_tokens=False)
    assert _num_accepted(compiled, spelled) == 0


def _num_accepted(compiled: Any, ids: list[int]) -> int:
    """Tokens taken before one was not allowed; -1 where all were and the answer may end there."""
    constraint = compiled.start(SamplingParams(), 500)
    for place, token_id in enumerate(ids):
        if token_id not in allowed_ids(compiled, constraint):
            return place
        assert constraint.accept(token_id, 499 - place)
    return -1 if constraint.is_complete or constraint.matcher.is_accepting() else len(ids)


def test_ignore_eos_bars_the_end_while_something_else_may_follow() -> None:
    tok = tokenizer("bytes")
    compiled = compiler("bytes").compile(SamplingParams(regex="ab*"))
    assert compiled is not None
    for ignores in (False, True):
        constraint = compiled.start(SamplingParams(ignore_eos=ignores), 10)
        assert constraint.accept(tok.encode("a", add_special_tokens=False)[0], 9)
        assert (tok.eos_token_id in allowed_ids(compiled, constraint)) is not ignores


def test_padding_of_the_head_is_never_allowed() -> None:
    compiled = compiler("bytes", extra_ids=70).compile(SamplingParams(regex="(.|\n)*"))
    assert compiled is not None
    allowed = allowed_ids(compiled, compiled.start(SamplingParams(), 10))
    assert len(allowed) > 200
    assert max(allowed) < tokenizer("bytes").vocab_size


def test_a_way_to_the_end_is_mostly_the_end_of_an_older_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Looking for one costs milliseconds of the engine's thread, for each of many answers."""
    people = {"type": "array", "items": PERSON, "minItems": 3, "maxItems": 5}
    summary = {"type": "string", "minLength": 200, "maxLength": 400}
    schema = {
        "type": "object",
        "properties": {"title": {"type": "string"}, "people": people, "summary": summary},
        "required": ["title", "people", "summary"],
        "additionalProperties": False,
    }
    compiled = compiler("demo").compile(SamplingParams(json_schema=schema))
    assert compiled is not None
    walks: list[int] = []
    walk = ClosingSearch._walk
    answers = [draw_answer(compiled, tokenizer("demo"), 500, seed) for seed in range(3)]
    monkeypatch.setattr(ClosingSearch, "_walk", lambda *args: (walks.append(1), walk(*args))[1])
    num_checks = 0
    for answer in answers:
        matcher, way, left = compiled._matcher.deep_copy(), compiled._way, 500
        for place, token_id in enumerate(answer.token_ids):
            assert matcher.consume_token(token_id)
            left -= 1
            if place % 10:
                continue  # far from the end it is looked for now and then
            found = compiled._search.find(matcher, left, way)
            assert found is not None
            assert len(found) <= left
            assert compiled._search.is_way(matcher, found)
            way = found
            num_checks += 1
    assert num_checks > 30
    assert len(walks) < num_checks / 10, (len(walks), num_checks)


def test_texts_that_are_forced_again_are_not_encoded_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Keys and separators come in every answer; encoding them takes longer than all the rest."""
    compiled = compiler("demo").compile(SamplingParams(json_schema=PERSON))
    assert compiled is not None
    ids = draw_answer(compiled, tokenizer("demo"), 150, seed=2).token_ids

    def follow() -> int:
        constraint, place, num_forced = compiled.start(SamplingParams(), 150), 0, 0
        while place < len(ids):
            assert constraint.accept(ids[place], 149 - place)
            forced = constraint.take_forced(149 - place)
            assert forced == ids[place + 1 : place + 1 + len(forced)]
            num_forced += len(forced)
            place += 1 + len(forced)
        return num_forced

    assert follow() > 0
    monkeypatch.setattr(type(tokenizer("demo")), "encode_text_part", None)
    assert follow() > 0
