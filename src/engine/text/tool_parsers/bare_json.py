"""Calls as JSON without a marker: what a model writes that was only told how in the prompt."""

from __future__ import annotations

import re
from typing import ClassVar

from engine.text.call_syntax import CallSyntax
from engine.text.tool_parsers.base import BrokenCall, Steps
from engine.text.tool_parsers.json_calls import JsonCallParser, NotACall

_FENCE = "```"
_LANGUAGE = re.compile(r"\w*")


class BareJsonParser(JsonCallParser):
    """A JSON object is a call if its name is an offered tool's and it has arguments.

    Objects, lists of them, and the same in a fenced code block or `<tool_call>` tags. Any other
    JSON stays text.
    """

    name = "json"
    syntax = CallSyntax('{"name": "', '", "arguments": ', "}", between="; ")
    prefixes: ClassVar[tuple[str, ...]] = ("<tool_call>",)
    """What may stand before a call, and is dropped with it."""

    def _parse(self) -> Steps:
        openers = ("{", "[", *self.prefixes, _FENCE)
        while (opener := (yield from self._text_until(openers))) is not None:
            start = self._pos
            if opener not in ("{", "["):
                self._pos += len(opener)
            if opener == _FENCE:
                yield from self._match(_LANGUAGE)
            try:
                yield from self._candidates()
            except NotACall:
                # One character of it is text; what follows is looked at again.
                self._emit_text(self._buffer[start : start + len(opener)])
                self._pos = start + len(opener)
            except BrokenCall as broken:
                yield from self._give_up(str(broken), ())
            else:
                yield from self._leave(opener)

    def _candidates(self) -> Steps:
        """A call, or a list of calls, or several parted by semicolons."""
        char = yield from self._skip_space()
        is_list = char == "["
        if is_list:
            self._pos += 1
            yield from self._skip_space()
        yield from self._call_object(is_candidate=True)
        separators = (",",) if is_list else (";",)
        while True:
            end = self._pos
            yield from self._skip_space()
            if (yield from self._starts_with(*separators)) is None:
                self._pos = end
                break
            try:
                yield from self._call_object(is_candidate=True)
            except NotACall:
                self._pos = end
                break
        if is_list:
            yield from self._skip_space()
            if (yield from self._starts_with("]")) is None:
                self._call_start = self._pos
                raise BrokenCall("the list of calls is not closed")

    def _leave(self, opener: str) -> Steps:
        """Drop the end of the fence or tag that the call stood in."""
        closers = {_FENCE: _FENCE, "<tool_call>": "</tool_call>"}
        closer = closers.get(opener)
        if closer is None:
            return
        end = self._pos
        yield from self._skip_space()
        if (yield from self._starts_with(closer)) is None:
            self._pos = end
