"""`GrammarVocabulary`: a model's tokens as the grammar library sees them."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from engine.errors import ConstraintError
from engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_LONGEST_PIECE = 32
_KEPT_TEXTS = 4096
_LONGEST_KEPT_BYTES = 256
_PLAIN_BYTES = bytes(
    byte for byte in range(256) if byte >= 0x80 or chr(byte).isalnum() or chr(byte) in " .,'-"
)
_PROBES = (re.compile(rb"[a-z]{1,6}"), re.compile(rb" [a-z]{0,5}"))


class GrammarVocabulary:
    """What the matchers of one model share. Immutable; any thread may use it.

    Making one takes 0.1 s for 49,152 tokens and 0.5 s for 152,000, most of it the library's.

    Args:
        tokenizer: Of the model.
        vocab_size: V, width of the logits; ids that the tokenizer lacks are never allowed.
        eos_token_ids: Ids that may end an answer where the constraint is satisfied.

    Attributes:
        tokenizer: The library's object.
        vocab_size: V.
        num_mask_words: int32 words of one packed mask, V / 32 rounded up.
        eos_token_ids: Sorted; not empty.
        pieces: Bytes of each id; empty where the tokenizer has none.
        text_probes: Lists of one id each, words of up to 6 letters, one behind a space. Where both
            may come next an answer is in free text, with room for most tokens. Shorter words cost
            more tokens that are taken back at the end of bounded strings, longer ones more masks.
        is_plain: [V] bool, tokens behind which free text very likely goes on.

    Raises:
        ConstraintError: Tokens of this tokenizer do not stand for fixed bytes, or nothing ends an
            answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        from llguidance import LLTokenizer

        if tokenizer.pieces is None:
            msg = (
                "This model's tokenizer does not spell text token by token, so answers cannot be "
                "constrained. Ask for the format in the prompt and check the answer."
            )
            raise ConstraintError(msg)
        known_eos = sorted({i for i in eos_token_ids if 0 <= i < vocab_size})
        if not known_eos:
            msg = (
                "This model names no end-of-sequence token, so a constrained answer could not end."
            )
            raise ConstraintError(msg)
        self.vocab_size = vocab_size
        self.num_mask_words = -(-vocab_size // 32)
        self.eos_token_ids = known_eos
        pieces = [
            tokenizer.token_bytes(token_id) if token_id < tokenizer.vocab_size else b""
            for token_id in range(vocab_size)
        ]
        self.tokenizer: LLTokenizer = LLTokenizer(
            _LibraryTokenizer(tokenizer, pieces, known_eos[0]),
            n_vocab=vocab_size,
            eos_token=known_eos,
        )
        self.pieces = pieces
        found = [
            max(filter(None, map(pattern.fullmatch, pieces)), key=lambda m: len(m[0]), default=None)
            for pattern in _PROBES
        ]
        special = set(tokenizer.special_token_ids)
        self.is_plain = np.array(
            [
                bool(piece) and not piece.strip(_PLAIN_BYTES) and token_id not in special
                for token_id, piece in enumerate(pieces)
            ]
        )
        self.text_probes = [[pieces.index(match[0])] for match in found if match]

    def allowed_ids(self, mask: np.ndarray) -> np.ndarray:
        """Ids whose bit is set in a packed mask [num_mask_words] int32, rising."""
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        return np.flatnonzero(bits[: self.vocab_size])


class _LibraryTokenizer:
    """The protocol that the library expects of a tokenizer written in Python."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, pieces: list[bytes], eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_id
        self.tokens = pieces
        # The same keys and separators are asked about for every answer, from the engine's thread.
        self._ids_of = functools.lru_cache(maxsize=_KEPT_TEXTS)(self._spell)
        self._ids: dict[bytes, int] = {}
        self.special_token_ids = sorted(
            token_id for token_id in tokenizer.special_token_ids if token_id < len(pieces)
        )

    def __call__(self, text: str | bytes) -> list[int]:
        """Ids of a stretch of an answer, as the model would write it in one go."""
        raw = text if isinstance(text, bytes) else text.encode("utf-8", errors="replace")
        return self._ids_of(raw) if len(raw) <= _LONGEST_KEPT_BYTES else self._spell(raw)

    def _spell(self, raw: bytes) -> list[int]:
        """Ids whose bytes are exactly the text's.

        Tokenizers that mark the first word of a text are asked about the text behind a line break;
        where normalisation changes the text, its characters are looked up.
        """
        plain = raw.decode("utf-8", errors="replace")
        for before in ("", "\n"):
            start = self._encode(before)
            ids = self._encode(before + plain)
            rest = ids[len(start) :]
            if ids[: len(start)] == start and b"".join(self.tokens[i] for i in rest) == raw:
                return rest
        return self._longest_matches(raw)

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode_text_part(text, is_first=False) if text else []
        return [token_id for token_id in ids if token_id < len(self.tokens)]

    def _longest_matches(self, raw: bytes) -> list[int]:
        if not self._ids:
            special = set(self.special_token_ids)
            self._ids = {
                piece: token_id
                for token_id, piece in enumerate(self.tokens)
                if piece and token_id not in special
            }
        ids: list[int] = []
        start = 0
        while start < len(raw):
            ends = range(min(len(raw), start + _LONGEST_PIECE), start, -1)
            end = next((end for end in ends if raw[start:end] in self._ids), None)
            if end is None:
                break
            ids.append(self._ids[raw[start:end]])
            start = end
        return ids
