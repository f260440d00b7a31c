"""Keywords that a grammar cannot keep, said with others: valid answers, and nothing lost."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from constraint_cases import compiler, draw_answer, tokenizer
from pydantic import BaseModel, Field

from engine import ConstraintError
from engine.constraints.schema_rewriting import rewritten
from engine.sampling_params import SamplingParams

INT: dict[str, Any] = {"type": "integer"}
A_AND_B: dict[str, Any] = {"type": "object", "properties": {"a": INT, "b": INT}}


def tagged(tag: Any, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"tag": {"const": tag}, **properties},
        "required": ["tag", *properties],
    }


# Schema, instances that can be written (but for other orders of keys), instances that cannot.
CASES: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "open objects with a tag": (
        {"oneOf": [tagged("x", n=INT), tagged("y"), tagged(3)]},
        [{"tag": "x", "n": 1}, {"tag": "y"}, {"tag": 3, "more": [1]}],
        [{"tag": "x"}, {"tag": "z"}, {}],
    ),
    "tags behind references": (
        {
            "oneOf": [{"$ref": "#/$defs/x"}, {"$ref": "#/$defs/y~1"}],
            "$defs": {"x": tagged("x"), "y/": {"allOf": [{"$ref": "#/$defs/t"}]}, "t": tagged("y")},
        },
        [{"tag": "x"}, {"tag": "y"}],
        [{"tag": "z"}],
    ),
    "branches beside common properties": (
        {
            **A_AND_B,
            "required": ["a"],
            "oneOf": [{"properties": {"b": {"const": n}}, "required": ["b"]} for n in (1, 2)],
        },
        [{"a": 5, "b": 1}, {"a": 5, "b": 2}],
        [{"a": 5, "b": 3}, {"a": 5}],
    ),
    "either property": (
        {**A_AND_B, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
        [{"a": 1}, {"b": 1}, {"a": 1, "c": 2}],
        [{}, {"a": 1, "b": 1}],
    ),
    "either property of a closed object": (
        {
            **A_AND_B,
            "additionalProperties": False,
            "oneOf": [{"required": ["a"]}, {"required": ["b"]}],
        },
        [{"a": 1}, {"b": 1}],
        [{}, {"a": 1, "b": 1}, {"a": 1, "c": 1}],
    ),
    "a tag that nobody requires": (
        {"oneOf": [{"properties": {"t": {"const": n}, "x": INT}} for n in (1, 2)]},
        [{"t": 1}, {"t": 2, "x": 1}],
        [{}, {"x": 1}, "x", {"t": 3}],
    ),
    "values in two branches": (
        {"oneOf": [{"enum": [1, 2, "x"]}, {"enum": [2.0, "y"]}, {"const": "x"}]},
        [1, "y"],
        [2, "x", 3],
    ),
    "true is not one": ({"oneOf": [{"const": 1}, {"const": True}]}, [1, True], [0, False]),
    "ranges": (
        {"oneOf": [{**INT, "maximum": 5}, {**INT, "exclusiveMinimum": 5, "maximum": 9}]},
        [5, 6, 9],
        [10],
    ),
    "lengths": (
        {"oneOf": [{"type": "string", "maxLength": 2}, {"type": "string", "minLength": 4}]},
        ["ab", "abcd"],
        ["abc"],
    ),
    "oneOf beside anyOf": (
        {
            "anyOf": [{"maximum": 3}, {"minimum": 20}],
            "oneOf": [{**INT, "maximum": 9}, {**INT, "minimum": 10, "maximum": 30}],
        },
        [2, 25],
        [7, 15, 40],
    ),
    "not a type": ({"not": {"type": ["string", "number"]}}, [None, True, []], ["", 1, 1.5]),
    "not some values": ({"enum": ["a", "b", 1], "not": {"enum": ["a", 1.0]}}, ["b"], ["a", 1]),
    "not null, of strings": ({"type": "string", "not": {"const": None}}, ["", "x"], [None]),
    "not a property": (
        {**A_AND_B, "not": {"required": ["b"]}},
        [{}, {"a": 1}, {"c": 1}],
        [{"b": 1}, {"a": 1, "b": 1}],
    ),
    "not both": (
        {**A_AND_B, "not": {"required": ["a", "b"]}},
        [{}, {"a": 1}, {"b": 1}],
        [{"a": 1, "b": 1}],
    ),
    "one needs another": (
        {**A_AND_B, "dependentRequired": {"a": ["b"], "c": []}},
        [{}, {"b": 1}, {"a": 1, "b": 1}],
        [{"a": 1}],
    ),
    "one needs more": (
        {
            **A_AND_B,
            "dependentSchemas": {"b": {"properties": {"a": {"const": 7}}, "required": ["a"]}},
        },
        [{}, {"a": 1}, {"a": 7, "b": 1}],
        [{"b": 1}, {"a": 1, "b": 1}],
    ),
    "one needs another, as it was written once": (
        {**A_AND_B, "dependencies": {"a": ["b"], "b": {"properties": {"a": {"const": 7}}}}},
        [{}, {"b": 1}, {"a": 7, "b": 1}],
        [{"a": 1}, {"a": 1, "b": 1}],
    ),
    "listed names": (
        {"type": "object", "propertyNames": {"enum": ["k", "l"]}, "additionalProperties": INT},
        [{}, {"k": 1}, {"k": 1, "l": 2}],
        [{"m": 1}, {"k": "x"}],
    ),
    "names that match": (
        {"type": "object", "propertyNames": {"pattern": "^[xy]+$"}, "additionalProperties": INT},
        [{}, {"xy": 1}],
        [{"z": 1}, {"x": "x"}],
    ),
    "names that are strings": ({"type": "object", "propertyNames": {"type": "string"}}, [{}], [1]),
    "nothing unevaluated": (
        {**A_AND_B, "unevaluatedProperties": False},
        [{}, {"a": 1}],
        [{"c": 1}],
    ),
    "different items of few": (
        {"type": "array", "items": {"enum": ["a", "b", 1]}, "minItems": 1, "uniqueItems": True},
        [["a"], ["b", "a"], [1, "b", "a"]],
        [[], ["a", "a"], ["c"]],
    ),
    "not many, so different": (
        {"type": "array", "items": INT, "maxItems": 1, "uniqueItems": True},
        [[], [1]],
        [[1, 1]],
    ),
    "may repeat": ({"type": "array", "items": INT, "uniqueItems": False}, [[1, 1]], ["x"]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_rewritten_is_kept_and_loses_nothing(name: str) -> None:
    schema, valid, invalid = CASES[name]
    compiled = compiler("bytes").compile(SamplingParams(json_schema=schema))
    tok = tokenizer("bytes")
    old = "dependencies" in schema
    validator = (jsonschema.Draft7Validator if old else jsonschema.Draft202012Validator)(schema)
    for value, is_valid in [(one, True) for one in valid] + [(one, False) for one in invalid]:
        ids = tok.encode(json.dumps(value), add_special_tokens=False)
        answer = [*ids, tok.eos_token_id]
        is_written = compiled._matcher.deep_copy().validate_tokens(answer) == len(answer)
        assert is_written == is_valid == validator.is_valid(value), value
    for seed in range(20):
        answer = draw_answer(compiled, tok, len(compiled._way) + 50, seed, wander=seed % 3 / 2)
        assert answer.is_complete
        assert validator.is_valid(json.loads(answer.text)), answer.text


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog", "wolf"] = "dog"
    owner: str | None = None


class Household(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    others: list[Annotated[Cat | Dog, Field(discriminator="kind")]] = Field(max_length=2)
    ages: dict[Literal["mother", "father"], int]
    days: set[Literal["sat", "sun"]]


def test_pydantic_unions_dictionaries_and_sets() -> None:
    schema = Household.model_json_schema()
    assert "oneOf" in str(schema)
    compiled = compiler("bytes").compile(SamplingParams(json_schema=schema))
    for seed in range(20):
        answer = draw_answer(compiled, tokenizer("bytes"), len(compiled._way) + 80, seed)
        Household.model_validate_json(answer.text)


def test_schemas_inside_grammars_are_rewritten_too() -> None:
    """As those of tools are; strings that look like one stay as they are."""
    either = json.dumps({**A_AND_B, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]})
    strange = json.dumps({"type": "string", "format": "of ours", "maxLength": 4})
    grammar = f'start: "%json {{}}" %json{either} ";" %json   {strange} %json {{"const": 1}}'
    compiled = compiler("bytes").compile(SamplingParams(grammar=grammar))
    tok = tokenizer("bytes")
    texts = set()
    for seed in range(30):
        answer = draw_answer(compiled, tok, 120, seed, wander=0.0)
        assert answer.is_complete
        texts.add(answer.text)
        found, _ = json.JSONDecoder().raw_decode(answer.text.removeprefix("%json {}"))
        assert ("a" in found) != ("b" in found)
    assert len(texts) > 3
    with pytest.raises(ConstraintError, match="grammar cannot be enforced"):
        compiler("bytes").compile(SamplingParams(grammar='start: %json {"not": 7}'))
    with pytest.raises(ConstraintError, match="grammar cannot be enforced"):
        compiler("bytes").compile(SamplingParams(grammar="start: %json {"))


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [INT, {"type": "number"}]},
        {"oneOf": [{"type": "string"}, {"const": "x"}]},
        {"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 5}]},
        {"oneOf": [{"type": "string", "format": "date"}, {"type": "string", "format": "email"}]},
        {"oneOf": [A_AND_B, {"type": "object", "required": ["a"]}]},
        {"not": {"const": 1}},
        {"not": {}},
        {"type": "number", "not": {"type": "integer"}},
        {"not": {"required": ["a"]}, "type": ["object", "null"]},
        {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        {"type": "array", "contains": INT},
        {"type": "object", "propertyNames": {"minLength": 3}},
    ],
)
def test_what_cannot_be_said_is_still_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(ConstraintError, match=r"cannot be enforced at \$"):
        compiler("bytes").compile(SamplingParams(json_schema={"properties": {"p": schema}}))


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": 3},
        {"oneOf": [{"required": [{}]}, {"required": 4}]},
        {"oneOf": [{"enum": "ab"}, {"const": 1}], "allOf": 7},
        {"not": {"required": ["a"]}, "allOf": 7},
        {"dependentRequired": {"a": [[]]}, "properties": []},
        {"type": "array", "items": {"enum": [1]}, "minItems": "x", "uniqueItems": True},
        {"propertyNames": {"enum": [1]}, "properties": [], "type": "object"},
        {"oneOf": [{"$ref": "#/oneOf/0"}, {"$ref": "#/oneOf/7"}]},
    ],
)
def test_malformed_schemas_are_refused_like_others(schema: dict[str, Any]) -> None:
    with pytest.raises(ConstraintError, match=r"cannot be enforced at \$|was found"):
        compiler("bytes").compile(SamplingParams(json_schema=schema)).check_room(50)


def test_nothing_is_rewritten_in_values_and_where_nothing_is_to_do() -> None:
    schema = {"enum": [{"not": {}, "uniqueItems": False}], "default": {"oneOf": []}}
    assert rewritten(schema) == schema
    deep: dict[str, Any] = {"$ref": "#/$defs/n"}
    names = [f"p{number}" for number in range(20)]
    node = {"properties": dict.fromkeys(names, deep), "required": names, "type": "object"}
    recursive = {"oneOf": [deep, {"$ref": "#/$defs/m"}], "$defs": {"n": node, "m": dict(node)}}
    assert rewritten(recursive) == recursive, "given up, and soon"
