"""The fast path: tiktoken's BPE for byte-level vocabularies, where it is proven equal.

`tokenizers` merges the pair of pieces listed earliest in the merge list; tiktoken merges the pair
whose joined bytes are the token of lowest rank, listed or not. With ranks = token ids both give the
same ids for every piece of text if

1. token ids never fall along the merge list, and
2. the merges turn each token's own spelling into that token, for every token tiktoken knows.

Proof. Let both have reached the same pieces. Say tiktoken merges (c, d) into t. The merges inside
t's span so far are those the merge list makes of t alone, so it takes t alone to (c, d) too; by 2
it goes on to t, so (c, d) is listed, and it is the only pair that ever makes t. The pair the merge
list picks, (a, b) into u, comes no later in the list, so by 1 id(u) <= id(t); tiktoken picked the
lowest, so u = t, hence (a, b) = (c, d), and both take its leftmost place.

Tokens that fail 2 are never the result of merges, so tiktoken is not told of them. If whole pieces
are looked up first (`ignore_merges`), they are results all the same; then it must know them, and
they do no harm if the merges alone leave 3 or more pieces, because then no pair ever joins to them.

Both are checked for every token when a tokenizer is loaded (1.5 µs a token). What the proof does
not cover, cutting text into pieces, is `split_patterns`.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import tiktoken
import tokenizers

from engine.text.added_tokens import AddedTokenInfo, AddedTokenSplitter
from engine.text.byte_alphabet import spelled_bytes
from engine.text.hostile_text import HOSTILE_TEXTS
from engine.text.reference_encoder import ReferenceEncoder
from engine.text.split_patterns import SplitRule, split_rule
from engine.text.token_pieces import TokenPieces, component_state

# The regex engine under tiktoken keeps a stack of 10**6 entries and panics above; the lookahead
# after white space takes one for each character of a run.
_LONG_RUN_CHARS = 500_000
_WHITE_SPACE = re.compile(r"\s+")

_CHARS_PER_THREAD = 32_768
"""A thread costs about 0.1 ms to start, this much text about 3 ms to encode."""

_MAX_THREADS = min(8, os.cpu_count() or 1)
"""More cores belong to the application."""


class NotProvenError(Exception):
    """This tokenizer cannot take the fast path; the message says why."""


class TiktokenEncoder:
    """Encodes with tiktoken what it encodes exactly like the reference, and says where it cannot.

    Thread-safe; tiktoken gives up the GIL while it works.

    Args:
        reference: The tokenizer to be equal to.
        merges: Its merges, in order.
        pieces: Its bytes per token.

    Raises:
        NotProvenError: Equality is not proven for this vocabulary or its settings.
    """

    def __init__(
        self,
        reference: ReferenceEncoder,
        merges: Sequence[tuple[str, str]],
        pieces: TokenPieces,
    ) -> None:
        backend = reference.backend
        self._split = _checked_split(backend)
        self._excluded = re.compile(self._split.excluded) if self._split.excluded else None
        self._normalizer = _checked_normalizer(backend)
        raw, normalized = _checked_added_tokens(reference.added_tokens, self._normalizer)
        self._raw_splitter = AddedTokenSplitter(raw)
        self._normalized_splitter = AddedTokenSplitter(normalized)
        ranks = _checked_ranks(reference, merges, pieces)
        # tiktoken panics on a byte that is no token. The merge list drops such a byte and may then
        # merge across the gap, which tiktoken cannot: texts that hold one go to the reference.
        self._first_filler_id = len(pieces)
        for byte in range(256):
            ranks.setdefault(bytes((byte,)), self._first_filler_id + byte)
        # Its first character occurs once in it, so two occurrences never overlap: a text that ends
        # with the beginning of the mark cannot make one together with a mark behind it.
        self._mark = f"\ue0ff{secrets.randbelow(10**24):024d}"
        self._mark_id = self._first_filler_id + 256
        self._encoding = tiktoken.Encoding(
            "engine",
            pat_str=self._split.pattern,
            mergeable_ranks=ranks,
            special_tokens={self._mark: self._mark_id},
        )
        self._check_against(reference)

    def encode(self, text: str, *, parse_special: bool) -> list[int] | None:
        """Ids of `text`, or None where only the reference is sure to be right.

        Args:
            text: Without lone surrogates.
            parse_special: Turn control tokens written in the text into their ids.
        """
        return self.encode_batch([text], parse_special=parse_special)[0]

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool) -> list[list[int] | None]:
        """`encode` of each text, in a few calls that give up the GIL instead of one per text.

        Long batches are encoded on several threads.
        """
        parts = [self._parts(text, parse_special) for text in texts]
        pieces = [part for one in parts if one is not None for part in one if isinstance(part, str)]
        encoded = iter(self._encode_pieces(pieces))
        return [None if one is None else self._put_together(one, encoded) for one in parts]

    def _parts(self, text: str, parse_special: bool) -> list[str | int] | None:
        """Stretches of text for tiktoken and ids of added tokens; None as in `encode`."""
        if len(text) > _LONG_RUN_CHARS and _has_long_run(text):
            return None
        is_ascii = text.isascii()
        if self._excluded is not None and not is_ascii and self._excluded.search(text):
            return None
        parts: list[str | int] = []
        for part in self._raw_splitter.split(text, parse_special=parse_special):
            if isinstance(part, int):
                parts.append(part)
                continue
            if self._normalizer is not None and not is_ascii:
                part = self._normalizer.normalize_str(part)
            parts.extend(self._normalized_splitter.split(part, parse_special=parse_special))
        return parts

    def _put_together(
        self, parts: list[str | int], encoded: Iterator[list[int]]
    ) -> list[int] | None:
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += next(encoded)
        if ids and max(ids) >= self._first_filler_id:
            return None
        return ids

    def _encode_pieces(self, pieces: list[str]) -> list[list[int]]:
        """Ids of each piece, on as many threads as there is work for."""
        num_chars = sum(map(len, pieces))
        num_threads = min(num_chars // _CHARS_PER_THREAD, len(pieces), _MAX_THREADS)
        if num_threads < 2:
            return self._encode_joined(pieces)
        groups = _equal_groups(pieces, num_threads, num_chars)
        with ThreadPoolExecutor(num_threads, thread_name_prefix="engine-encode") as pool:
            return [ids for group in pool.map(self._encode_joined, groups) for ids in group]

    def _encode_joined(self, pieces: list[str]) -> list[list[int]]:
        """Ids of each piece by one call over all of them.

        tiktoken cuts the text at the marks before it looks at anything else, so no piece sees its
        neighbours.
        """
        joined = self._mark.join(pieces)
        if len(pieces) < 2 or joined.count(self._mark) != len(pieces) - 1:
            return [self._encoding.encode_ordinary(piece) for piece in pieces]
        ids = self._encoding.encode(joined, allowed_special={self._mark}, disallowed_special=())
        found: list[list[int]] = []
        start = 0
        for _ in range(len(pieces) - 1):
            end = ids.index(self._mark_id, start)
            found.append(ids[start:end])
            start = end + 1
        found.append(ids[start:])
        return found

    def _check_against(self, reference: ReferenceEncoder) -> None:
        for text in HOSTILE_TEXTS:
            fast = self.encode(text, parse_special=False)
            if fast is not None and fast != reference.encode(text, parse_special=False):
                msg = f"tiktoken encodes {text!r} differently"
                raise NotProvenError(msg)


def _equal_groups(pieces: list[str], num_groups: int, num_chars: int) -> list[list[str]]:
    """`pieces` in order, cut into at most `num_groups` runs of about the same length."""
    groups: list[list[str]] = [[]]
    so_far = 0
    for piece in pieces:
        if so_far * num_groups >= num_chars * len(groups):
            groups.append([])
        groups[-1].append(piece)
        so_far += len(piece)
    return groups


def _has_long_run(text: str) -> bool:
    runs = _WHITE_SPACE.finditer(text)
    return any(run.end() - run.start() > _LONG_RUN_CHARS for run in runs)


def _checked_split(backend: tokenizers.Tokenizer) -> SplitRule:
    rule = split_rule(component_state(backend.pre_tokenizer))
    if rule is None:
        raise NotProvenError("the pre-tokenizer is not a known byte-level split")
    return rule


def _checked_normalizer(
    backend: tokenizers.Tokenizer,
) -> tokenizers.normalizers.Normalizer | None:
    """The normaliser, if it leaves ASCII alone (then ASCII text can skip it)."""
    match component_state(backend.normalizer):
        case None | {"type": "Sequence", "normalizers": []}:
            return None
        case {"type": "NFC"} | {"type": "Sequence", "normalizers": [{"type": "NFC"}]}:
            normalizer: tokenizers.normalizers.Normalizer = backend.normalizer
            return normalizer
        case state:
            msg = f"the normalizer {state['type']} is not known to leave ASCII alone"
            raise NotProvenError(msg)


def _checked_added_tokens(
    tokens: Sequence[AddedTokenInfo], normalizer: tokenizers.normalizers.Normalizer | None
) -> tuple[list[AddedTokenInfo], list[AddedTokenInfo]]:
    """Added tokens matched in raw text, and those matched in normalised text."""
    for token in tokens:
        if token.lstrip or token.rstrip or token.single_word:
            msg = f"the added token {token.content!r} looks at the text around it"
            raise NotProvenError(msg)
        if normalizer is not None and token.normalized and not token.content.isascii():
            msg = f"the added token {token.content!r} is itself normalized"
            raise NotProvenError(msg)
    raw = [token for token in tokens if not token.normalized]
    return raw, [token for token in tokens if token.normalized]


def _checked_ranks(
    reference: ReferenceEncoder, merges: Sequence[tuple[str, str]], pieces: TokenPieces
) -> dict[bytes, int]:
    """Bytes -> id of the tokens that tiktoken may know, by the two conditions above."""
    model = reference.backend.model
    if not isinstance(model, tokenizers.models.BPE):
        raise NotProvenError("the model is not BPE")
    if model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
        raise NotProvenError("BPE dropout, subword prefixes and word suffixes are not tiktoken's")
    if model.byte_fallback:
        raise NotProvenError("byte fallback is not byte-level BPE")
    vocab = reference.vocab
    last_id = -1
    for left, right in merges:
        token_id = vocab[left + right]
        if token_id < last_id:
            raise NotProvenError("token ids do not grow in merge order")
        last_id = token_id
    added_ids = {token.token_id for token in reference.added_tokens}
    whole_pieces_first = model.ignore_merges
    # Alters the model while nobody else can hold it: an encoder is built before it is shared.
    model.ignore_merges = False
    ranks: dict[bytes, int] = {}
    try:
        for token, token_id in vocab.items():
            is_added = token_id in added_ids
            # Added tokens are matched by their text; only BPE reads it as spelled bytes.
            piece = spelled_bytes(token) if is_added else pieces[token_id]
            if not piece:
                continue
            merged = model.tokenize(token)
            if len(merged) == 1:
                if merged[0].id == token_id:
                    ranks[piece] = token_id
            elif whole_pieces_first and not (is_added and _is_split(reference, piece)):
                if len(merged) < 3:
                    msg = f"the merges stop one short of the token {token!r}"
                    raise NotProvenError(msg)
                ranks[piece] = token_id
    finally:
        model.ignore_merges = whole_pieces_first
    return ranks


def _is_split(reference: ReferenceEncoder, piece: bytes) -> bool:
    """Whether text never reaches BPE as this one piece, because the pre-tokenizer cuts it."""
    text = piece.decode(errors="replace")
    return len(reference.backend.pre_tokenizer.pre_tokenize_str(text)) > 1
