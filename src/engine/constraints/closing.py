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
        self._ends_text = np.zeros(len(pieces), bool)
        self._ends_text[self._in_text] = True
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
        if matcher.is_accepting():
            return []
        rest = self._end_of(matcher, _mask_of(matcher), max_tokens, old_way, is_thorough=True)
        if rest is not None:
            return rest
        for attempt in range(_NUM_ATTEMPTS):
            way = self._walk(matcher.deep_copy(), max_tokens, old_way, attempt)
            if way is not None:
                return way
        return None

    def _end_of(
        self,
        matcher: LLMatcher,
        mask: npt.NDArray[np.int32],
        max_tokens: int,
        old_way: Sequence[int],
        *,
        is_thorough: bool = False,
    ) -> list[int] | None:
        """The shortest end of `old_way` that completes the answer from here, if one does.

        In free text any token may come next and few lead anywhere, so that only those that end the
        text are tried, unless `is_thorough`.
        """
        if not old_way:
            return None
        way = np.array(old_way, np.int64)
        is_start = _bits(mask, way).astype(bool)
        if not is_thorough and self._is_text(mask):
            is_start &= self._ends_text[way]
        for start in np.flatnonzero(is_start)[::-1].tolist():
            rest = list(old_way[start:])
            if len(rest) > max_tokens:
                return None
            if self.is_way(matcher, rest):
                return rest
        return None

    def _walk(
        self, matcher: LLMatcher, max_tokens: int, old_way: Sequence[int], attempt: int
    ) -> list[int] | None:
        way: list[int] = []
        draw = random.Random(attempt)
        while True:
            if matcher.is_accepting():
                return way
            if len(way) >= max_tokens:
                return None
            steps = matcher.compute_ff_tokens()
            if not steps:
                mask = _mask_of(matcher)
                rest = self._end_of(matcher, mask, max_tokens - len(way), old_way)
                if rest is not None:
                    return way + rest
                token_id = self._choose(mask, attempt, draw)
                if token_id is None:
                    return None
                steps = [token_id]
            steps = steps[: max_tokens - len(way)]
            if not matcher.consume_tokens(steps):
                return None
            way += steps

    def _is_text(self, mask: npt.NDArray[np.int32]) -> bool:
        return len(self._probes) > 0 and bool(_bits(mask, self._probes).all())

    def _choose(self, mask: npt.NDArray[np.int32], attempt: int, draw: random.Random) -> int | None:
        closers = self._in_text if self._is_text(mask) else self._in_structure
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


def _mask_of(matcher: LLMatcher) -> npt.NDArray[np.int32]:
    """The packed mask of what may come next."""
    return np.frombuffer(matcher.compute_bitmask(), np.int32)


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
