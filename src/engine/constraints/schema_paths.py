"""Where in a JSON schema the part is that cannot be enforced."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

_MAPS_OF_SCHEMAS = (
    "properties",
    "patternProperties",
    "dependentSchemas",
    "dependencies",
    "$defs",
    "definitions",
)
_LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties", "additionalItems")
_MOST_PARTS = 2000
_JSON_BLOCK = re.compile(r"%json\s*(?={)")
_SHARED_KEYS = ("$schema", "$id", "$defs", "definitions")

Path = tuple[str | int, ...]


def find_culprit(schema: Any, refusal: Callable[[Any], str]) -> tuple[Path, str]:
    """Path of the innermost part that is refused on its own, the first of several, and why.

    Args:
        schema: A schema that is refused.
        refusal: Why a schema cannot be enforced; empty where it can. Parts are asked about with the
            definitions of the whole beside them, so that their references lead somewhere.
    """
    path: Path = ()
    part, why = schema, refusal(schema)
    num_asked = 0
    while True:
        for step, inner in _parts(part):
            num_asked += 1
            if num_asked > _MOST_PARTS:
                return path, why
            if inner_why := refusal(_alone(inner, schema)):
                path, part, why = (*path, *step), inner, inner_why
                break
        else:
            return path, why


def pointer(path: Path) -> str:
    """`path` in the manner of JSONPath: `$.properties.name.items[0]`."""
    text = "$"
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif step.replace("_", "a").replace("$", "a").isalnum():
            text += f".{step}"
        else:
            text += f"[{step!r}]"
    return text


def without_unknown_formats(schema: Any, known: frozenset[str]) -> Any:
    """A copy of `schema` without formats that nobody checks.

    JSON Schema calls `format` an annotation: a format that is not known constrains nothing.
    """
    if not isinstance(schema, dict):
        return schema
    copy = with_parts(schema, lambda part: without_unknown_formats(part, known))
    if isinstance(copy.get("format"), str) and copy["format"] not in known:
        del copy["format"]
    return copy


def with_json_blocks(grammar: str, change: Callable[[Any], Any]) -> str:
    """A Lark grammar whose `%json {…}` blocks are changed; as it is where none of them is."""
    parts: list[str] = []
    end = 0
    for start in (found.end() for found in _JSON_BLOCK.finditer(grammar)):
        if start < end:
            continue  # inside a block
        try:
            schema, length = json.JSONDecoder().raw_decode(grammar[start:])
        except ValueError:
            continue  # for the library to name
        changed = change(schema)
        if changed != schema:
            parts += [grammar[end:start], json.dumps(changed, ensure_ascii=False)]
            end = start + length
    return "".join([*parts, grammar[end:]])


def with_discriminators(schema: Any) -> Any:
    """A copy of `schema` in which the properties that tell branches apart are required.

    OpenAPI's `discriminator` demands it, and readers such as Pydantic look for the property, even
    where a default keeps it out of a branch's `required`.
    """
    if not isinstance(schema, dict):
        return schema
    copy = with_parts(schema, with_discriminators)
    named = copy.get("discriminator")
    name = named.get("propertyName") if isinstance(named, dict) else None
    if isinstance(name, str) and ("oneOf" in copy or "anyOf" in copy):
        others = copy.get("required")
        copy["required"] = [*(others if isinstance(others, list) else []), name]
    return copy


def with_parts(schema: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A copy of `schema` with its parts, those that are schemas themselves, changed."""
    copy: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _MAPS_OF_SCHEMAS and isinstance(value, dict):
            copy[key] = {name: change(inner) for name, inner in value.items()}
        elif key in (*_LISTS_OF_SCHEMAS, "items") and isinstance(value, list):
            copy[key] = [change(inner) for inner in value]
        elif key in _SCHEMAS:
            copy[key] = change(value)
        else:
            copy[key] = value
    return copy


def _alone(part: Any, whole: Any) -> Any:
    if not isinstance(part, dict) or not isinstance(whole, dict):
        return part
    shared = {key: whole[key] for key in _SHARED_KEYS if key in whole}
    return {**shared, **part}


def _parts(schema: Any) -> Iterator[tuple[Path, Any]]:
    if not isinstance(schema, dict):
        return
    for key in _MAPS_OF_SCHEMAS:
        if isinstance(inner := schema.get(key), dict):
            for name, value in inner.items():
                yield (key, name), value
    for key in (*_LISTS_OF_SCHEMAS, "items"):
        if isinstance(inner := schema.get(key), list):
            for index, value in enumerate(inner):
                yield (key, index), value
    for key in _SCHEMAS:
        if isinstance(inner := schema.get(key), dict):
            yield (key,), inner
