"""Token ids to text as they come, and the end of text at a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from engine.errors import RequestError
from engine.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Text of a growing sequence of token ids, in pieces.

    The pieces of all `push` calls and of `flush` together are `tokenizer.decode` of all ids. A
    character whose bytes come in several tokens is held back until it is whole.

    One per sequence; not thread-safe. The cost of a push is that of its ids, not of the sequence.

    Args:
        tokenizer: Of the model that produces the ids.
        skip_special_tokens: Leave control tokens out.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._skip_special_tokens = skip_special_tokens
        self._source: _PieceSource | _DecodedSource
        if tokenizer.pieces is not None:
            self._source = _PieceSource(tokenizer, skip_special_tokens)
        else:
            self._source = _DecodedSource(tokenizer, skip_special_tokens)

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that has become certain with `token_ids`; may be empty.

        Raises:
            RequestError: An id is negative.
        """
        if len(token_ids) and min(token_ids) < 0:
            msg = f"Token id {min(token_ids)} is negative."
            raise RequestError(msg)
        return self._source.push(token_ids)

    def flush(self) -> str:
        """The rest, at the end of the sequence: U+FFFD if it ends inside a character."""
        return self._source.flush()


class _PieceSource:
    """Joins bytes per token."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        assert tokenizer.pieces is not None, "chosen by IncrementalDetokenizer"
        self._pieces = tokenizer.pieces
        self._skip = skip_special_tokens
        self._strip_next = self._pieces.strips_leading_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Sequence[int]) -> str:
        joined = self._pieces.join(token_ids, skip_special_tokens=self._skip)
        return self._stripped(self._decoder.decode(joined))

    def flush(self) -> str:
        return self._stripped(self._decoder.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if self._strip_next and text:
            self._strip_next = False
            return text.removeprefix(" ")
        return text


class _DecodedSource:
    """Compares decodings of everything so far: for decoders that do more than join bytes.

    No model that generates text is known to need this; it costs a decode per push.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._token_ids: list[int] = []
        self._num_emitted_chars = 0

    def push(self, token_ids: Sequence[int]) -> str:
        self._token_ids += token_ids
        # What ends in U+FFFD may still become a character.
        return self._emit(self._decoded().rstrip("\ufffd"))

    def flush(self) -> str:
        return self._emit(self._decoded())

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._token_ids, skip_special_tokens=self._skip)

    def _emit(self, text: str) -> str:
        new = text[self._num_emitted_chars :]
        self._num_emitted_chars += len(new)
        return new


class StopStringMatcher:
    """Cuts a stream of text at the first stop string, and shows no part of one before that.

    The match that ends first wins; of those that end with the same character, the longest. So the
    result does not depend on how the text was cut into pieces, and text is held back only while it
    may still become a stop string.

    One per sequence; not thread-safe. A push costs time linear in the new text, plus the square of
    the longest stop string at worst.

    Attributes:
        matched: The stop string that ended the text; None before that.

    Args:
        stops: Stop strings; may be empty.
        include_stop: Leave the matched stop string at the end of the text.

    Raises:
        RequestError: A stop string is empty.
    """

    def __init__(self, stops: Iterable[str], include_stop: bool = False) -> None:
        # Longest first, so that of several matches with one end the longest is found first.
        self._stops = sorted(set(stops), key=len, reverse=True)
        if "" in self._stops:
            raise RequestError("A stop string is empty. Leave it out to have none.")
        self._include_stop = include_stop
        self._first_chars = {stop[0] for stop in self._stops}
        self._max_held_chars = max(map(len, self._stops), default=1) - 1
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(Text that may be shown, the stop string once one has matched).

        Text after a match is dropped, also that of later pushes.
        """
        if self.matched is not None:
            return "", self.matched
        seen = self._held + text
        matched, end = self._first_match(seen)
        if matched is not None:
            self.matched, self._held = matched, ""
            return seen[: end if self._include_stop else end - len(matched)], matched
        cut = self._start_of_possible_stop(seen)
        self._held = seen[cut:]
        return seen[:cut], None

    def flush(self) -> str:
        """What was held back, at the end of the text: it became no stop string."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, seen: str) -> tuple[str | None, int]:
        matched, end = None, len(seen) + 1
        for stop in self._stops:
            # Only a match that ends earlier than the best so far counts.
            start = seen.find(stop, 0, end - 1)
            if start >= 0:
                matched, end = stop, start + len(stop)
        return matched, end

    def _start_of_possible_stop(self, seen: str) -> int:
        """Where the longest suffix starts that begins a stop string; the end if there is none."""
        first_chars = self._first_chars
        for start in range(max(0, len(seen) - self._max_held_chars), len(seen)):
            if seen[start] in first_chars:
                suffix = seen[start:]
                if any(stop.startswith(suffix) for stop in self._stops):
                    return start
        return len(seen)
