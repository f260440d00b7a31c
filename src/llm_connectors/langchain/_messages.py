"""LangChain messages as the role/content dicts that chat templates render."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from engine import RequestError

_ROLES = ("system", "developer", "user", "assistant", "tool")
_REASONING_TYPES = ("reasoning", "thinking")
_TOOL_CALL_TYPES = ("tool_call", "tool_use", "tool_call_chunk", "invalid_tool_call")


def to_conversation(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """The conversation as chat templates read it, one dict per message.

    Each has `role` and `content`, and where there is one `name`, `tool_calls`, `tool_call_id` and
    `reasoning_content`. Content lists keep their text blocks, joined by line breaks; an answer's
    reasoning blocks become `reasoning_content`.

    Raises:
        RequestError: There is no message, a role is unknown, a content block is no text, or a tool
            result answers no call. The message's index and the block's type are named; nothing is
            dropped in silence.
    """
    if not messages:
        msg = "The conversation is empty. Pass at least one message."
        raise RequestError(msg)
    _check_results(messages)
    return [_to_dict(message, index) for index, message in enumerate(messages)]


def _check_results(messages: Sequence[BaseMessage]) -> None:
    """Every tool result must answer a call that an earlier message made."""
    call_ids: set[str | None] = set()
    for index, message in enumerate(messages):
        if isinstance(message, AIMessage):
            call_ids.update(call["id"] for call in message.tool_calls)
            call_ids.update(call["id"] for call in message.invalid_tool_calls)
        elif isinstance(message, ToolMessage) and message.tool_call_id not in call_ids:
            msg = (
                f"Message {index} is the result of tool call {message.tool_call_id!r}, which no "
                "earlier message makes. Keep the AIMessage with the call, or drop its result."
            )
            raise RequestError(msg)


def _to_dict(message: BaseMessage, index: int) -> dict[str, Any]:
    role = _role(message, index)
    text, reasoning = _split_content(message, index)
    rendered: dict[str, Any] = {"role": role, "content": text}
    if message.name:
        rendered["name"] = message.name
    if isinstance(message, ToolMessage):
        rendered["tool_call_id"] = message.tool_call_id
    if isinstance(message, AIMessage):
        # Calls that could not be read stay in sight, so that the model can do better.
        calls = [*message.tool_calls, *message.invalid_tool_calls]
        if calls:
            rendered["tool_calls"] = [
                {
                    "type": "function",
                    "id": call["id"],
                    "function": {"name": call["name"] or "", "arguments": call["args"] or {}},
                }
                for call in calls
            ]
        reasoning = reasoning or message.additional_kwargs.get("reasoning_content") or ""
        if reasoning:
            rendered["reasoning_content"] = reasoning
    return rendered


def _role(message: BaseMessage, index: int) -> str:
    if isinstance(message, ChatMessage):
        if message.role in _ROLES:
            return message.role
        msg = (
            f"Message {index} has the unknown role {message.role!r}. Use one of "
            f"{', '.join(map(repr, _ROLES))}, or another message class."
        )
        raise RequestError(msg)
    if isinstance(message, HumanMessage):
        return "user"
    if isinstance(message, AIMessage):
        return "assistant"
    if isinstance(message, SystemMessage):
        return "system"
    if isinstance(message, ToolMessage):
        return "tool"
    msg = (
        f"Message {index} is a {type(message).__name__}, which chat templates have no role for. "
        "Use HumanMessage, AIMessage, SystemMessage, ToolMessage or ChatMessage."
    )
    raise RequestError(msg)


def _split_content(message: BaseMessage, index: int) -> tuple[str, str]:
    """The message's text and, of an answer, its reasoning."""
    if isinstance(message.content, str):
        return message.content, ""
    texts: list[str] = []
    reasoning: list[str] = []
    is_answer = isinstance(message, AIMessage)
    has_tool_calls = isinstance(message, AIMessage) and bool(
        message.tool_calls or message.invalid_tool_calls
    )
    for block in message.content:
        kind = "text" if isinstance(block, str) else block.get("type")
        if isinstance(block, str):
            texts.append(block)
        elif kind == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif is_answer and kind in _REASONING_TYPES:
            reasoning.append(str(block.get(kind) or ""))
        elif has_tool_calls and kind in _TOOL_CALL_TYPES:
            continue  # the same call stands in `tool_calls`, which is what templates read
        else:
            msg = (
                f"Message {index} has a content block of type {kind!r}, which this model cannot "
                "read: it takes text only. Remove the block or describe it in text."
            )
            raise RequestError(msg)
    return "\n".join(texts), "\n".join(reasoning)
