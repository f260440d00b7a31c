"""`ClosingSearch`: a short way from where an answer is to where its constraint is satisfied.

The way is a witness: as long as an answer has one that is no longer than the tokens it may still
have, it can be completed. It need not be the shortest there is. Ways are looked for greedily, one
token at a time: what is forced, else the token that closes most of a JSON document, else any.
Where that leads nowhere, other choices are tried.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from engine.constraints.vocabulary import GrammarVocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

_LITERALS = (b"null", b"true", b"false")
_TEXT_PROBES = (b"q", b"z")
"""Where both may come next, the answer is inside free text."""
_NUM_SUFFIXES = 4
_NUM_ATTEMPTS = 4
_NOT_A_CLOSER = 99


class ClosingSearch:
    """Finds ways to complete an answer. Immutable; any thread may use it.

    Args:
        vocabulary: Of the model.
    """

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self._vocabulary = vocabulary
        pieces = vocabulary.pieces
        self._eos_token_id = vocabulary.eos_token_ids[0]
        self._in_text = _ordered(pieces, _rank_in_text)
        self._in_structure = _ordered(pieces, _rank_in_structure)
        by_piece = {piece: token_id for token_id, piece in enumerate(pieces) if len(piece) == 1}
        self._probes = np.array(
            [by_piece[piece] for piece in _TEXT_PROBES if piece in by_piece], np.int64
        )

    def is_way(self, matcher: LLMatcher, token_ids: Sequence[int]) -> bool:
        """Whether `token_ids` complete the answer from where `matcher` is, which stays there."""
        if not token_ids:
            return bool(matcher.is_accepting())
        way = [*token_ids, self._eos_token_id]
        return bool(matcher.validate_tokens(way) == len(way))

    def find(
        self, matcher: LLMatcher, max_tokens: int, old_way: Sequence[int] = ()
    ) -> list[int] | None:
        """A way of at most `max_tokens` tokens, or None where none was found.

        Args:
            matcher: Where the answer is; not changed.
            max_tokens: >= 0.
            old_way: What completed the answer one token ago: its last part probably still does.
        """
        for start in range(min(_NUM_SUFFIXES, len(old_way)) + 1):
            rest = list(old_way[start:])
            if len(rest) <= max_tokens and self.is_way(matcher, rest):
                return rest
        for attempt in range(_NUM_ATTEMPTS):
            way = self._walk(matcher.deep_copy(), max_tokens, old_way, attempt)
            if way is not None:
                return way
        return None

    def _walk(
        self, matcher: LLMatcher, max_tokens: int, old_way: Sequence[int], attempt: int
    ) -> list[int] | None:
        way: list[int] = []
        draw = random.Random(attempt)
        while True:
            if matcher.is_accepting():
                return way
            for start in range(min(_NUM_SUFFIXES, len(old_way))):
                rest = list(old_way[start:])
                if len(way) + len(rest) <= max_tokens and self.is_way(matcher, rest):
                    return way + rest
            if len(way) >= max_tokens:
                return None
            steps = matcher.compute_ff_tokens()
            if not steps:
                token_id = self._choose(matcher, attempt, draw)
                if token_id is None:
                    return None
                steps = [token_id]
            steps = steps[: max_tokens - len(way)]
            if not matcher.consume_tokens(steps):
                return None
            way += steps

    def _choose(self, matcher: LLMatcher, attempt: int, draw: random.Random) -> int | None:
        mask = np.frombuffer(matcher.compute_bitmask(), np.int32)
        is_text = len(self._probes) > 0 and bool(_bits(mask, self._probes).all())
        closers = self._in_text if is_text else self._in_structure
        # The last attempts follow chance half of the time: closing may be what leads nowhere.
        if attempt < 2 or draw.random() < 0.5:
            is_allowed = _bits(mask, closers)
            if is_allowed.any():
                return int(closers[int(is_allowed.argmax())])
        allowed = self._vocabulary.allowed_ids(mask)
        if not len(allowed):
            return None
        if attempt > 0:
            return int(allowed[draw.randrange(len(allowed))])
        # The longest: where a number of characters is asked for, that takes the fewest tokens.
        sample = allowed[:: max(1, len(allowed) // 256)].tolist()
        return int(max(sample, key=lambda token_id: len(self._vocabulary.pieces[token_id])))


def _bits(mask: npt.NDArray[np.int32], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """1 for each of `ids` that the packed mask allows."""
    bits: npt.NDArray[np.int32] = (mask[ids >> 5] >> (ids & 31).astype(np.int32)) & 1
    return bits


def _ordered(pieces: Sequence[bytes], rank: object) -> npt.NDArray[np.int64]:
    assert callable(rank)
    ranked = [
        (place, -len(piece), token_id)
        for token_id, piece in enumerate(pieces)
        if 0 < len(piece) <= 8 and (place := rank(piece)) < _NOT_A_CLOSER
    ]
    return np.array([token_id for _, _, token_id in sorted(ranked)], np.int64)


def _rank_in_text(piece: bytes) -> int:
    """Inside a string: its end, with as many brackets as possible."""
    is_end = piece[:1] == b'"' and not piece[1:].strip(b"}]")
    return 0 if is_end else _NOT_A_CLOSER


def _rank_in_structure(piece: bytes) -> int:
    """Between values: brackets that close, then the shortest values, then what goes on."""
    if not piece.strip(b"}]"):
        return 0
    value = piece.removeprefix(b" ")
    body = value.rstrip(b"}]")
    if value in (b"[]", b"{}") or (body == b'""'):
        return 1
    if len(value) == 1 and value.isdigit():
        return 2
    if value in _LITERALS:
        return 3
    if value == b'"':
        return 4
    if value in (b"[", b"{", b'["', b'{"'):
        return 5
    if value in (b":", b",", b'":', b'",') or not piece.strip():
        return 6
    return _NOT_A_CLOSER
