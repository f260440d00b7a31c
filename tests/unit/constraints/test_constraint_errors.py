"""Constraints that cannot be enforced: typed errors that say where, and never a crash."""

from __future__ import annotations

import json
from typing import Any

import pytest
from constraint_cases import allowed_ids, compiler, draw_answer, tokenizer

from engine.constraints.compiler import ConstraintCompiler
from engine.constraints.schema_paths import pointer
from engine.errors import ConstraintError, RequestError
from engine.sampling_params import SamplingParams


def endless_dict() -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    schema["properties"] = {"again": schema}
    return schema


def nested(depth: int, wrap: str) -> str:
    inner = '{"type": "integer"}'
    return wrap.split("@")[0] * depth + inner + wrap.split("@")[1] * depth


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"json_schema": endless_dict()}, "contains itself. Use .defs"),
        ({"json_schema": "{"}, "no valid JSON"),
        ({"json_schema": "[1]"}, "must be a JSON object or boolean"),
        ({"json_schema": 7}, "must be a dict or JSON text, got int"),
        ({"json_schema": {"enum": [object()]}}, "not made of JSON values"),
        ({"json_schema": {"maximum": float("nan")}}, "not made of JSON values"),
        ({"json_schema": nested(100_000, '{"items":@}')}, "nested too deeply"),
        ({"regex": ""}, "regex is empty"),
        ({"regex": 3}, "regex must be a string"),
        ({"regex": "\ud800"}, "lone surrogate"),
        ({"choice": []}, "choice is empty"),
        ({"choice": "yes"}, "must be a list of strings"),
        ({"choice": ["a", ""]}, r"choice\[1\]=''"),
        ({"choice": ["a", 1]}, r"choice\[1\]=1"),
        ({"grammar": ""}, "grammar is empty"),
        ({"grammar": "x" * 4_000_001}, "4000001 characters"),
        ({"regex": "a", "choice": ["a"]}, "regex and choice are set together"),
        ({"json_schema": {}, "grammar": "a"}, "json_schema and grammar are set together"),
    ],
)
def test_malformed_constraints_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConstraintError, match=message):
        SamplingParams(**options)


def test_white_space_has_three_kinds() -> None:
    with pytest.raises(RequestError, match="json_whitespace='none' must be one of"):
        SamplingParams(json_whitespace="none")


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            {"type": "object", "properties": {"a": {"type": "array", "items": {"not": {}}}}},
            r"at \$.properties.a.items: Unimplemented keys: \[\"not\"\]",
        ),
        ({"type": "array", "uniqueItems": True}, r"at \$: .*uniqueItems"),
        ({"anyOf": [{"type": "integer"}, {"type": "text"}]}, r"at \$.anyOf\[1\]: .*text"),
        (
            {"$defs": {"a b": {"contains": {}}}, "properties": {"x": {"$ref": "#/$defs/a%20b"}}},
            r"\$.*contains",
        ),
        ({"properties": {"x": {"pattern": "(?=a)b"}}}, r"at \$.properties.x: .*look-around"),
        ({"enum": []}, r"at \$: .*anyOf is empty"),
        ({"properties": {"p": {"$ref": "#/nowhere"}}}, r"at \$.properties.p: .*nowhere"),
        ({"$ref": "https://example.com/schema"}, r"at \$: .*example.com"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, r"at \$: .*minLength"),
        (
            {
                "type": "object",
                "properties": {"n": {"minimum": 5, "maximum": 3, "type": "integer"}},
                "required": ["n"],
            },
            r"at \$.properties.n: .*minimum",
        ),
        (False, r"at \$: .*false"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, r"at \$: .*oneOf"),
        ({"x-guidance": {}}, "x-guidance"),
        (json.loads(nested(200, '{"type": "array", "items":@}')), "recursion limit"),
    ],
)
def test_schemas_that_cannot_be_enforced_name_the_path(schema: Any, message: str) -> None:
    params = SamplingParams(json_schema=json.dumps(schema))
    with pytest.raises(ConstraintError, match=message):
        compiler("bytes").compile(params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "("}, "regex cannot be enforced: .*unclosed group"),
        ({"regex": r"(\w+)\1"}, "backreferences are not supported"),
        ({"regex": r"\bword"}, "lookarounds not supported"),
        ({"regex": "(" * 5000 + "a" + ")" * 5000}, "regex cannot be enforced"),
        ({"grammar": "start: foo"}, "unknown name: .foo"),
        ({"grammar": 'x: "a"'}, "no start rule"),
        ({"grammar": "start: ((("}, "grammar cannot be enforced"),
        ({"grammar": "start: <|nope|>"}, "unknown special token"),
        ({"grammar": "start: " + "(" * 100_000 + '"a"'}, "too deeply nested"),
        ({"grammar": "start: start"}, "grammar"),
        ({"grammar": "root ::= ((("}, "grammar cannot be enforced: .*Expected"),
        ({"grammar": "root ::= nowhere"}, "grammar cannot be enforced: .*nowhere"),
        ({"grammar": "root ::= " + "(" * 50_000 + '"a"'}, "grammar"),
        ({"grammar": 'start: %json {"not": {}}'}, "grammar cannot be enforced: .*not"),
    ],
)
def test_other_constraints_that_cannot_be_enforced(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConstraintError, match=message):
        compiler("bytes").compile(SamplingParams(**options))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    ],
)
def test_endless_documents_are_refused(schema: dict[str, Any]) -> None:
    params = SamplingParams(json_schema=schema)
    with pytest.raises(ConstraintError, match=r"endless|cannot be enforced"):
        compiler("bytes").compile(params).check_room(500)


