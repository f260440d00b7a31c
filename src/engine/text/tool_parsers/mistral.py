"""Mistral: `[TOOL_CALLS]` and a JSON list, or since tokenizer v11 the name and its arguments.

Source: mistral-common's instruct tokenizers v3, v11 and v13 and the chat templates of
mistralai/Mistral-7B-Instruct-v0.3 and Mistral-Small-3.2-24B-Instruct-2506.
"""

from __future__ import annotations

import re

from engine.text.call_syntax import object_syntax
from engine.text.tool_parsers.base import BrokenCall, Steps
from engine.text.tool_parsers.json_calls import JsonCallParser

_OPENER = "[TOOL_CALLS]"
_NAME = re.compile(r"[\w.\-]*")


class MistralParser(JsonCallParser):
    """`[TOOL_CALLS][{"name": "f", "arguments": {…}}]` or `[TOOL_CALLS]f{…}`."""

    name = "mistral"
    syntax = object_syntax(_OPENER, "", is_list=True)
    markers = (_OPENER, "[ARGS]", "[CALL_ID]")

    def _parse(self) -> Steps:
        while (yield from self._text_until((_OPENER,))) is not None:
            self._call_start = self._pos
            self._pos += len(_OPENER)
            try:
                char = yield from self._skip_space()
                if char in ("[", "{"):
                    yield from self._call_objects()
                else:
                    yield from self._named_call()
            except BrokenCall as broken:
                yield from self._to_next_call(str(broken))

    def _named_call(self) -> Steps:
        name = yield from self._match(_NAME)
        if not name:
            raise BrokenCall("the call names no tool")
        if (yield from self._starts_with("[CALL_ID]")) is not None:
            yield from self._match(_NAME)
        yield from self._starts_with("[ARGS]")
        if (yield from self._skip_space()) != "{":
            raise BrokenCall("the call has no arguments")
        self._begin_call(name)
        yield from self._stream_arguments()
        self._end_call()

    def _to_next_call(self, reason: str) -> Steps:
        """End a broken call before the next marker, which is left to begin another call."""
        yield from self._find(_OPENER)
        self._end_call(reason)
