"""Which values two JSON schemas can have in common: a proof that there are none, or no answer.

What is not understood counts as "anything goes", so that "disjoint" is always true and "not proven"
may be wrong. JSON Schema's numbers: 1.0 is an integer, and `true` is not 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_MOST_STEPS = 12
_MOST_COMPARISONS = 5000
"""Of one schema; recursive ones with many required properties would go on for ever."""
_TYPES: dict[str, frozenset[str]] = {
    # "number" stands for what is no integer here, so that the sets do not overlap.
    "number": frozenset({"integer", "number"}),
    **{name: frozenset({name}) for name in ("null", "boolean", "integer", "string")},
    **{name: frozenset({name}) for name in ("array", "object")},
}
ALL_TYPES = frozenset(_TYPES)
ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
    | {"$schema", "$id", "$comment", "$defs", "definitions"}
)

Parts = Sequence[Mapping[str, Any]]
"""Schemas that all hold, references resolved."""


class SchemaSets:
    """Questions about parts of one schema. For one thread.

    Args:
        root: The whole schema, in which `$ref`s lead somewhere.
    """

    def __init__(self, root: Any) -> None:
        self._root = root
        self._num_comparisons_left = _MOST_COMPARISONS

    def parts(self, *schemas: Any) -> list[Mapping[str, Any]]:
        """The schemas, what they refer to, and the members of their `allOf`s."""
        found: list[Mapping[str, Any]] = []
        waiting = list(schemas)
        for _ in range(_MOST_STEPS):
            if not waiting:
                break
            schema = waiting.pop()
            if schema is False:
                found.append({"enum": []})
            if not isinstance(schema, Mapping):
                continue
            found.append(schema)
            if isinstance(schema.get("$ref"), str):
                waiting.append(self._resolved(schema["$ref"]))
            if isinstance(schema.get("allOf"), list):
                waiting += schema["allOf"]
        return found

    def finite(self, schema: Any) -> list[Any] | None:
        """All values of a schema that lists them; None for others."""
        parts = self.parts(schema)
        values = _listed(parts)
        if values is None and len(parts) == 1 and parts[0].keys() <= {"type", *ANNOTATIONS}:
            named: dict[str, list[Any]] = {"boolean": [False, True], "null": [None]}
            values = named.get(str(parts[0].get("type")))
        if values is None:
            return None
        known = {"enum", "const", "type", "$ref", "allOf", *ANNOTATIONS}
        if any(not part.keys() <= known for part in parts):
            return None
        return [value for value in values if type_of(value) in types(parts)]

    def are_disjoint(self, first: Parts, second: Parts, depth: int = 0) -> bool:
        """Whether no value satisfies both; False where that is not proven."""
        self._num_comparisons_left -= 1
        if depth > _MOST_STEPS // 2 or self._num_comparisons_left < 0:
            return False
        one, other = _listed(first), _listed(second)
        if one is not None and other is not None:
            return not {key_of(value) for value in one} & {key_of(value) for value in other}
        if one is not None:
            return all(_is_impossible(value, second) for value in one)
        if other is not None:
            return all(_is_impossible(value, first) for value in other)
        return all(
            self._are_disjoint_as(kind, first, second, depth)
            for kind in types(first) & types(second)
        )

    def tag(self, first: Parts, second: Parts) -> str | None:
        """A property that has no value in common, if objects have it."""
        for part in first:
            for name in part.get("properties") or ():
                ours, theirs = _property(first, name), _property(second, name)
                if theirs and self.are_disjoint(self.parts(*ours), self.parts(*theirs), 1):
                    return str(name)
        return None

    def _are_disjoint_as(self, kind: str, first: Parts, second: Parts, depth: int) -> bool:
        if kind in ("integer", "number"):
            return _are_apart(_bounds(first), _bounds(second))
        if kind in ("string", "array"):
            names = ("minLength", "maxLength") if kind == "string" else ("minItems", "maxItems")
            return _are_apart(_sizes(first, *names), _sizes(second, *names))
        if kind == "object":
            return self._lack_a_property(first, second, depth) or self._lack_a_property(
                second, first, depth
            )
        return False

    def _lack_a_property(self, first: Parts, second: Parts, depth: int) -> bool:
        """Whether `first` requires a property that has no value, or no place, in both."""
        for name in required(first):
            if any(_forbids(part, name) for part in second):
                return True
            ours, theirs = _property(first, name), _property(second, name)
            if ours and theirs:
                ours, theirs = self.parts(*ours), self.parts(*theirs)
                if self.are_disjoint(ours, theirs, depth + 1):
                    return True
        return False

    def _resolved(self, reference: str) -> Any:
        """What a reference into this document leads to; True, which allows all, for others."""
        if not reference.startswith("#"):
            return True
        found = self._root
        for step in reference.removeprefix("#").split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping) and key in found:
                found = found[key]
            elif isinstance(found, list) and key.isdigit() and int(key) < len(found):
                found = found[int(key)]
            else:
                return True
        return found


def types(parts: Parts) -> frozenset[str]:
    """Types a value of all parts can have; see `_TYPES` on "number"."""
    allowed = ALL_TYPES
    for part in parts:
        allowed &= named_types(part.get("type"))
    return allowed


def named_types(names: Any) -> frozenset[str]:
    """The value of a `type` keyword, absent or not, as a set."""
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, list) or not all(name in _TYPES for name in names):
        return ALL_TYPES
    return frozenset().union(*(_TYPES[name] for name in names))


def type_of(value: Any) -> str:
    """The type of a JSON value, "number" for one that is no integer."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "integer" if value == math.floor(value) else "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def key_of(value: Any) -> str:
    """Equal for equal JSON values, of which 1 and 1.0 are two."""

    def plain(part: Any) -> Any:
        if isinstance(part, float) and part.is_integer():
            return int(part)
        if isinstance(part, list):
            return [plain(one) for one in part]
        return {name: plain(one) for name, one in part.items()} if isinstance(part, dict) else part

    return json.dumps(plain(value), sort_keys=True)