def test_a_budget_below_the_shortest_document_is_refused_with_the_numbers() -> None:
    schema = {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]}
    compiled = compiler("demo").compile(SamplingParams(json_schema=schema))
    assert compiled is not None
    shortest = len(compiled._way)
    compiled.check_room(shortest)
    answer = draw_answer(compiled, tokenizer("demo"), shortest, seed=1)
    assert json.loads(answer.text) == {"key": ""}
    with pytest.raises(ConstraintError, match=f"max_tokens=2 .*has {shortest} tokens"):
        compiled.check_room(2)


def test_large_constraints_work() -> None:
    """Thousands of values, hundreds of properties, long repetitions."""
    values = [f"value {number} of many" for number in range(5000)]
    for options in (
        {"json_schema": {"enum": values}},
        {"choice": values},
        {"json_schema": {"properties": {f"p{i}": {"type": "string"} for i in range(300)}}},
        {"json_schema": {"type": "string", "minLength": 100, "maxLength": 5000}},
        {"json_schema": {"type": "array", "minItems": 60, "items": {"type": "null"}}},
        {"json_schema": nested(40, '{"type": "array", "minItems": 1, "items":@}')},
        {"regex": "(ab?c){50,90}"},
    ):
        compiled = compiler("bytes").compile(SamplingParams(**options))
        assert compiled is not None
        answer = draw_answer(compiled, tokenizer("bytes"), 600, seed=3)
        assert answer.is_complete, options


def test_compiled_constraints_are_shared_by_what_they_say() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    one = compiler("bytes").compile(SamplingParams(json_schema=schema))
    text = json.dumps(schema, separators=(",", ":"))
    assert compiler("bytes").compile(SamplingParams(json_schema=text, n=2)) is one
    other = SamplingParams(json_schema=schema, json_whitespace="compact")
    assert compiler("bytes").compile(other) is not one
    assert compiler("bytes").compile(SamplingParams()) is None


def test_many_answers_share_out_among_lexers_where_threads_make_their_masks() -> None:
    tok = tokenizer("bytes")
    for has_many_threads, num_lexers in ((False, 1), (True, 8)):
        many = ConstraintCompiler(
            tok, tok.vocab_size, [tok.eos_token_id], has_many_threads=has_many_threads
        )
        params = SamplingParams(json_schema={"type": "boolean"})
        compiled = many.compile(params)
        started = [compiled.start(params, 20) for _ in range(40)]
        lexers = [one.lexer for one in started]
        assert len(set(lexers)) == num_lexers
        assert len(set(lexers[:4])) == 1
        assert {tuple(allowed_ids(compiled, one)) for one in started} == {
            tuple(allowed_ids(compiled, started[0]))
        }


def test_a_schema_is_kept_as_it_was_when_the_params_were_made() -> None:
    schema: dict[str, Any] = {"enum": ["a"]}
    params = SamplingParams(json_schema=schema)
    schema["enum"].append("b")
    assert json.loads(params.json_schema) == {"enum": ["a"]}
    assert params.replace(n=2).json_schema == params.json_schema


def test_models_that_cannot_be_constrained_say_so() -> None:
    params = SamplingParams(regex="a")
    with pytest.raises(ConstraintError, match="no tokenizer"):
        ConstraintCompiler(None, 100, [2]).compile(params)
    with pytest.raises(ConstraintError, match="end-of-sequence"):
        ConstraintCompiler(tokenizer("bytes"), 400, []).compile(params)


def test_paths_read_like_json_path() -> None:
    assert pointer(()) == "$"
    assert pointer(("properties", "a b", "items", 0, "x_1")) == "$.properties['a b'].items[0].x_1"


def test_unknown_formats_are_annotations_and_known_ones_count() -> None:
    schema = {"type": "string", "format": "password", "maxLength": 3}
    compiled = compiler("bytes").compile(SamplingParams(json_schema=schema))
    assert compiled is not None
    dates = compiler("bytes").compile(
        SamplingParams(json_schema={"type": "string", "format": "date"})
    )
    assert dates is not None
    text = draw_answer(dates, tokenizer("bytes"), 30, seed=5).text
    assert len(text) == len('"2020-01-01"')
