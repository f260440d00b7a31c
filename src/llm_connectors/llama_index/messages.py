"""LlamaIndex messages -> the dicts that a chat template reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

from llm_connectors.llama_index.errors import RequestError, UnsupportedBlockError
from llm_connectors.llama_index.tools import legacy_tool_calls

# Chat templates know four roles; the others are vendors' names for the same.
_TEMPLATE_ROLES = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.TOOL: "tool",
    MessageRole.FUNCTION: "tool",
}


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """One dict per message, in order; `messages` is left untouched.

    Each has "role" and "content"; an answer may have "tool_calls" and "reasoning_content", a tool's
    result "tool_call_id". Several text blocks of a message are joined by a newline, as
    `ChatMessage.content` does.

    Raises:
        UnsupportedBlockError: A block is neither text nor, in an answer, reasoning or a call; the
            message names its type and place.
        RequestError: `messages` is empty or holds something else than `ChatMessage`s.
    """
    if isinstance(messages, str):
        msg = "messages is a string. Use complete(prompt), or chat([ChatMessage(prompt)])."
        raise RequestError(msg)
    if not messages:
        msg = "messages is empty; a chat needs at least one message."
        raise RequestError(msg)
    return [_template_message(index, message) for index, message in enumerate(messages)]


def _template_message(index: int, message: ChatMessage) -> dict[str, Any]:
    if not isinstance(message, ChatMessage):
        msg = f"messages[{index}] is a {type(message).__name__}, not a ChatMessage."
        raise RequestError(msg)
    if message.additional_kwargs.get("function_call"):
        msg = (
            f"messages[{index}].additional_kwargs['function_call'] is of an API that is gone. Put "
            "the call into a ToolCallBlock."
        )
        raise RequestError(msg)
    role = _TEMPLATE_ROLES[message.role]
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for place, block in enumerate(message.blocks):
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif role == "assistant" and isinstance(block, ThinkingBlock):
            thoughts.append(block.content or "")
        elif role == "assistant" and isinstance(block, ToolCallBlock):
            calls.append(_call(block.tool_call_id, block.tool_name, block.tool_kwargs))
        else:
            msg = (
                f"messages[{index}].blocks[{place}] is a {type(block).__name__}; this model reads "
                "TextBlock, and in the assistant's messages ThinkingBlock and ToolCallBlock. "
                "Remove the block or describe it in text."
            )
            raise UnsupportedBlockError(msg)
    rendered: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
    if role == "assistant" and not calls:
        calls = [
            _call(one["id"], one["name"], one["arguments"]) for one in legacy_tool_calls(message)
        ]
    if calls:
        rendered["tool_calls"] = calls
    if any(thoughts):
        rendered["reasoning_content"] = "\n".join(thoughts)
    if role == "tool" and message.additional_kwargs.get("tool_call_id"):
        rendered["tool_call_id"] = message.additional_kwargs["tool_call_id"]
    return rendered


def _call(call_id: str | None, name: str, arguments: dict[str, Any] | str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"type": "function", "id": call_id, "function": function}
