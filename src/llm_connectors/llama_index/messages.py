"""LlamaIndex messages -> the role/content dicts that a chat template reads."""

from __future__ import annotations

from collections.abc import Sequence

from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock

from llm_connectors.llama_index.errors import RequestError, UnsupportedBlockError

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
_TOOL_KEYS = ("tool_calls", "function_call")


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """One `{"role", "content"}` dict per message, in order; `messages` is left untouched.

    Several text blocks of a message are joined by a newline, as `ChatMessage.content` does.

    Raises:
        UnsupportedBlockError: A block is no text; the message names its type and place.
        RequestError: `messages` is empty or holds something else than `ChatMessage`s.
    """
    if isinstance(messages, str):
        msg = "messages is a string. Use complete(prompt), or chat([ChatMessage(prompt)])."
        raise RequestError(msg)
    if not messages:
        msg = "messages is empty; a chat needs at least one message."
        raise RequestError(msg)
    return [_template_message(index, message) for index, message in enumerate(messages)]


def _template_message(index: int, message: ChatMessage) -> dict[str, str]:
    if not isinstance(message, ChatMessage):
        msg = f"messages[{index}] is a {type(message).__name__}, not a ChatMessage."
        raise RequestError(msg)
    for key in _TOOL_KEYS:
        if message.additional_kwargs.get(key):
            msg = (
                f"messages[{index}].additional_kwargs[{key!r}] holds tool calls, which this "
                "version cannot put into the prompt. Leave the message out or write it as text."
            )
            raise RequestError(msg)
    texts: list[str] = []
    for place, block in enumerate(message.blocks):
        if not isinstance(block, TextBlock):
            msg = (
                f"messages[{index}].blocks[{place}] is a {type(block).__name__}; this model reads "
                "TextBlock only. Remove the block or describe it in text."
            )
            raise UnsupportedBlockError(msg)
        texts.append(block.text)
    return {"role": _TEMPLATE_ROLES[message.role], "content": "\n".join(texts)}
