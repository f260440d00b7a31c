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
            arguments = _keywords(source)
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
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


def _keywords(source: str) -> str:
    """Keyword arguments in Python's syntax as the text of a JSON object."""
    call = ast.parse(f"f({source})".replace("\n", " "), mode="eval").body
    if not isinstance(call, ast.Call):
        raise ValueError("it is no call")
    if call.args:
        raise ValueError("arguments need names")
    values: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ValueError("** is not allowed")
        values[keyword.arg] = _literal(keyword.value)
    return json.dumps(values, ensure_ascii=False, allow_nan=False)


def _literal(node: ast.expr) -> Any:
    """The value of a literal; JSON's true, false and null are taken as well."""
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [None if key is None else _literal(key) for key in node.keys]
        if not all(isinstance(key, str | int | float) for key in keys):
            raise ValueError("a dict has a key that JSON cannot have")
        return dict(zip(keys, map(_literal, node.values), strict=True))
    return ast.literal_eval(node)


_JSON_NAMES = {"true": True, "false": False, "null": None}
