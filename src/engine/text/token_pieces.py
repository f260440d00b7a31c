"""The bytes each token stands for, so that ids become text by joining bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import tokenizers

from engine.text.byte_alphabet import spelled_bytes

_SPACE_MARK = "\u2581"


class TokenPieces:
    """Bytes per token id, for decoders that only spell each token and join.

    That is byte-level BPE and everything in the manner of SentencePiece. Where a sequence of byte
    tokens is invalid UTF-8, joined bytes give one U+FFFD per maximal invalid part, as Python and
    byte-level BPE do; the `ByteFallback` decoder gives one per byte of the whole run, valid
    characters included, and could therefore never be streamed.

    Attributes:
        strips_leading_space: Text loses one leading space: the one that encoding put there.
    """

    def __init__(
        self, pieces: list[bytes], special_ids: frozenset[int], *, strips_leading_space: bool
    ) -> None:
        self.strips_leading_space = strips_leading_space
        self._all = pieces
        self._shown = pieces.copy()
        for token_id in special_ids:
            self._shown[token_id] = b""

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, token_id: int) -> bytes:
        return self._all[token_id]

    def join(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> bytes:
        """The bytes of all tokens. Ids the vocabulary lacks (padding rows of a head) are empty."""
        pieces = self._shown if skip_special_tokens else self._all
        try:
            return b"".join([pieces[token_id] for token_id in token_ids])
        except IndexError:
            size = len(pieces)
            return b"".join([pieces[token_id] for token_id in token_ids if token_id < size])


def component_state(component: Any) -> dict[str, Any] | None:
    """A component of a `tokenizers.Tokenizer` as `tokenizer.json` describes it."""
    return None if component is None else json.loads(component.__getstate__())


def build_token_pieces(
    backend: tokenizers.Tokenizer, tokens: Sequence[str | None], special_ids: frozenset[int]
) -> TokenPieces | None:
    """Pieces for a tokenizer whose decoder joins bytes; None for any other decoder.

    Args:
        backend: Gives the decoder and tells added tokens from the vocabulary's own.
        tokens: Token text per id, None for ids that no token has.
        special_ids: Ids that `skip_special_tokens` leaves out.
    """
    decoder = component_state(backend.decoder)
    steps = _flattened(decoder)
    if [step["type"] for step in steps] == ["ByteLevel"]:
        pieces = [b"" if token is None else _byte_level_piece(token) for token in tokens]
        for token_id, added in backend.get_added_tokens_decoder().items():
            pieces[token_id] = added.content.encode()
        return TokenPieces(pieces, special_ids, strips_leading_space=False)
    marked = _sentencepiece_steps(steps)
    if marked is None:
        return None
    byte_fallback, strips = marked
    pieces = [b"" if token is None else _marked_piece(token, byte_fallback) for token in tokens]
    return TokenPieces(pieces, special_ids, strips_leading_space=strips)


def _flattened(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _flattened(inner)]


def _sentencepiece_steps(steps: list[dict[str, Any]]) -> tuple[bool, bool] | None:
    """(Has byte tokens, strips a leading space) of a SentencePiece-like decoder, else None."""
    spells_space = byte_fallback = strips = False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}:
                spells_space = True
            case {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme}:
                spells_space = True
                strips = scheme != "never"
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                strips = True
            case _:
                return None
    return (byte_fallback, strips) if spells_space else None


def _byte_level_piece(token: str) -> bytes:
    piece = spelled_bytes(token)
    return token.encode() if piece is None else piece


def _marked_piece(token: str, byte_fallback: bool) -> bytes:
    if byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass  # Text such as "<0xZZ>".
    return token.replace(_SPACE_MARK, " ").encode()
