"""Tools of every kind that LangChain knows, as the engine's dicts; each is converted once."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import TypeAdapter

from engine import RequestError

Tool = dict[str, Any] | type | Callable[..., Any] | BaseTool
_MAX_REMEMBERED = 1024


class _Converted:
    """Tools by identity, with what their description depended on then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # The tool itself is kept, so that its id cannot become another's.
        self._known: OrderedDict[tuple[int, bool | None], tuple[Any, Any, dict[str, Any]]]
        self._known = OrderedDict()

    def get(self, tool: Any, strict: bool | None) -> dict[str, Any]:
        if isinstance(tool, dict) and tool.get("type") == "function":
            return tool  # converted already
        key = (id(tool), strict)
        seen = _fingerprint(tool)
        with self._lock:
            entry = self._known.get(key)
        converted = None
        try:
            if entry is not None and entry[0] is tool and entry[1] == seen:
                return entry[2]
            converted = _convert(tool, strict)
            # A dict may be changed by its owner; compare with what it was.
            kept = copy.deepcopy(seen) if isinstance(seen, Mapping) else seen
        except RecursionError:
            # Nested too deep to be remembered; refused where schemas are checked.
            return _convert(tool, strict) if converted is None else converted
        with self._lock:
            self._known[key] = (tool, kept, converted)
            if len(self._known) > _MAX_REMEMBERED:
                self._known.popitem(last=False)
        return converted


_converted = _Converted()


def openai_tools(tools: Sequence[Tool], strict: bool | None = None) -> list[dict[str, Any]]:
    """Tools as the OpenAI API takes them. Fast for tools seen before.

    Args:
        tools: Dicts (OpenAI, Anthropic, JSON schema), Pydantic and TypedDict classes, dataclasses,
            functions, LangChain tools.
        strict: As in `convert_to_openai_tool`.

    Raises:
        RequestError: `tools` is no list, or one of them cannot be described.
    """
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        msg = f"tools must be a list, got {type(tools).__name__}."
        raise RequestError(msg)
    return [_converted.get(tool, strict) for tool in tools]


def _fingerprint(tool: Any) -> Any:
    """What a tool's description is made of, as far as it can change under the same object."""
    if isinstance(tool, dict):
        return tool
    if isinstance(tool, BaseTool):
        return (tool.name, tool.description, id(tool.args_schema))
    return getattr(tool, "__doc__", None)


def _convert(tool: Any, strict: bool | None) -> dict[str, Any]:
    try:
        if dataclasses.is_dataclass(tool) and isinstance(tool, type):
            return dataclass_tool(tool)
        converted: dict[str, Any] = convert_to_openai_tool(tool, strict=strict)
    except RequestError:
        raise
    except RecursionError as error:
        msg = f"The tool {_name(tool)} is nested too deep, or contains itself."
        raise RequestError(msg) from error
    except Exception as error:
        msg = f"The tool {_name(tool)} cannot be described: {error}"
        raise RequestError(msg) from error
    return converted


def dataclass_tool(cls: type) -> dict[str, Any]:
    """A dataclass as a tool whose arguments are its fields."""
    schema = TypeAdapter(cls).json_schema()
    description = schema.pop("description", None) or cls.__doc__ or ""
    name = schema.pop("title", cls.__name__)
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


def _name(tool: Any) -> str:
    if isinstance(tool, dict):
        return repr(tool.get("name") or tool.get("title") or sorted(map(str, tool)))
    return repr(getattr(tool, "name", None) or getattr(tool, "__name__", None) or type(tool))
