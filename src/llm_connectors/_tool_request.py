"""`ToolRequest`: what one call asks of tools and format, checked and in one form."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from engine import RequestError, nearest_name_hint
from llm_connectors._schema import (
    argument_schema,
    closed_schema,
    schema_text,
    without_annotations,
)

_ANY_WORDS = ("any", "required")
_MAX_REMEMBERED = 256


@dataclasses.dataclass(frozen=True, slots=True)
class ToolRequest:
    """Tools and answer format of one call. Make it with `tool_request`.

    Attributes:
        tools: What the model is shown, in the OpenAI API's form; empty for none.
        schemas: Name -> JSON schema of the arguments, of all tools.
        choice: "auto": the model decides; "forced": it must call one of `forced`; "none".
        forced: Names of which one must be called.
        parallel: Whether several calls at once are wanted; None leaves it to the model.
        answer_schema: JSON schema of the final answer; None for text.
        strict: False leaves calls that the model makes by itself unconstrained.
    """

    tools: tuple[dict[str, Any], ...]
    schemas: Mapping[str, Mapping[str, Any]]
    choice: Literal["auto", "forced", "none"]
    forced: tuple[str, ...]
    parallel: bool | None
    answer_schema: Mapping[str, Any] | None
    strict: bool | None

    @property
    def forced_schemas(self) -> dict[str, Mapping[str, Any]]:
        """The schemas of the tools of which one must be called."""
        return {name: self.schemas[name] for name in self.forced}


class _Memory:
    """Requests by what they were made of, as an agent makes the same one at every step."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[Any, tuple[Any, ToolRequest | None]] = OrderedDict()

    def get(self, key: Any, given: Any) -> ToolRequest | None:
        with self._lock:
            entry = self._known.get(key)
        # The same objects may hold something else by now.
        return entry[1] if entry is not None and entry[0] == given else None

    def put(self, key: Any, given: Any, request: ToolRequest | None) -> None:
        kept = copy.deepcopy(given)
        with self._lock:
            self._known[key] = (kept, request)
            if len(self._known) > _MAX_REMEMBERED:
                self._known.popitem(last=False)


_memory = _Memory()


def tool_request(
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: Any = None,
    parallel_tool_calls: bool | None = None,
    response_format: Mapping[str, Any] | None = None,
    strict: bool | None = None,
) -> ToolRequest | None:
    """Check what a call asks for. Fast for what was asked before.

    Args:
        tools: In the OpenAI API's form.
        tool_choice: None or "auto"; "none"; "any", "required" or True; a tool's name; a dict that
            names one, as OpenAI's and Anthropic's. False is None.
        parallel_tool_calls: True: several calls at once, False: one at most. A forced call is one
            call unless this is True.
        response_format: `{"type": "json_schema", "json_schema": {"schema": …}}`, the schema alone,
            `{"type": "json_object"}` or `{"type": "text"}`.
        strict: False leaves the arguments of calls that the model makes by itself unconstrained;
            otherwise they are held to the schema, as those of forced calls always are.

    Returns:
        None where neither tools nor a format are asked for.

    Raises:
        RequestError: Something is malformed, unknown or contradictory.
        ConstraintError: A schema is no JSON.
    """
    for name, value in (("parallel_tool_calls", parallel_tool_calls), ("strict", strict)):
        if value is not None and not isinstance(value, bool):
            msg = f"{name}={value!r} must be True, False or None."
            raise RequestError(msg)
    listed = _as_list(tools)
    wishes = (repr(tool_choice), parallel_tool_calls, strict)
    key = (tuple(map(id, listed)), id(response_format), wishes)
    given = (listed, response_format)
    known = _memory.get(key, given)
    if known is None:
        known = _made(listed, tool_choice, parallel_tool_calls, response_format, strict)
        _memory.put(key, given, known)
    return known


