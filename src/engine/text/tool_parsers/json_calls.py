"""Calls written as JSON: `{"name": …, "arguments": {…}}`, one or a list of them."""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from typing import Any, ClassVar

from engine.text.tool_parsers.base import BrokenCall, Steps, ToolParser

# What JSON may hold outside of strings, brackets and quotes apart.
_PLAIN = re.compile(r"[\s0-9A-Za-z_.,:+\-]*")
_STRING_BODY = re.compile(r'[^"\\]*')
_SCALAR = re.compile(r"[0-9A-Za-z_.+\-]*")
_CLOSING = {"{": "}", "[": "]"}


class NotACall(Exception):
    """What looked like a call is text. Only raised while nothing has been put out."""


class JsonCallParser(ToolParser):
    """Reads calls that are JSON objects; subclasses say where such an object stands."""

    argument_keys: ClassVar[tuple[str, ...]] = ("arguments", "parameters")
    """Keys under which the arguments may come."""

    def _call_objects(self) -> Steps:
        """One call object, or a list of them, at this place.

        Raises:
            BrokenCall: It is neither.
        """
        if (yield from self._skip_space()) != "[":
            yield from self._call_object()
            return
        self._pos += 1
        char = yield from self._skip_space()
        while char != "]":
            yield from self._call_object()
            char = yield from self._skip_space()
            if char == ",":
                self._pos += 1
                char = yield from self._skip_space()
            elif char != "]":
                self._call_start = self._pos
                raise BrokenCall("the list of calls is not closed")
        self._pos += 1

    def _call_object(self, *, is_candidate: bool = False) -> Steps:
        """A JSON object with a name and arguments, put out while it is read.

        Args:
            is_candidate: It may be something else: then only a known tool's name makes it a call.

        Raises:
            BrokenCall: It is a call, but not a whole one.
            NotACall: A candidate is something else.
        """
        failure = NotACall if is_candidate else BrokenCall
        fields = _Fields()
        char = yield from self._skip_space()
        self._call_start = self._pos
        if char != "{":
            raise failure("the call is no JSON object")
        self._pos += 1
        depth = 1
        char = yield from self._skip_space()
        while True:
            if char == "}":
                self._pos += 1
                depth -= 1
                if depth == 0:
                    break
                char = yield from self._skip_space()
            elif char == ",":
                self._pos += 1
                char = yield from self._skip_space()
            if char in ("}", ","):
                continue
            if char != '"':
                raise self._failed(is_candidate, "the call's JSON is malformed or cut off")
            key = yield from self._key(is_candidate)
            # The whole call in another object, as the OpenAI API writes it.
            if key == "function" and self._buffer[self._pos : self._pos + 1] == "{":
                self._pos += 1
                depth += 1
            else:
                yield from self._field(key, fields, is_candidate)
            char = yield from self._skip_space()
        if fields.name is None:
            raise failure("the call names no tool")
        if not fields.has_arguments:
            if is_candidate and self._open_call is None:
                raise NotACall
            self._emit_arguments("{}")
        self._end_call()

    def _key(self, is_candidate: bool) -> Generator[None, None, str]:
        start = self._pos
        yield from self._scan_string(is_candidate)
        key = str(self._value_from(start, is_candidate))
        known = ("name", "id", "type", "function", *self.argument_keys)
        if is_candidate and self._open_call is None and key not in known:
            raise NotACall
        if (yield from self._skip_space()) != ":":
            raise self._failed(is_candidate, "a key of the call has no value")
        self._pos += 1
        yield from self._skip_space()
        return key

    def _field(self, key: str, fields: _Fields, is_candidate: bool) -> Steps:
        start = self._pos
        if key == "name" and fields.name is None:
            yield from self._scan_value(is_candidate)
            name = self._value_from(start, is_candidate)
            if not isinstance(name, str) or not name:
                raise self._failed(is_candidate, "the tool's name is no string")
            if is_candidate and self._tools is not None and name not in self._tools:
                raise NotACall
            fields.name = name
            if not is_candidate or fields.has_arguments:
                self._begin_call(name)
                self._emit_arguments(fields.early_arguments)
        elif key in self.argument_keys and not fields.has_arguments:
            fields.has_arguments = True
            if fields.name is not None:
                if self._open_call is None:
                    self._begin_call(fields.name)
                yield from self._stream_arguments()
            else:
                yield from self._scan_value(is_candidate)
                try:
                    fields.early_arguments = checked_arguments(self._buffer[start : self._pos])
                except BrokenCall as broken:
                    raise self._failed(is_candidate, str(broken)) from None
        else:
            yield from self._scan_value(is_candidate)

    def _stream_arguments(self) -> Steps:
        """Put the arguments out as they come, and check them at their end."""
        start = sent = self._pos
        if (yield from self._skip_space()) != "{":
            yield from self._scan_value(False)
            self._emit_arguments(checked_arguments(self._buffer[start : self._pos]))
            return
        start = sent = self._pos
        try:
            for _ in self._scan_value(False):
                self._emit_arguments(self._buffer[sent : self._pos])
                sent = self._pos
                yield
        finally:
            # Also of arguments that break off: what there is of them is not lost.
            self._emit_arguments(self._buffer[sent : self._pos])
        checked_arguments(self._buffer[start : self._pos])

    # ---------------------------------------------------------------- JSON's structure

    def _scan_value(self, is_candidate: bool) -> Steps:
        """Go behind the JSON value at this place. Strings and brackets are followed, no more."""
        stack: list[str] = []
        while True:
            char = yield from self._skip_space()
            if char in _CLOSING and char:
                self._pos += 1
                stack.append(_CLOSING[char])
            elif char == '"':
                yield from self._scan_string(is_candidate)
            elif char in ("}", "]") and stack:
                if char != stack.pop():
                    raise self._failed(is_candidate, f"an unexpected {char!r}")
                self._pos += 1
            elif not stack:
                if not (yield from self._match(_SCALAR)):
                    raise self._failed(is_candidate, "a value is missing or cut off")
            elif not (yield from self._match(_PLAIN)):
                reason = "the call is cut off" if not char else f"an unexpected {char!r}"
                raise self._failed(is_candidate, reason)
            if not stack:
                return

    def _scan_string(self, is_candidate: bool) -> Steps:
        """Go behind the JSON string that begins at this place."""
        self._pos += 1
        while True:
            yield from self._match(_STRING_BODY)
            while len(self._buffer) - self._pos < 2 and not self._buffer.startswith('"', self._pos):
                if not (yield from self._more()):
                    self._pos = len(self._buffer)
                    raise self._failed(is_candidate, "the call is cut off inside a string")
            if self._buffer[self._pos] == '"':
                self._pos += 1
                return
            self._pos += 2

    def _value_from(self, start: int, is_candidate: bool) -> Any:
        """What stands between `start` and this place, as a value."""
        try:
            return _parsed(self._buffer[start : self._pos])
        except BrokenCall as broken:
            raise self._failed(is_candidate, str(broken)) from None

    def _failed(self, is_candidate: bool, reason: str) -> Exception:
        if is_candidate and self._open_call is None:
            return NotACall(reason)
        return BrokenCall(reason)


