"""Phi-4-mini: a JSON list between `<|tool_call|>` tags, or behind the word `functools`.

Source: the chat template of microsoft/Phi-4-mini-instruct (tags), and its model card and
cookbook, whose prompt asks for `functools[…]`.
"""

from __future__ import annotations

from typing import ClassVar

from engine.text.call_syntax import object_syntax
from engine.text.tool_parsers.base import Steps
from engine.text.tool_parsers.json_calls import TaggedJsonParser


class Phi4Parser(TaggedJsonParser):
    """`<|tool_call|>[{"name": "f", "arguments": {…}}]<|/tool_call|>`."""

    name = "phi4"
    markers = ("<|tool_call|>", "<|/tool_call|>")
    syntax = object_syntax("<|tool_call|>", "<|/tool_call|>", is_list=True)
    tags: ClassVar[dict[str, str | None]] = {"<|tool_call|>": "<|/tool_call|>", "functools[": None}

    def _call_objects(self) -> Steps:
        # The bracket is part of the word, so that a sentence about functools stays text.
        if self._buffer[self._pos - 1 : self._pos] == "[":
            self._pos -= 1
        yield from super()._call_objects()
