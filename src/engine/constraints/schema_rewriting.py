"""A JSON schema without some keywords that a grammar cannot keep, where others say the same.

    oneOf                    anyOf, where no value can satisfy two branches. Branches that list
                             values lose those of others; branches that require different
                             properties forbid each other's; a property that tells two branches
                             apart is required.
    not                      Fewer values or types; properties that are forbidden.
    dependentRequired,       A choice: without the property, or with what it needs.
    dependentSchemas,
    dependencies
    propertyNames            Properties or patterns, where names are listed or match a pattern.
    uniqueItems              The arrays themselves, where they can have at most 5 different items.
    unevaluatedProperties    additionalProperties, where nothing else could have evaluated some.

All values that the rewritten schema allows are allowed by the first one. The other way round it is
the same but for one case: branches of a `oneOf` that are not disjoint are told apart by properties
alone, even where something else in a value would have done so.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from engine.constraints.schema_paths import with_parts
from engine.constraints.schema_sets import (
    ANNOTATIONS,
    SchemaSets,
    key_of,
    named_types,
    required,
    type_of,
    types,
)

_MOST_UNIQUE = 5
_APPLICATORS = frozenset(
    {"$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "if", "dependentSchemas", "not"}
)

Schema = dict[str, Any]


def rewritten(schema: Any, sets: SchemaSets | None = None) -> Any:
    """`schema` and all parts of it, as far as anything is to be done; new where it is changed.

    Args:
        schema: Any JSON value.
        sets: Of the whole that `schema` is a part of; None for the whole itself.

    Raises:
        TypeError, ValueError, AttributeError: A keyword has a value that it cannot have.
    """
    if sets is None:
        sets = SchemaSets(schema)
    if not isinstance(schema, dict):
        return schema
    copy: Schema = with_parts(schema, lambda part: rewritten(part, sets))
    for keyword, rule in _RULES.items():
        if keyword in copy:
            copy = rule(copy, sets)
    return copy


def _and(schema: Schema, *more: Any) -> Schema:
    """`schema`, in which more must hold."""
    return {**schema, "allOf": [*schema.get("allOf", []), *more]} if more else schema


def _without(schema: Schema, keyword: str) -> Schema:
    return {name: value for name, value in schema.items() if name != keyword}


# ---------------------------------------------------------------- oneOf


def _one_of(schema: Schema, sets: SchemaSets) -> Schema:
    branches = schema["oneOf"]
    if not isinstance(branches, list) or not branches:
        return schema
    rest = _without(schema, "oneOf")
    around = sets.parts(rest)
    narrowed = list(branches)
    for i, j in itertools.combinations(range(len(branches)), 2):
        if not _are_apart(sets, around, branches[i], branches[j]):
            narrowed[i] = _kept_off(sets, around, narrowed[i], branches[j])
            narrowed[j] = _kept_off(sets, around, narrowed[j], branches[i])
    is_proven = all(
        i == j or _are_apart(sets, around, narrowed[i], branches[j])
        for i in range(len(branches))
        for j in range(len(branches))
    )
    if not is_proven:
        return schema
    if "anyOf" in rest:
        return _and(rest, {"anyOf": narrowed})
    return {**rest, "anyOf": narrowed}


def _are_apart(sets: SchemaSets, around: list[Mapping[str, Any]], first: Any, other: Any) -> bool:
    return sets.are_disjoint([*around, *sets.parts(first)], [*around, *sets.parts(other)])


def _kept_off(sets: SchemaSets, around: list[Mapping[str, Any]], branch: Any, other: Any) -> Any:
    """`branch` without values that `other` could have as well, as far as that can be said."""
    values, theirs = sets.finite(branch), sets.finite(other)
    if values is not None and theirs is not None:
        known = {key_of(value) for value in theirs}
        return {"enum": [value for value in values if key_of(value) not in known]}
    ours, others = [*around, *sets.parts(branch)], [*around, *sets.parts(other)]
    if types(ours) != types(others) or "object" not in types(ours):
        return branch
    # What is no object satisfies both, where both allow it.
    needed = [name for name in required(others) if name not in required(ours)]
    if needed:
        return {"type": "object", "allOf": [branch, {"properties": {needed[0]: False}}]}
    tag = sets.tag(ours, others)
    return branch if tag is None else {"type": "object", "allOf": [branch], "required": [tag]}


# ---------------------------------------------------------------- not


def _not(schema: Schema, sets: SchemaSets) -> Schema:
    barred, rest = schema["not"], _without(schema, "not")
    if barred is False:
        return rest
    if not isinstance(barred, dict):
        return schema
    keys = barred.keys() - ANNOTATIONS
    if keys == {"required"} and isinstance(barred["required"], list) and barred["required"]:
        # Only objects can lack a property; whatever else there is satisfies `required`.
        if named_types(rest.get("type", "object")) != {"object"}:
            return schema
        lacking = [{"properties": {name: False}} for name in barred["required"]]
        rest = {**rest, "type": "object"}
        return _and(rest, lacking[0] if len(lacking) == 1 else {"anyOf": lacking})
    if keys == {"type"}:
        return _not_type(schema, rest, named_types(barred["type"]))
    values = sets.finite(barred)
    if values is None:
        return schema
    known = {key_of(value) for value in values}
    ours = sets.finite({name: rest[name] for name in ("enum", "const", "type") if name in rest})
    if ours is not None:
        kept = [value for value in ours if key_of(value) not in known]
        return {**_without(_without(rest, "const"), "enum"), "enum": kept}
    allowed = types(sets.parts(rest))
    return rest if all(type_of(value) not in allowed for value in values) else schema


def _not_type(schema: Schema, rest: Schema, barred: frozenset[str]) -> Schema:
    allowed = named_types(rest.get("type")) - barred
    if "number" in allowed and "integer" not in allowed:
        return schema  # "a number that is no integer" has no name
    if not allowed:
        return schema
    names = allowed - {"integer"} if "number" in allowed else allowed
    return {**rest, "type": sorted(names)}


# ---------------------------------------------------------------- objects


def _dependent_required(schema: Schema, sets: SchemaSets) -> Schema:
    needs = schema["dependentRequired"]
    if not isinstance(needs, dict) or not all(isinstance(one, list) for one in needs.values()):
        return schema
    choices = [
        {"anyOf": [{"properties": {name: False}}, {"required": [name, *needed]}]}
        for name, needed in needs.items()
        if needed
    ]
    return _and(_without(schema, "dependentRequired"), *choices)


def _dependent_schemas(schema: Schema, sets: SchemaSets) -> Schema:
    needs = schema["dependentSchemas"]
    if not isinstance(needs, dict):
        return schema
    choices = [
        {"anyOf": [{"properties": {name: False}}, {"required": [name], "allOf": [needed]}]}
        for name, needed in needs.items()
    ]
    return _and(_without(schema, "dependentSchemas"), *choices)


def _dependencies(schema: Schema, sets: SchemaSets) -> Schema:
    """The older name of the two keywords above."""
    needs = schema["dependencies"]
    if not isinstance(needs, dict):
        return schema
    rest = _without(schema, "dependencies")
    lists = {name: needed for name, needed in needs.items() if isinstance(needed, list)}
    others = {name: needed for name, needed in needs.items() if name not in lists}
    rest = _dependent_required({**rest, "dependentRequired": lists}, sets)
    return _dependent_schemas({**rest, "dependentSchemas": others}, sets)


def _property_names(schema: Schema, sets: SchemaSets) -> Schema:
    names, rest = schema["propertyNames"], _without(schema, "propertyNames")
    if names is True:
        return rest
    if not isinstance(names, dict):
        return schema
    keys = names.keys() - ANNOTATIONS
    if not keys or (keys == {"type"} and "string" in named_types(names["type"])):
        return rest
    if rest.get("patternProperties"):
        return schema
    others = rest.get("additionalProperties", True)
    listed = sets.finite(names)
    properties = rest.get("properties", {})
    if listed is not None and isinstance(properties, dict):
        allowed = [name for name in listed if isinstance(name, str)]
        barred = dict.fromkeys((name for name in properties if name not in allowed), False)
        kept = {name: properties.get(name, others) for name in allowed}
        return {**rest, "properties": {**kept, **barred}, "additionalProperties": False}
    if keys - {"type"} == {"pattern"} and not properties:
        patterns = {names["pattern"]: others}
        return {**rest, "patternProperties": patterns, "additionalProperties": False}
    return schema


def _unevaluated_properties(schema: Schema, sets: SchemaSets) -> Schema:
    rest = _without(schema, "unevaluatedProperties")
    if schema["unevaluatedProperties"] is True or "additionalProperties" in schema:
        return rest
    if schema.keys() & _APPLICATORS:
        return schema
    return {**rest, "additionalProperties": schema["unevaluatedProperties"]}


# ---------------------------------------------------------------- arrays


def _unique_items(schema: Schema, sets: SchemaSets) -> Schema:
    rest = _without(schema, "uniqueItems")
    most = schema.get("maxItems")
    if schema["uniqueItems"] is False or (isinstance(most, int) and most <= 1):
        return rest
    is_plain = rest.keys() <= {"type", "items", "minItems", "maxItems", *ANNOTATIONS}
    values = sets.finite(rest.get("items", True))
    if not is_plain or values is None or rest.get("type") != "array":
        return schema
    distinct = list({key_of(value): value for value in values}.values())
    if len(distinct) > _MOST_UNIQUE:
        return schema
    sizes = range(
        rest.get("minItems", 0), min(rest.get("maxItems", _MOST_UNIQUE), len(distinct)) + 1
    )
    arrays = [list(one) for size in sizes for one in itertools.permutations(distinct, size)]
    kept = {name: rest[name] for name in rest if name in ANNOTATIONS}
    return {**kept, "enum": arrays} if arrays else schema


_RULES = {
    "oneOf": _one_of,
    "not": _not,
    "dependentRequired": _dependent_required,
    "dependentSchemas": _dependent_schemas,
    "dependencies": _dependencies,
    "propertyNames": _property_names,
    "unevaluatedProperties": _unevaluated_properties,
    "uniqueItems": _unique_items,
}
