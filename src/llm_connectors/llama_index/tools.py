"""LlamaIndex tools as the engine takes them, and tool calls as LlamaIndex takes them."""

from __future__ import annotations

import json
import threading
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ToolCallBlock
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools import BaseTool, ToolMetadata
from pydantic_core import from_json

from llm_connectors.llama_index.errors import RequestError

_MAX_REMEMBERED = 1024


class _Converted:
    """Descriptions of tools; made once, as agents show the same tools at every step."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[int, tuple[ToolMetadata, Any, dict[str, Any]]] = OrderedDict()

    def get(self, metadata: ToolMetadata) -> dict[str, Any]:
        # The metadata object is kept, so that its id cannot become another's.
        key, seen = id(metadata), (metadata.name, metadata.description, metadata.fn_schema)
        with self._lock:
            entry = self._known.get(key)
        if entry is not None and entry[0] is metadata and entry[1] == seen:
            return entry[2]
        try:
            converted = metadata.to_openai_tool(skip_length_check=True)
        except Exception as error:
            msg = f"The tool {metadata.name!r} cannot be described: {error}"
            raise RequestError(msg) from error
        with self._lock:
            self._known[key] = (metadata, seen, converted)
            if len(self._known) > _MAX_REMEMBERED:
                self._known.popitem(last=False)
        return converted


_converted = _Converted()


def openai_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tools as dicts in the OpenAI API's form.

    Args:
        tools: `BaseTool`s or such dicts, or None.

    Raises:
        RequestError: It is no list, or a member is neither.
    """
    if tools is None:
        return None
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        msg = f"tools is a {type(tools).__name__}, not a list of tools."
        raise RequestError(msg)
    return [_as_dict(index, tool) for index, tool in enumerate(tools)]


def _as_dict(index: int, tool: Any) -> dict[str, Any]:
    if isinstance(tool, BaseTool):
        return _converted.get(tool.metadata)
    if isinstance(tool, Mapping):
        # The very object, so that a request seen before is recognised.
        return tool if isinstance(tool, dict) else dict(tool)
    msg = (
        f"tools[{index}] is a {type(tool).__name__}. Wrap functions with FunctionTool.from_defaults"
        "(fn), or pass a dict in the OpenAI API's form."
    )
    raise RequestError(msg)


def new_call_id() -> str:
    """An id that no other call has, also of the same tool."""
    return f"call_{uuid.uuid4().hex}"


def partial_arguments(text: str) -> dict[str, Any]:
    """What can be read of a JSON object that may still be incomplete; empty for anything else."""
    try:
        value = from_json(text, allow_partial="trailing-strings")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def legacy_tool_calls(message: ChatMessage) -> list[dict[str, Any]]:
    """Calls that stand in `additional_kwargs["tool_calls"]`, where older classes put them.

    Returns:
        Per call "id", "name" and "arguments" (a dict, or JSON text). Both OpenAI's dicts and the
        objects of its client are read.
    """
    calls = message.additional_kwargs.get("tool_calls") or []
    return [_legacy_call(call) for call in calls]


def _legacy_call(call: Any) -> dict[str, Any]:
    def read(source: Any, name: str) -> Any:
        return source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)

    function = read(call, "function") or call
    name = read(function, "name")
    if not name:
        msg = f"additional_kwargs['tool_calls'] holds {call!r}, which names no tool."
        raise RequestError(msg)
    return {"id": read(call, "id"), "name": name, "arguments": read(function, "arguments") or {}}


def as_legacy(block: ToolCallBlock) -> dict[str, Any]:
    """A call for `additional_kwargs["tool_calls"]`, which some of LlamaIndex's programs read."""
    arguments = block.tool_kwargs
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    function = {"name": block.tool_name, "arguments": text}
    return {"id": block.tool_call_id, "type": "function", "function": function}


def selections(message: ChatMessage) -> list[ToolSelection]:
    """The calls of an answer, whole or still being written, each with an id of its own."""
    blocks = [block for block in message.blocks if isinstance(block, ToolCallBlock)]
    found = [(block.tool_call_id, block.tool_name, block.tool_kwargs) for block in blocks]
    if not found:
        found = [(one["id"], one["name"], one["arguments"]) for one in legacy_tool_calls(message)]
    return [
        ToolSelection(
            tool_id=call_id or new_call_id(),
            tool_name=name,
            tool_kwargs=partial_arguments(kwargs) if isinstance(kwargs, str) else kwargs,
        )
        for call_id, name, kwargs in found
    ]
