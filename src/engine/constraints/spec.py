"""`ConstraintSpec`: which constraint a request asks for, as plain strings. No grammar library here.

Shapes are checked when `SamplingParams` is made; whether a constraint can be enforced is found out
by `engine.constraints.compiler` when the request is submitted, because that needs the tokenizer.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from engine.errors import ConstraintError

CONSTRAINT_FIELDS = ("json_schema", "regex", "choice", "grammar")
JSON_WHITESPACE = ("spaced", "compact", "flexible")
MAX_SOURCE_CHARS = 4_000_000
"""Longest schema, regex or grammar; a limit that only mistakes meet."""


class ConstraintSpec(NamedTuple):
    """A constraint in a form that can be compared, hashed and pickled.

    Attributes:
        kind: "json_schema", "regex", "choice" or "grammar".
        source: The schema as JSON text, the regex, the choices as a JSON list, or the grammar.
        json_whitespace: For schemas; see `SamplingParams`.
    """

    kind: str
    source: str
    json_whitespace: str


def checked_json_schema(value: Any) -> str:
    """A JSON schema, given as a mapping, a boolean's text or JSON text, as compact JSON text.

    Raises:
        ConstraintError: It is no JSON, contains itself, or is neither object nor boolean.
    """
    if isinstance(value, str):
        return _checked_schema_text(value)
    if not isinstance(value, Mapping):
        msg = (
            f"json_schema must be a dict or JSON text, got {type(value).__name__}. Of a Pydantic "
            "model, pass model_json_schema()."
        )
        raise ConstraintError(msg)
    try:
        text = json.dumps(_plain(value), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except RecursionError:
        msg = "json_schema is nested too deeply, or contains itself. Use $defs and $ref."
        raise ConstraintError(msg) from None
    except (TypeError, ValueError) as error:
        if "Circular" in str(error):
            msg = "json_schema contains itself. Use $defs and $ref for recursive schemas."
        else:
            msg = f"json_schema is not made of JSON values: {error}."
        raise ConstraintError(msg) from None
    return _checked_schema_text(text)


def _plain(value: Mapping[str, Any]) -> Any:
    # Only dicts are known to the encoder; other mappings are rare.
    return value if isinstance(value, dict) else dict(value)


@functools.lru_cache(maxsize=256)
def _checked_schema_text(text: str) -> str:
    _check_length("json_schema", text)
    try:
        value = json.loads(text)
    except RecursionError:
        msg = "json_schema is nested too deeply. Use $defs and $ref."
        raise ConstraintError(msg) from None
    except ValueError as error:
        msg = f"json_schema is no valid JSON: {error}."
        raise ConstraintError(msg) from None
    if not isinstance(value, dict | bool):
        msg = f"json_schema must be a JSON object or boolean, got {_shorten(text)}."
        raise ConstraintError(msg)
    return text


def checked_choice(value: Any) -> tuple[str, ...]:
    """The strings of which the answer is one.

    Raises:
        ConstraintError: There are none, or something else is among them.
    """
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        msg = f"choice must be a list of strings, got {_shorten(repr(value))}."
        raise ConstraintError(msg)
    choices = tuple(value)
    if not choices:
        msg = "choice is empty. Give at least one string that may be the answer."
        raise ConstraintError(msg)
    for index, item in enumerate(choices):
        if not isinstance(item, str) or not item:
            msg = f"choice[{index}]={_shorten(repr(item))} must be a non-empty string."
            raise ConstraintError(msg)
        _check_encodable(f"choice[{index}]", item)
    if sum(map(len, choices)) > MAX_SOURCE_CHARS:
        msg = f"choice has more than {MAX_SOURCE_CHARS} characters in all."
        raise ConstraintError(msg)
    return choices


def checked_text(name: str, value: Any) -> str:
    """A regex or a grammar.

    Raises:
        ConstraintError: It is no string, or an empty or immensely long one.
    """
    if not isinstance(value, str):
        msg = f"{name} must be a string, got {type(value).__name__}."
        raise ConstraintError(msg)
    if not value:
        msg = f"{name} is empty: the answer would be empty too. Leave it out for free text."
        raise ConstraintError(msg)
    _check_length(name, value)
    _check_encodable(name, value)
    return value


def check_one_constraint(fields: Mapping[str, Any]) -> None:
    """Refuse more than one constraint.

    Args:
        fields: The four fields of `SamplingParams`; None where not set.

    Raises:
        ConstraintError: Two or more are set.
    """
    used = [name for name, value in fields.items() if value is not None]
    if len(used) > 1:
        msg = (
            f"{' and '.join(used)} are set together, but an answer can follow one constraint only. "
            "Use one of them; a grammar can contain %json {…} and /regular expressions/."
        )
        raise ConstraintError(msg)


def _check_length(name: str, text: str) -> None:
    if len(text) > MAX_SOURCE_CHARS:
        msg = f"{name} has {len(text)} characters; at most {MAX_SOURCE_CHARS} are allowed."
        raise ConstraintError(msg)


def _check_encodable(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        msg = f"{name} holds a lone surrogate, which no text can contain."
        raise ConstraintError(msg) from None


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
