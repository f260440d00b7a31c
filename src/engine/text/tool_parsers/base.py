"""`ToolParser`: reads tool calls out of an answer while it is being written.

A parser is written as a generator that reads a growing buffer from left to right and waits, by
`yield`, wherever more text is needed to decide. What it finds therefore never depends on how the
text was cut into pieces: a test feeds every recorded answer cut at every byte.

What all parsers keep to:

- Text streams on until it may be the start of a call; nothing is lost.
- White space next to a call belongs to the markup and is dropped. An answer without calls is given
  back character by character.
- A call that cannot be read ends with an error and with the text the model wrote.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from typing import Any, ClassVar

from engine.text.answer_pieces import CallEnd, CallPiece, Piece, TextPiece
from engine.text.call_syntax import CallSyntax

Steps = Generator[None, None, None]
"""A part of a parser; it yields where it waits for more text."""

_SPACE = " \t\r\n"


class BrokenCall(Exception):
    """A call that cannot be read; the message says why. Never leaves this package."""


class ToolParser(ABC):
    """Turns an answer into pieces. One per answer; not thread-safe.

    Args:
        tools: Name -> JSON schema of the arguments of the tools that were offered. Formats without
            a marker of their own take only these names for calls; None takes every name.
    """

    name: ClassVar[str]
    """What `tool_parser=` calls it."""

    syntax: ClassVar[CallSyntax | None] = None
    """How a call is written; None where the arguments are no JSON."""

    markers: ClassVar[tuple[str, ...]] = ()
    """Control tokens the format needs to see: text must come with those in it."""

    def __init__(self, tools: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._tools = tools
        self._buffer = ""
        self._pos = 0
        self._is_final = False
        self._pieces: list[Piece] = []
        self._held_space = ""
        self._has_text = False
        self._num_calls = 0
        self._open_call: int | None = None
        self._call_start = 0
        self._steps = self._parse()

    # ---------------------------------------------------------------- what callers use

    def feed(self, text: str) -> list[Piece]:
        """What `text`, the answer's next part, makes certain."""
        self._buffer += text
        return self._advance()

    def finish(self) -> list[Piece]:
        """The rest, once the answer is complete. Call it once, last."""
        self._is_final = True
        pieces = self._advance()
        if self._held_space and not self._num_calls:
            pieces.append(TextPiece(self._held_space))
        return pieces

    def _advance(self) -> list[Piece]:
        next(self._steps, None)
        pieces, self._pieces = self._pieces, []
        return pieces

    # ---------------------------------------------------------------- what parsers are made of

    @abstractmethod
    def _parse(self) -> Steps:
        """Read the whole answer. Ends when the text is final and read."""

    def _more(self) -> Generator[None, None, bool]:
        """Wait for more text; False when there will be none."""
        if self._is_final:
            return False
        yield
        return True

    def _text_until(self, openers: Sequence[str]) -> Generator[None, None, str | None]:
        """Pass text on up to the next of `openers`, which is returned and not consumed.

        None when the text ended without one.
        """
        pattern = _any_of(tuple(openers))
        while True:
            self._compact()
            match = pattern.search(self._buffer)
            if match is not None:
                self._emit_text(self._buffer[: match.start()])
                self._pos = match.start()
                return match.group()
            num_held = 0 if self._is_final else _num_beginning(self._buffer, openers)
            self._pos = len(self._buffer) - num_held
            self._emit_text(self._buffer[: self._pos])
            if not (yield from self._more()):
                return None

    def _starts_with(self, *texts: str) -> Generator[None, None, str | None]:
        """The one of `texts` that stands here, consumed; None for none of them."""
        while True:
            rest = self._buffer[self._pos : self._pos + max(map(len, texts))]
            for text in texts:
                if rest.startswith(text):
                    self._pos += len(text)
                    return text
            if not any(text.startswith(rest) for text in texts):
                return None
            if not (yield from self._more()):
                return None

    def _find(self, *texts: str) -> Generator[None, None, str | None]:
        """Go to the first of `texts`, which is not consumed; to the end if there is none."""
        pattern = _any_of(texts)
        while True:
            match = pattern.search(self._buffer, self._pos)
            if match is not None:
                self._pos = match.start()
                return match.group()
            if not (yield from self._more()):
                self._pos = len(self._buffer)
                return None

    def _match(self, pattern: re.Pattern[str]) -> Generator[None, None, str]:
        """The longest run that `pattern`, a repeated character class, matches here; consumed."""
        start = self._pos
        while True:
            found = pattern.match(self._buffer, self._pos)
            self._pos = found.end() if found is not None else self._pos
            if self._pos < len(self._buffer) or not (yield from self._more()):
                return self._buffer[start : self._pos]

    def _skip_space(self) -> Generator[None, None, str]:
        """The next character behind white space, not consumed; empty at the end."""
        while True:
            while self._pos < len(self._buffer):
                if self._buffer[self._pos] not in _SPACE:
                    return self._buffer[self._pos]
                self._pos += 1
            if not (yield from self._more()):
                return ""

    def _compact(self) -> None:
        self._buffer = self._buffer[self._pos :]
        self._pos = 0

    # ---------------------------------------------------------------- what parsers put out

    def _emit_text(self, text: str) -> None:
        """Text for the reader. White space waits until it is known what follows."""
        text = self._held_space + text
        if self._num_calls and not self._has_text:
            text = text.lstrip()
        body = text.rstrip()
        self._held_space = text[len(body) :]
        if body:
            self._has_text = True
            self._pieces.append(TextPiece(body))

    def _begin_call(self, name: str) -> None:
        self._open_call = self._num_calls
        self._num_calls += 1
        self._pieces.append(CallPiece(self._open_call, name, ""))

    def _emit_arguments(self, text: str) -> None:
        assert self._open_call is not None, "arguments belong to a call"
        if text:
            self._pieces.append(CallPiece(self._open_call, None, text))

    def _end_call(self, error: str | None = None) -> None:
        """End the open call, or report a broken one that did not get as far as its name."""
        if self._open_call is None:
            self._open_call = self._num_calls
            self._num_calls += 1
        raw = self._buffer[self._call_start : self._pos]
        self._pieces.append(CallEnd(self._open_call, raw, error))
        self._open_call = None

    def _give_up(self, reason: str, closers: Sequence[str]) -> Steps:
        """End a broken call: at the next closer, which is consumed, or at the end of the text."""
        closer = None
        if closers:
            closer = yield from self._find(*closers)
            if closer is None:
                # A quote that never closes has swallowed the closer.
                match = _any_of(tuple(closers)).search(self._buffer, self._call_start)
                if match is not None:
                    self._pos, closer = match.start(), match.group()
        else:
            self._pos = len(self._buffer)
            while (yield from self._more()):
                self._pos = len(self._buffer)
        self._end_call(reason)
        self._pos += len(closer or "")


_PATTERNS: dict[tuple[str, ...], re.Pattern[str]] = {}


def _any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    pattern = _PATTERNS.get(texts)
    if pattern is None:
        longest_first = sorted(texts, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first)))
        if len(_PATTERNS) < 256:
            _PATTERNS[texts] = pattern
    return pattern


def _num_beginning(text: str, openers: Sequence[str]) -> int:
    """Characters at the end of `text` that may be the start of an opener."""
    longest = min(len(text), max(map(len, openers), default=1) - 1)
    for length in range(longest, 0, -1):
        end = text[-length:]
        if any(opener.startswith(end) for opener in openers):
            return length
    return 0
