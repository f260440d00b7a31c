"""Llama 3.2, Llama 4, Olmo 3, Gemma 3 as prompted: a list of calls in Python's syntax.

Source: Meta's prompt format pages for Llama 3.2 (text) and Llama 4, and Google's page on function
calling with Gemma. Llama 4 puts `<|python_start|>` and `<|python_end|>` around it.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Generator
from typing import Any

from engine.text.tool_parsers.base import BrokenCall, Steps, ToolParser
from engine.text.tool_parsers.json_calls import NotACall

_NAME = re.compile(r"[\w.]*")
_CODE = re.compile(r"[^\"'()\[\]{}\\]+")
_QUOTED = re.compile(r"[^\"'\\]+")
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_IDENTIFIER = re.compile(r"[^\W\d]\w*")
_STRING = re.compile(r"[ru]?(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")", re.DOTALL)
_WORD = re.compile(r"[\w.+\-]+")
_INTEGER = re.compile(r"[+-]?\d{1,4000}")
_NAMES = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_MAX_DEPTH = 64
_PREFIXES = ("<|python_start|>", "```tool_code", "<function_calls>")
_SUFFIXES = ("<|python_end|>", "```", "</function_calls>")


class PythonicParser(ToolParser):
    """`[f(a=1), g(b='x')]`; values are Python literals."""

    name = "pythonic"
    markers = ("<|python_start|>", "<|python_end|>")

    def _parse(self) -> Steps:
        while (opener := (yield from self._text_until((*_PREFIXES, "[")))) is not None:
            start = self._pos
            try:
                if opener != "[":
                    self._pos += len(opener)
                    yield from self._skip_space()
                yield from self._call_list()
            except NotACall:
                self._emit_text(self._buffer[start : start + len(opener)])
                self._pos = start + len(opener)
            except BrokenCall as broken:
                yield from self._give_up(str(broken), _SUFFIXES[:1])
            else:
                end = self._pos
                yield from self._skip_space()
                if opener == "[" or (yield from self._starts_with(*_SUFFIXES)) is None:
                    self._pos = end

    def _call_list(self) -> Steps:
        # A single call in a fence comes without the list.
        is_list = (yield from self._starts_with("[")) is not None
        is_first = True
        while True:
            yield from self._skip_space()
            self._call_start = self._pos
            name = yield from self._match(_NAME)
            is_known = bool(name) and (self._tools is None or name in self._tools)
            if not is_known and is_first:
                raise NotACall
            if (yield from self._starts_with("(")) is None or not name:
                raise NotACall if is_first else BrokenCall("the list of calls is malformed")
            is_first = False
            self._begin_call(name)
            yield from self._arguments(name)
            if not is_list:
                return
            yield from self._skip_space()
            separator = yield from self._starts_with(",", "]")
            if separator is None:
                self._call_start = self._pos
                raise BrokenCall("the list of calls is not closed")
            if separator == "]":
                return

    def _arguments(self, name: str) -> Steps:
        start = self._pos
        closes_at = yield from self._scan_to_close()
        source = self._buffer[start:closes_at]
        try:
            arguments = _Keywords(source).as_json()
        except (ValueError, SyntaxError) as error:
            # The call is whole but unreadable: its neighbours may well be fine.
            self._end_call(f"{name}(…) cannot be read: {error}")
            return
        self._emit_arguments(arguments)
        self._end_call()

    def _scan_to_close(self) -> Generator[None, None, int]:
        """Go behind the bracket that closes the call; returns its place."""
        stack = [")"]
        quote = ""
        while True:
            yield from self._match(_QUOTED if quote else _CODE)
            if self._pos >= len(self._buffer):
                raise BrokenCall("the call is cut off")
            char = self._buffer[self._pos]
            if char == "\\":
                while len(self._buffer) - self._pos < 2:
                    if not (yield from self._more()):
                        self._pos = len(self._buffer)
                        raise BrokenCall("the call is cut off")
                self._pos += 2
                continue
            self._pos += 1
            if quote:
                quote = "" if char == quote else quote
            elif char in "\"'":
                quote = char
            elif char in _CLOSING:
                stack.append(_CLOSING[char])
            elif char != stack.pop():
                msg = f"an unexpected {char!r}"
                raise BrokenCall(msg)
            if not stack:
                return self._pos - 1


class _Keywords:
    """Reads keyword arguments whose values are literals.

    Not Python's own parser: what a model writes may be nested so deep that it breaks the
    interpreter (Python 3.11 loses count of its recursion).
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._pos = 0

    def as_json(self) -> str:
        """The text of a JSON object.

        Raises:
            ValueError: The source is something else.
        """
        values: dict[str, Any] = {}
        while not self._at_end():
            name = self._take(_IDENTIFIER)
            if not name:
                raise ValueError("arguments need names")
            self._expect("=")
            values[name] = self._value(0)
            if not self._at_end():
                self._expect(",")
        return json.dumps(values, ensure_ascii=False, allow_nan=False)

    def _value(self, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError("the arguments are nested too deep")
        if self._takes("["):
            return self._items("]", depth)
        if self._takes("("):
            return self._items(")", depth)
        if self._takes("{"):
            return self._pairs(depth)
        text = self._take(_STRING)
        if text:
            # Models break lines inside of strings, which Python does not allow.
            return ast.literal_eval(text.replace("\n", "\\n"))
        text = self._take(_WORD)
        if text in _NAMES:
            return _NAMES[text]
        if _INTEGER.fullmatch(text):
            return int(text)
        return float(text)

    def _items(self, closer: str, depth: int) -> list[Any]:
        values: list[Any] = []
        while not self._takes(closer):
            values.append(self._value(depth + 1))
            if not self._takes(","):
                self._expect(closer)
                break
        return values

    def _pairs(self, depth: int) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        while not self._takes("}"):
            key = self._value(depth + 1)
            if not isinstance(key, str | int | float):
                raise ValueError("a dict has a key that JSON cannot have")
            self._expect(":")
            values[key] = self._value(depth + 1)
            if not self._takes(","):
                self._expect("}")
                break
        return values

    def _take(self, pattern: re.Pattern[str]) -> str:
        self._skip_space()
        match = pattern.match(self._source, self._pos)
        if match is None:
            return ""
        self._pos = match.end()
        return match.group()

    def _takes(self, text: str) -> bool:
        self._skip_space()
        is_there = self._source.startswith(text, self._pos)
        self._pos += len(text) if is_there else 0
        return is_there

    def _expect(self, text: str) -> None:
        if not self._takes(text):
            msg = f"{text!r} is missing"
            raise ValueError(msg)

    def _at_end(self) -> bool:
        self._skip_space()
        return self._pos >= len(self._source)

    def _skip_space(self) -> None:
        while self._source[self._pos : self._pos + 1].isspace():
            self._pos += 1