def _made(
    tools: list[Mapping[str, Any]],
    tool_choice: Any,
    parallel: bool | None,
    response_format: Mapping[str, Any] | None,
    strict: bool | None,
) -> ToolRequest | None:
    schemas: dict[str, Mapping[str, Any]] = {}
    shown: list[dict[str, Any]] = []
    for index, tool in enumerate(tools):
        name, schema = _name_and_schema(tool, index)
        if name in schemas:
            if without_annotations(schema) == without_annotations(schemas[name]):
                continue  # the same tool, given twice
            msg = f"Two tools are named {name!r}. The model could not tell them apart; rename one."
            raise RequestError(msg)
        schemas[name] = schema
        shown.append(copy.deepcopy(dict(tool)))
    answer_schema = _answer_schema(response_format)
    choice, forced = _choice(tool_choice, tuple(schemas))
    if not tools and answer_schema is None:
        return None
    if choice == "forced" and answer_schema is not None:
        msg = (
            f"tool_choice={tool_choice!r} forces a call and response_format a final answer; there "
            "can be only one of them. Leave tool_choice out to allow either."
        )
        raise RequestError(msg)
    if choice == "none":
        shown = []
    return ToolRequest(tuple(shown), schemas, choice, forced, parallel, answer_schema, strict)


def _as_list(tools: Any) -> list[Mapping[str, Any]]:
    if tools is None:
        return []
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        msg = f"tools must be a list, got {type(tools).__name__}."
        raise RequestError(msg)
    return list(tools)


def _name_and_schema(tool: Any, index: int) -> tuple[str, Mapping[str, Any]]:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    is_function = isinstance(tool, Mapping) and tool.get("type", "function") == "function"
    if not is_function or not isinstance(function, Mapping):
        kind = tool.get("type") if isinstance(tool, Mapping) else type(tool).__name__
        msg = (
            f"Tool {index} is of type {kind!r}. A model in this process can call functions only: "
            '{"type": "function", "function": {"name": …, "parameters": …}}.'
        )
        raise RequestError(msg)
    if not isinstance(name, str) or not name or any(char in name for char in '"\\\n<>{}'):
        msg = f"Tool {index} has the name {name!r}; a name is a plain, non-empty string."
        raise RequestError(msg)
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        msg = f"The parameters of tool {name!r} are {type(parameters).__name__}, no JSON schema."
        raise RequestError(msg)
    schema = argument_schema(parameters)
    schema_text(schema, f"The schema of tool {name!r}")
    return name, closed_schema(schema)


def _choice(
    asked: Any, names: tuple[str, ...]
) -> tuple[Literal["auto", "forced", "none"], tuple[str, ...]]:
    if isinstance(asked, Mapping):
        asked = _from_dict(asked)
    if asked is None or asked is False or asked == "auto":
        return "auto", ()
    if asked == "none":
        return "none", ()
    if asked is True or asked in _ANY_WORDS:
        if not names:
            msg = f"tool_choice={asked!r} forces a call, but there are no tools."
            raise RequestError(msg)
        return "forced", names
    if not isinstance(asked, str):
        msg = (
            f"tool_choice={asked!r} is none of 'auto', 'none', 'any', 'required', True, a tool's "
            "name or a dict that names a tool."
        )
        raise RequestError(msg)
    if asked not in names:
        known = ", ".join(map(repr, names)) or "none"
        msg = f"tool_choice={asked!r} names no tool; there are: {known}."
        raise RequestError(msg + nearest_name_hint(asked, names))
    return "forced", (asked,)


def _from_dict(asked: Mapping[str, Any]) -> Any:
    """The word or name in a dict as OpenAI's and Anthropic's APIs take it."""
    function = asked.get("function")
    name = function.get("name") if isinstance(function, Mapping) else asked.get("name")
    if name is not None:
        return name
    if asked.get("type") in ("auto", "any", "none", "required"):
        return asked["type"]
    msg = f"tool_choice={dict(asked)!r} names no tool."
    raise RequestError(msg)


def _answer_schema(response_format: Any) -> Mapping[str, Any] | None:
    if response_format is None:
        return None
    if not isinstance(response_format, Mapping):
        msg = f"response_format is {type(response_format).__name__}, not a dict or a schema."
        raise RequestError(msg)
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object" and "properties" not in response_format:
        return {"type": "object"}
    schema: Any = response_format
    if kind == "json_schema":
        inner = response_format.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        schema = schema if schema is not None else response_format.get("schema")
    if not isinstance(schema, Mapping):
        msg = 'response_format of type "json_schema" has no "schema" in its "json_schema".'
        raise RequestError(msg)
    schema_text(schema, "The schema of response_format")
    return closed_schema(schema)
