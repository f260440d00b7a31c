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

import re
from collections.abc import Sequence

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
        self._encoding = tiktoken.Encoding(
            "engine", pat_str=self._split.pattern, mergeable_ranks=ranks, special_tokens={}
        )
        self._check_against(reference)

    def encode(self, text: str, *, parse_special: bool) -> list[int] | None:
        """Ids of `text`, or None where only the reference is sure to be right.

        Args:
            text: Without lone surrogates.
            parse_special: Turn control tokens written in the text into their ids.
        """
        if len(text) > _LONG_RUN_CHARS and _has_long_run(text):
            return None
        is_ascii = text.isascii()
        if self._excluded is not None and not is_ascii and self._excluded.search(text):
            return None
        ids: list[int] = []
        for part in self._raw_splitter.split(text, parse_special=parse_special):
            if isinstance(part, int):
                ids.append(part)
                continue
            if self._normalizer is not None and not is_ascii:
                part = self._normalizer.normalize_str(part)
            for piece in self._normalized_splitter.split(part, parse_special=parse_special):
                if isinstance(piece, int):
                    ids.append(piece)
                else:
                    ids += self._encoding.encode_ordinary(piece)
        if ids and max(ids) >= self._first_filler_id:
            return None
        return ids

    def _check_against(self, reference: ReferenceEncoder) -> None:
        for text in HOSTILE_TEXTS:
            fast = self.encode(text, parse_special=False)
            if fast is not None and fast != reference.encode(text, parse_special=False):
                msg = f"tiktoken encodes {text!r} differently"
                raise NotProvenError(msg)


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
