"""The engine's tool calls in LangChain's words, whole and in pieces."""

from __future__ import annotations

import uuid
from typing import Any

from langchain_core.messages import InvalidToolCall
from langchain_core.messages import ToolCall as LangChainToolCall

from engine import ToolCall

_CLOSING = {"{": "}", "[": "]"}


def new_call_id() -> str:
    """An id that no other call has."""
    return f"call_{uuid.uuid4().hex}"


def split_calls(
    calls: tuple[ToolCall, ...],
) -> tuple[list[LangChainToolCall], list[InvalidToolCall]]:
    """Calls that can be made, and those that cannot with what is wrong with them."""
    good: list[LangChainToolCall] = []
    broken: list[InvalidToolCall] = []
    for call in calls:
        if call.error is None and call.name is not None:
            good.append(
                LangChainToolCall(
                    type="tool_call",
                    id=new_call_id(),
                    name=call.name,
                    args=call.parsed_arguments(),
                )
            )
        else:
            broken.append(broken_call(call.name, call.arguments or call.raw, call.error))
    return good, broken


def broken_call(name: str | None, args: str, error: str | None) -> InvalidToolCall:
    """A call that cannot be made."""
    return InvalidToolCall(
        type="invalid_tool_call", id=new_call_id(), name=name, args=args, error=error
    )


def unparsable_end(arguments: str) -> str:
    """What makes the arguments of a call that broke off unreadable when they are streamed.

    LangChain completes cut-off JSON in the pieces of a stream, so half a call would be made with
    half its arguments. A bracket that closes nothing keeps it among the invalid calls.
    """
    stack: list[str] = []
    is_in_string = is_escaped = False
    for char in arguments:
        if is_in_string:
            is_in_string = char != '"' or is_escaped
            is_escaped = char == "\\" and not is_escaped
        elif char == '"':
            is_in_string = True
        elif char in _CLOSING:
            stack.append(_CLOSING[char])
        elif stack and char == stack[-1]:
            stack.pop()
    end = ('""' if is_escaped else '"') if is_in_string else ""
    return end + ("}" if stack and stack[-1] == "]" else "]")


def call_block(name: str | None, call_id: str, args: dict[str, Any]) -> dict[str, Any]:
    """A finished call as a content block."""
    return {"type": "tool_call", "id": call_id, "name": name, "args": args}
