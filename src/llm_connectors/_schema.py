"""JSON schemas of tools and answers: checked where they come in, joined for one constraint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from engine import ConstraintError

MAX_SCHEMA_DEPTH = 100
"""Deepest nesting of a schema, far more than any real one has and less than Python's stack."""


def schema_text(schema: Mapping[str, Any], what: str) -> str:
    """The schema as JSON text: one spelling for equal schemas, so that grammars are found again.

    Args:
        schema: A JSON schema.
        what: What error messages call it, for instance "The arguments of tool 'f'".

    Raises:
        ConstraintError: It refers to itself as a Python object, is nested absurdly deep or holds
            what JSON cannot; the place is named. A recursive `$ref` is fine.
    """
    _check(schema, "$", (), what)
    return json.dumps(schema, ensure_ascii=False)


def _check(value: Any, path: str, parents: tuple[int, ...], what: str) -> None:
    if value is None or isinstance(value, str | int | float):
        return
    if id(value) in parents:
        msg = f"{what} contains itself at {path}. Use a $ref for a recursive schema."
        raise ConstraintError(msg)
    if len(parents) >= MAX_SCHEMA_DEPTH:
        msg = f"{what} is nested deeper than {MAX_SCHEMA_DEPTH} levels at {path}. Flatten it."
        raise ConstraintError(msg)
    inner = (*parents, id(value))
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                msg = f"{what} has the key {key!r} at {path}; JSON takes strings only."
                raise ConstraintError(msg)
            _check(item, f"{path}.{key}", inner, what)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check(item, f"{path}[{index}]", inner, what)
    else:
        msg = f"{what} holds a {type(value).__name__} at {path}, which is no JSON."
        raise ConstraintError(msg)


_COMPOSED = ("if", "dependentSchemas", "dependencies", "unevaluatedProperties", "$dynamicRef")
_OPEN = ("additionalProperties", "patternProperties", "allOf")


def closed_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """`schema` without properties that it does not name, as OpenAI's strict mode has it.

    By the letter an object may have more properties than its schema names. Nobody who describes a
    tool or an answer means that, and models make use of it. Schemas that put one object together
    from several (`allOf` of more than one, `if`) are left as they are.
    """
    return dict(schema) if _is_composed(schema) else _closed(schema)


def _is_composed(value: Any) -> bool:
    if isinstance(value, Mapping):
        parts = value.get("allOf")
        if any(name in value for name in _COMPOSED) or (isinstance(parts, list) and len(parts) > 1):
            return True
        return any(map(_is_composed, value.values()))
    return isinstance(value, list | tuple) and any(map(_is_composed, value))


def _closed(value: Any) -> Any:
    if isinstance(value, Mapping):
        closed = {
            # What is under "properties" are names, not keywords.
            key: {name: _closed(one) for name, one in item.items()}
            if key == "properties" and isinstance(item, Mapping)
            else _closed(item)
            for key, item in value.items()
            if key not in ("const", "enum", "default", "examples")
        }
        kept = {key: value[key] for key in ("const", "enum", "default", "examples") if key in value}
        closed |= kept
        if isinstance(value.get("properties"), Mapping) and not any(one in value for one in _OPEN):
            closed["additionalProperties"] = False
        return closed
    if isinstance(value, list | tuple):
        return [_closed(item) for item in value]
    return value


def without_annotations(value: Any) -> Any:
    """A schema without titles and descriptions: what is left decides which values fit."""
    if isinstance(value, Mapping):
        return {
            key: without_annotations(item)
            for key, item in value.items()
            if key not in ("title", "description") or not isinstance(item, str)
        }
    return [without_annotations(item) for item in value] if isinstance(value, list) else value


def argument_schema(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The schema of a tool's arguments, an object without properties where it takes none."""
    if not parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **parameters}


def call_schema(
    tools: Mapping[str, Mapping[str, Any]],
    arguments_key: str,
    *,
    is_list: bool,
    at_most_one: bool = False,
) -> dict[str, Any]:
    """A schema of a call to one of `tools`, or of a list of one and more.

    Args:
        tools: Name -> schema of the arguments.
        arguments_key: The call's key of its arguments.
        is_list: Several calls at once.
        at_most_one: The list may have one call only.
    """
    definitions: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    for name, schema in tools.items():
        properties = {
            "name": {"const": name},
            arguments_key: _embedded(schema, f"tool{len(calls)}", definitions),
        }
        calls.append(_closed_object(properties))
    one = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if is_list:
        one = {"type": "array", "items": one, "minItems": 1}
        if at_most_one:
            one["maxItems"] = 1
    return _with_definitions(one, definitions)


def call_or_answer_schema(
    tools: Mapping[str, Mapping[str, Any]], answer: Mapping[str, Any]
) -> dict[str, Any]:
    """A schema of either a call to one of `tools` or of the final answer."""
    definitions: dict[str, Any] = {}
    choices = [_embedded(answer, "answer", definitions)]
    for index, (name, schema) in enumerate(tools.items()):
        arguments = _embedded(schema, f"tool{index}", definitions)
        choices.append(_closed_object({"name": {"const": name}, "arguments": arguments}))
    return _with_definitions({"anyOf": choices}, definitions)


def _closed_object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _with_definitions(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "$defs": definitions} if definitions else schema


def _embedded(schema: Mapping[str, Any], name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """`schema` for use inside another: its references are made to lead to where it stands then."""
    if not _has_reference(schema):
        return dict(schema)
    root = f"#/$defs/{name}"
    definitions[name] = _moved(schema, root)
    return {"$ref": root}


def _has_reference(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "$ref" in value or any(map(_has_reference, value.values()))
    return isinstance(value, list | tuple) and any(map(_has_reference, value))


def _moved(value: Any, root: str) -> Any:
    if isinstance(value, Mapping):
        return {
            key: root + item[1:]
            if key == "$ref" and isinstance(item, str) and item.startswith("#")
            else _moved(item, root)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_moved(item, root) for item in value]
    return value