def required(parts: Parts) -> list[str]:
    """Names that a value of all parts must have, if it is an object."""
    names: dict[str, None] = {}
    for part in parts:
        if isinstance(part.get("required"), list):
            names |= dict.fromkeys(part["required"])
    return list(names)


def _listed(parts: Parts) -> list[Any] | None:
    """Values among which those of all parts are; None where none lists any."""
    lists = [
        [part["const"]] if "const" in part else part["enum"]
        for part in parts
        if "const" in part or isinstance(part.get("enum"), list)
    ]
    if not lists:
        return None
    keys = [{key_of(value) for value in values} for values in lists[1:]]
    return [value for value in lists[0] if all(key_of(value) in known for known in keys)]


def _is_impossible(value: Any, parts: Parts) -> bool:
    """Whether `value` surely does not satisfy all parts."""
    kind = type_of(value)
    if kind not in types(parts):
        return True
    if kind in ("integer", "number"):
        return _are_apart((value, False, value, False), _bounds(parts))
    if kind in ("string", "array"):
        names = ("minLength", "maxLength") if kind == "string" else ("minItems", "maxItems")
        return _are_apart((len(value), False, len(value), False), _sizes(parts, *names))
    return kind == "object" and any(name not in value for name in required(parts))


Bounds = tuple[float, bool, float, bool]
"""Lowest, whether it is excluded itself, highest, whether it is."""


def _bounds(parts: Parts) -> Bounds:
    low, high = (-math.inf, False), (math.inf, False)
    for part in parts:
        for name, is_open in (("minimum", False), ("exclusiveMinimum", True)):
            low = max([low, *_limits(part, name, is_open)])
        for name, is_open in (("maximum", False), ("exclusiveMaximum", True)):
            high = min([high, *_limits(part, name, is_open)], key=lambda one: (one[0], not one[1]))
    return (*low, *high)


def _limits(part: Mapping[str, Any], name: str, is_open: bool) -> Iterator[tuple[float, bool]]:
    value = part.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value), is_open


def _sizes(parts: Parts, low: str, high: str) -> Bounds:
    lows = [part[low] for part in parts if isinstance(part.get(low), int)]
    highs = [part[high] for part in parts if isinstance(part.get(high), int)]
    return max(lows, default=0), False, min(highs, default=math.inf), False


def _are_apart(first: Bounds, second: Bounds) -> bool:
    return _ends_before(first, second) or _ends_before(second, first)


def _ends_before(first: Bounds, second: Bounds) -> bool:
    end, is_end_open, start, is_start_open = first[2], first[3], second[0], second[1]
    return end < start or (end == start and (is_end_open or is_start_open))


def _property(parts: Parts, name: str) -> list[Any]:
    found = []
    for part in parts:
        properties = part.get("properties")
        if isinstance(properties, Mapping) and name in properties:
            found.append(properties[name])
    return found


def _forbids(part: Mapping[str, Any], name: str) -> bool:
    properties = part.get("properties")
    known = properties if isinstance(properties, Mapping) else {}
    if name in known:
        return known[name] is False
    return part.get("additionalProperties") is False and not part.get("patternProperties")
