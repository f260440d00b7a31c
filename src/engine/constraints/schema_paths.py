"""Where in a JSON schema the part is that cannot be enforced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

_MAPS_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties", "additionalItems")
_MOST_PARTS = 2000
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
    copy: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "format" and isinstance(value, str) and value not in known:
            continue
        if key in _MAPS_OF_SCHEMAS and isinstance(value, dict):
            copy[key] = {
                name: without_unknown_formats(inner, known) for name, inner in value.items()
            }
        elif key in (*_LISTS_OF_SCHEMAS, "items") and isinstance(value, list):
            copy[key] = [without_unknown_formats(inner, known) for inner in value]
        elif key in _SCHEMAS:
            copy[key] = without_unknown_formats(value, known)
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
        if isinstance(inner := schema.get(key), dict | bool):
            yield (key,), inner
