"""Granite 3: a JSON list behind `<|tool_call|>`, or behind `<tool_call>` spelled as text.

Source: the chat templates of ibm-granite/granite-3.0-8b-instruct and granite-3.1-8b-instruct.
Granite 4 writes as Hermes does.
"""

from __future__ import annotations

from typing import ClassVar

from engine.text.call_syntax import object_syntax
from engine.text.tool_parsers.json_calls import TaggedJsonParser


class GraniteParser(TaggedJsonParser):
    """`<|tool_call|>[{"name": "f", "arguments": {…}}]`."""

    name = "granite"
    markers = ("<|tool_call|>", "<tool_call>")
    syntax = object_syntax("<|tool_call|>", "", is_list=True)
    tags: ClassVar[dict[str, str | None]] = {"<|tool_call|>": None, "<tool_call>": None}
