"""Checks what a caller passes as a chat, and turns it into plain data for a template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import RequestError
from engine.text.tokenizer import check_encodable

ROLES = ("system", "user", "assistant", "tool", "developer")

# Names under which a message's reasoning comes; templates read the first, gpt-oss's the second.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def plain_data(value: object, name: str) -> Any:
    """A copy of `value` made of dict, list, str, int, float, bool and None only.

    A template is code from the model's author: it gets no object whose methods it could call.

    Args:
        value: Anything made of mappings, sequences and scalars.
        name: What error messages call it.

    Raises:
        RequestError: It holds another kind of object, or a string with a lone surrogate.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        check_encodable(value, name)
        return str.__str__(value)  # Subclasses, such as string enums, carry methods of their own.
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {
            plain_data(key, f"a key of {name}"): plain_data(item, f"{name}[{key!r}]")
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain_data(item, f"{name}[{index}]") for index, item in enumerate(value)]
    msg = f"{name} is {type(value).__name__}; a chat is made of dict, list, str, numbers and None."
    raise RequestError(msg)


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Checked copies of `messages`, in the form templates expect.

    Keys that are None are dropped; text blocks are joined without anything between them; a tool
    call's arguments become an object if they are one as JSON text; reasoning is there under each
    name a template may read.

    Raises:
        RequestError: The list is empty, or a message is not one; its index is named.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        msg = (
            f"messages is {type(messages).__name__}, not a list of messages such as "
            '[{"role": "user", "content": "Hi"}].'
        )
        raise RequestError(msg)
    if not messages:
        raise RequestError("messages is empty. A chat needs at least one message.")
    return [_plain_message(message, index) for index, message in enumerate(messages)]


def _plain_message(message: object, index: int) -> dict[str, Any]:
    name = f"messages[{index}]"
    if not isinstance(message, Mapping):
        msg = f"{name} is {type(message).__name__}, not a dict with 'role' and 'content'."
        raise RequestError(msg)
    plain: dict[str, Any] = plain_data(message, name)
    plain = {key: value for key, value in plain.items() if value is not None}
    role = plain.get("role")
    if role not in ROLES:
        got = "has no role" if role is None else f"has the role {role!r}"
        msg = f"{name} {got}; roles are {', '.join(ROLES)}."
        raise RequestError(msg)
    if "content" in plain:
        plain["content"] = _joined_text(plain["content"], name)
    elif not (role == "assistant" and plain.get("tool_calls")):
        msg = f"{name} (role {role!r}) has no content; only an assistant's tool calls go without."
        raise RequestError(msg)
    if "tool_calls" in plain:
        plain["tool_calls"] = _tool_calls(plain["tool_calls"], name)
    return _with_reasoning_names(plain)


def _joined_text(content: object, name: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        msg = f"{name} has content of type {type(content).__name__}, not str or a list of blocks."
        raise RequestError(msg)
    texts = []
    for position, block in enumerate(content):
        if isinstance(block, str):
            texts.append(block)
            continue
        kind = block.get("type") if isinstance(block, dict) else type(block).__name__
        if kind != "text":
            msg = f"{name} has a content block of type {kind!r}; this engine takes text only."
            raise RequestError(msg)
        text = block.get("text")
        if not isinstance(text, str):
            msg = f"{name} has a text block (position {position}) without a string 'text'."
            raise RequestError(msg)
        texts.append(text)
    return "".join(texts)


def _tool_calls(tool_calls: object, name: str) -> list[dict[str, Any]]:
    if not isinstance(tool_calls, list) or not all(isinstance(call, dict) for call in tool_calls):
        msg = f"{name} has tool_calls that are not a list of dicts."
        raise RequestError(msg)
    for call in tool_calls:
        function = call.get("function", call)
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            function["arguments"] = _parsed_object(function["arguments"])
    return tool_calls


def _parsed_object(arguments: str) -> Any:
    """`arguments` parsed, or as it is where a model once wrote something else than an object."""
    try:
        parsed = json.loads(arguments)
    except ValueError:
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _with_reasoning_names(message: dict[str, Any]) -> dict[str, Any]:
    given = (message[field] for field in _REASONING_FIELDS if field in message)
    reasoning = next(given, None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}
