"""FunctionGemma and Gemma 4: `call:name{key:value}`, strings between marks of their own.

Source: the chat templates and documentation of google/functiongemma-270m-it and google/gemma-4.
Gemma 3 has no format of its own: its documentation asks for one in the prompt.
"""

from __future__ import annotations

import json
import re
from typing import Any

from engine.text.tool_parsers.base import BrokenCall, Steps, ToolParser

_CLOSERS = {"<start_function_call>": "<end_function_call>", "<|tool_call>": "<tool_call|>"}
_QUOTES = {"<start_function_call>": "<escape>", "<|tool_call>": '<|"|>'}
_NAME = re.compile(r"[^\s{}<>]*")
_BARE = re.compile(r"[^,:{}\[\]]*")
_NUMBER = re.compile(r"-?\d+(\.\d*)?([eE][+-]?\d+)?")
_MAX_DEPTH = 64


class GemmaParser(ToolParser):
    """`<start_function_call>call:f{a:<escape>x<escape>,b:1}<end_function_call>`."""

    name = "gemma"
    markers = (*_CLOSERS, *_CLOSERS.values(), *_QUOTES.values())

    def _parse(self) -> Steps:
        while (opener := (yield from self._text_until(tuple(_CLOSERS)))) is not None:
            closer, quote = _CLOSERS[opener], _QUOTES[opener]
            self._call_start = self._pos
            self._pos += len(opener)
            try:
                yield from self._call(closer, quote)
            except BrokenCall as broken:
                yield from self._give_up(str(broken), (closer,))

    def _call(self, closer: str, quote: str) -> Steps:
        yield from self._skip_space()
        if (yield from self._starts_with("call:")) is None:
            raise BrokenCall("the call does not begin with 'call:'")
        name = yield from self._match(_NAME)
        if not name or (yield from self._skip_space()) != "{":
            raise BrokenCall("the call has no name or no arguments")
        self._begin_call(name)
        start = self._pos
        is_quoted = False
        # The closing marker between quotes is text.
        while (found := (yield from self._find(quote, closer))) == quote or is_quoted:
            if found is None:
                raise BrokenCall("the call is cut off")
            is_quoted ^= found == quote
            self._pos += len(found)
        if found is None:
            raise BrokenCall("the call is cut off")
        arguments = _Values(self._buffer[start : self._pos].strip(), quote).whole_object()
        self._emit_arguments(json.dumps(arguments, ensure_ascii=False))
        self._pos += len(closer)
        self._end_call()


class _Values:
    """Reads a complete text of keys and values."""

    def __init__(self, text: str, quote: str) -> None:
        self._text = text
        self._quote = quote
        self._pos = 0

    def whole_object(self) -> dict[str, Any]:
        """All of the text as one object."""
        value = self._object(0)
        if self._pos != len(self._text):
            raise BrokenCall("text follows the arguments")
        return value

    def _value(self, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise BrokenCall("the arguments are nested too deep")
        self._skip_space()
        if self._text.startswith(self._quote, self._pos):
            return self._quoted()
        if self._text.startswith("{", self._pos):
            return self._object(depth)
        if self._text.startswith("[", self._pos):
            return self._list(depth)
        return _bare_value(self._bare())

    def _object(self, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        self._expect("{")
        while not self._takes("}"):
            if values:
                # Small models forget the comma behind a quoted string.
                self._takes(",")
            is_quoted = self._text.startswith(self._quote, self._pos)
            key = self._quoted() if is_quoted else self._bare().strip()
            self._expect(":")
            values[key] = self._value(depth + 1)
        return values

    def _list(self, depth: int) -> list[Any]:
        values: list[Any] = []
        self._expect("[")
        while not self._takes("]"):
            if values:
                self._takes(",")
            values.append(self._value(depth + 1))
        return values

    def _quoted(self) -> str:
        start = self._pos + len(self._quote)
        end = self._text.find(self._quote, start)
        if end < 0:
            raise BrokenCall("a string has no end")
        self._pos = end + len(self._quote)
        return self._text[start:end]

    def _bare(self) -> str:
        match = _BARE.match(self._text, self._pos)
        found = match.group().partition(self._quote)[0] if match is not None else ""
        if not found:
            raise BrokenCall("a key or a value is missing")
        self._pos += len(found)
        return found

    def _skip_space(self) -> None:
        while self._text[self._pos : self._pos + 1].isspace():
            self._pos += 1

    def _takes(self, char: str) -> bool:
        self._skip_space()
        is_there = self._text.startswith(char, self._pos)
        self._pos += is_there
        self._skip_space()
        return is_there

    def _expect(self, char: str) -> None:
        if not self._takes(char):
            msg = f"{char!r} is missing"
            raise BrokenCall(msg)


def _bare_value(text: str) -> Any:
    """A value without quotes: a number, true, false, null, else a string."""
    text = text.strip()
    words = {"true": True, "false": False, "null": None, "None": None}
    if text in words:
        return words[text]
    if _NUMBER.fullmatch(text):
        return int(text) if re.fullmatch(r"-?\d{1,4000}", text) else float(text)
    return text
