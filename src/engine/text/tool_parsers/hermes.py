"""Hermes 2 Pro, Qwen2.5, Qwen3, Granite 4, SmolLM3: JSON between `<tool_call>` tags.

Source: the chat templates of NousResearch/Hermes-2-Pro-Llama-3-8B, Qwen/Qwen3-32B and
ibm-granite/granite-4.0-h-tiny. Granite 4 also writes the arguments as JSON in a string.
"""

from __future__ import annotations

from typing import ClassVar

from engine.text.call_syntax import object_syntax
from engine.text.tool_parsers.json_calls import TaggedJsonParser


class HermesParser(TaggedJsonParser):
    """`<tool_call>{"name": "f", "arguments": {…}}</tool_call>`, one pair of tags a call."""

    name = "hermes"
    markers = ("<tool_call>", "</tool_call>")
    syntax = object_syntax("<tool_call>\n", "\n</tool_call>", is_list=False)
    tags: ClassVar[dict[str, str | None]] = {"<tool_call>": "</tool_call>"}
