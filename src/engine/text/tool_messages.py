"""Conversations with tools for templates that cannot show them, or only in a form of their own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.text.call_syntax import CallSyntax

_DESCRIPTION = """You can call these functions. Each is described by a JSON schema:
{tools}
To call one, answer with its name and its arguments as a JSON object, in exactly this form:
{example}
Results come back in <tool_response> tags. Call a function only if you need one; otherwise answer \
in plain text."""

_MISTRAL_ID_CHARS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def fitted_messages(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    source: str,
    shows_tools: bool,
    shows_system: bool,
    syntax: CallSyntax | None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools as a template can show them; the input is left as it is.

    Args:
        messages: As in the OpenAI API, `arguments` of calls as objects or JSON text.
        tools: As in the OpenAI API.
        source: The template's.
        shows_tools: The template has a place for tools.
        shows_system: It has one for a system message.
        syntax: How the model writes calls; used where the template does not say.
    """
    fitted = [dict(message) for message in messages]
    if shows_tools:
        if "single tool-call" in source:
            fitted = _one_call_a_message(fitted)
        if "[TOOL_CALLS]" in source:
            fitted = [_with_short_ids(message) for message in fitted]
        return fitted, [dict(tool) for tool in tools] if tools else None
    assert syntax is not None, "templates without tools are given a notation"
    fitted = _as_text(fitted, syntax)
    if tools:
        fitted = _with_preamble(fitted, describe_tools(tools, syntax), shows_system=shows_system)
    return fitted, None


def describe_tools(tools: Sequence[Mapping[str, Any]], syntax: CallSyntax) -> str:
    """A system message that tells a model its tools and how to call them."""
    shown = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    example = syntax.write([("function-name", {"argument-name": "value"})])
    return _DESCRIPTION.format(tools=shown, example=example)


def _with_preamble(
    messages: list[dict[str, Any]], text: str, *, shows_system: bool
) -> list[dict[str, Any]]:
    """`text` at the head of the system message, or of the first user message without one."""
    if messages and messages[0].get("role") in ("system", "developer"):
        first = {**messages[0], "content": f"{messages[0].get('content') or ''}\n\n{text}".strip()}
        return [first, *messages[1:]]
    if shows_system:
        return [{"role": "system", "content": text}, *messages]
    for index, message in enumerate(messages):
        if message.get("role") == "user":
            first = {**message, "content": f"{text}\n\n{message.get('content') or ''}"}
            return [*messages[:index], first, *messages[index + 1 :]]
    return [{"role": "user", "content": text}, *messages]


def _as_text(messages: list[dict[str, Any]], syntax: CallSyntax) -> list[dict[str, Any]]:
    """Calls as the model wrote them, results of one turn as one message of the user."""
    shown: list[dict[str, Any]] = []
    is_after_result = False
    for message in messages:
        if message.get("role") == "tool":
            result = f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"
            if is_after_result:
                shown[-1]["content"] += "\n" + result
            else:
                shown.append({"role": "user", "content": result})
            is_after_result = True
            continue
        is_after_result = False
        calls = message.get("tool_calls")
        if calls:
            written = syntax.write([_name_and_arguments(call) for call in calls])
            text = f"{message.get('content') or ''}\n{written}".strip()
            message = {key: value for key, value in message.items() if key != "tool_calls"}
            message["content"] = text
        shown.append(message)
    return shown


def _name_and_arguments(call: Mapping[str, Any]) -> tuple[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = {"arguments": arguments}
    return str(function.get("name")), arguments


def _one_call_a_message(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Llama 3's template takes one call a message: each call, then its own result."""
    shown: list[dict[str, Any]] = []
    index = 0
    while index < len(messages):
        message = messages[index]
        calls = message.get("tool_calls") or []
        index += 1
        if len(calls) < 2:
            shown.append(message)
            continue
        results: list[dict[str, Any]] = []
        while index < len(messages) and messages[index].get("role") == "tool":
            results.append(messages[index])
            index += 1
        for position, call in enumerate(calls):
            content = message.get("content") or "" if position == 0 else ""
            shown.append({**message, "content": content, "tool_calls": [call]})
            own = [one for one in results if one.get("tool_call_id") == call.get("id")]
            shown += own
            results = [one for one in results if one not in own]
        shown += results
    return shown


def _with_short_ids(message: dict[str, Any]) -> dict[str, Any]:
    """Mistral's templates take ids of nine letters or digits only."""
    if message.get("tool_call_id"):
        message["tool_call_id"] = _short_id(str(message["tool_call_id"]))
    if message.get("tool_calls"):
        message["tool_calls"] = [
            {**call, "id": _short_id(str(call.get("id") or position))}
            for position, call in enumerate(message["tool_calls"])
        ]
    return message


def _short_id(call_id: str) -> str:
    if len(call_id) == 9 and call_id.isascii() and call_id.isalnum():
        return call_id
    digest = hashlib.sha256(call_id.encode(errors="replace")).digest()
    return "".join(_MISTRAL_ID_CHARS[byte % len(_MISTRAL_ID_CHARS)] for byte in digest[:9])
