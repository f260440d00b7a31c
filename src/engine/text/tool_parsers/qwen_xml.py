"""Qwen3-Coder and Qwen3.5: calls as XML, one element a parameter.

Source: the chat template of Qwen/Qwen3-Coder-30B-A3B-Instruct. Values are bare text, so the tool's
schema says which of them are numbers or JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from engine.text.tool_parsers.base import BrokenCall, Steps, ToolParser

_NAME = re.compile(r"[^>\n]*")


class QwenXmlParser(ToolParser):
    """`<tool_call><function=f><parameter=a>1</parameter></function></tool_call>`."""

    name = "qwen_xml"
    markers = ("<tool_call>", "</tool_call>")

    def _parse(self) -> Steps:
        while (opener := (yield from self._text_until(("<tool_call>", "<function=")))) is not None:
            self._call_start = self._pos
            if opener == "<tool_call>":
                self._pos += len(opener)
            try:
                yield from self._function()
            except BrokenCall as broken:
                yield from self._give_up(str(broken), ("</tool_call>",))

    def _function(self) -> Steps:
        yield from self._skip_space()
        if (yield from self._starts_with("<function=")) is None:
            raise BrokenCall("<function=…> is missing")
        name = yield from self._match(_NAME)
        if not name or (yield from self._starts_with(">")) is None:
            raise BrokenCall("the call names no tool")
        self._begin_call(name)
        properties = ((self._tools or {}).get(name) or {}).get("properties") or {}
        yield from self._parameters(properties)
        yield from self._skip_space()
        yield from self._starts_with("</tool_call>")
        self._end_call()

    def _parameters(self, properties: Mapping[str, Any]) -> Steps:
        before = "{"
        while True:
            yield from self._skip_space()
            tag = yield from self._starts_with("<parameter=", "</function>")
            if tag is None:
                raise BrokenCall("the call is cut off or malformed")
            if tag == "</function>":
                self._emit_arguments("{}" if before == "{" else "}")
                return
            key = yield from self._match(_NAME)
            if (yield from self._starts_with(">")) is None:
                raise BrokenCall("a parameter is malformed")
            start = self._pos
            if (yield from self._find("</parameter>")) is None:
                raise BrokenCall("a parameter has no end")
            value = self._buffer[start : self._pos].removeprefix("\n").removesuffix("\n")
            self._pos += len("</parameter>")
            typed = _typed(value, properties.get(key))
            self._emit_arguments(before + json.dumps(key, ensure_ascii=False) + ": " + typed)
            before = ", "


def _typed(text: str, schema: Any) -> str:
    """A value as JSON text: as it is where the schema wants more than a string and it parses."""
    kind = schema.get("type") if isinstance(schema, Mapping) else "string"
    kinds = kind if isinstance(kind, list) else [kind]
    if kinds != ["string"]:
        try:
            value = json.loads(text)
        except ValueError:
            value = {"True": True, "False": False, "None": None}.get(text.strip(), text)
        if not isinstance(value, str) or "string" not in kinds:
            return json.dumps(value, ensure_ascii=False)
    return json.dumps(text, ensure_ascii=False)