class _Fields:
    """What has been read of one call object."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.has_arguments = False
        self.early_arguments = ""


class TaggedJsonParser(JsonCallParser):
    """Calls as JSON behind a marker, with or without another marker at their end."""

    tags: ClassVar[dict[str, str | None]]
    """Opening marker -> closing one, None where the JSON's own end is the end."""

    def _parse(self) -> Steps:
        while (opener := (yield from self._text_until(tuple(self.tags)))) is not None:
            closer = self.tags[opener]
            self._call_start = self._pos
            self._pos += len(opener)
            try:
                yield from self._call_objects()
                if closer is not None:
                    yield from self._close(closer)
            except BrokenCall as broken:
                yield from self._give_up(str(broken), [closer] if closer else [])

    def _close(self, closer: str) -> Steps:
        """The closing marker, and what may stand before it: more calls. It may be missing."""
        end = self._pos
        while (yield from self._skip_space()) == "{":
            yield from self._call_object()
            end = self._pos
        if (yield from self._starts_with(closer)) is None:
            self._pos = end


def checked_arguments(text: str) -> str:
    """Arguments as the text of a JSON object.

    Models also write null for none, and an object that is packed into a string.

    Raises:
        BrokenCall: They are something else.
    """
    value = _parsed(text)
    if isinstance(value, str):
        text, value = value, _parsed(value)
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        msg = f"the arguments are {type(value).__name__}, not a JSON object"
        raise BrokenCall(msg)
    return text.strip()


def object_error(text: str) -> str | None:
    """What is wrong with arguments that were put out as they came; None if they are an object."""
    try:
        value = _parsed(text)
    except BrokenCall as broken:
        return str(broken)
    return None if isinstance(value, dict) else "the arguments are no JSON object"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, strict=False, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        msg = f"malformed JSON: {error}"
        raise BrokenCall(msg) from error


def _refuse_constant(name: str) -> Any:
    msg = f"{name} is not JSON"
    raise ValueError(msg)
