"""Encoding through the `tokenizers` library: the meaning of a tokenizer, and its slow path."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Sequence
from typing import Any

import tokenizers

from engine.text.added_tokens import AddedTokenInfo
from engine.text.token_pieces import component_state


class ReferenceEncoder:
    """A `tokenizers.Tokenizer` in two modes: control tokens parsed, and control tokens as text.

    The mode is a field of the tokenizer object, so switching it would race between threads. Two
    objects are kept instead; they share the model, which is all of the memory.

    Thread-safe.

    Attributes:
        backend: The pipeline as read; control tokens are parsed.
        added_tokens: In id order.
        vocab: The model's own tokens, without those that were only added.
        prefix_ids: What the post-processor puts before a text.
        suffix_ids: What it puts after it.

    Args:
        backend: Owned from here on; padding and truncation are switched off.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = False
        self.backend = backend
        self._as_text = _twin(backend)
        self._as_text.encode_special_tokens = True
        self._continuing: tokenizers.Tokenizer | None = None
        self._lock = threading.Lock()
        self.added_tokens = _added_tokens(backend)
        self.vocab: dict[str, int] = backend.get_vocab(with_added_tokens=False)
        self.prefix_ids, self.suffix_ids = _surrounding_ids(backend)

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Ids of `text` without what the post-processor adds."""
        chosen = self.backend if parse_special else self._as_text
        ids: list[int] = chosen.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool) -> list[list[int]]:
        """`encode` of many texts, on several threads."""
        chosen = self.backend if parse_special else self._as_text
        encodings = chosen.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of `text` as it stands after other text: control tokens are text.

        Differs from `encode` only where a pre-tokenizer marks the first word of the whole text.
        """
        if self._continuing is None:
            with self._lock:
                if self._continuing is None:
                    self._continuing = self._without_first_word_mark()
        ids: list[int] = self._continuing.encode(text, add_special_tokens=False).ids
        return ids

    def _without_first_word_mark(self) -> tokenizers.Tokenizer:
        state = component_state(self.backend.pre_tokenizer)
        if state is None or '"prepend_scheme": "first"' not in json.dumps(state):
            return self._as_text
        whole = json.loads(self.backend.to_str())
        whole["pre_tokenizer"] = _prepending_never(whole["pre_tokenizer"])
        continuing = tokenizers.Tokenizer.from_str(json.dumps(whole))
        continuing.encode_special_tokens = True
        return continuing


def _prepending_never(state: Any) -> Any:
    if isinstance(state, dict):
        changed = {key: _prepending_never(value) for key, value in state.items()}
        if changed.get("prepend_scheme") == "first":
            changed["prepend_scheme"] = "never"
        return changed
    if isinstance(state, list):
        return [_prepending_never(value) for value in state]
    return state


def _twin(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer equal to `backend`, sharing its model where that keeps every token's id."""
    twin = tokenizers.Tokenizer(backend.model)
    for name in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        component = getattr(backend, name)
        if component is not None:
            setattr(twin, name, component)
    added = backend.get_added_tokens_decoder()
    for token_id in sorted(added):
        # `add_tokens` would leave the special flag without effect on `encode_special_tokens`.
        add = twin.add_special_tokens if added[token_id].special else twin.add_tokens
        add([added[token_id]])
    if {token_id: token.content for token_id, token in added.items()} != {
        token_id: token.content for token_id, token in twin.get_added_tokens_decoder().items()
    }:
        return copy.deepcopy(backend)
    return twin


def _added_tokens(backend: tokenizers.Tokenizer) -> tuple[AddedTokenInfo, ...]:
    return tuple(
        AddedTokenInfo(
            token.content,
            token_id,
            special=token.special,
            normalized=token.normalized,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            single_word=token.single_word,
        )
        for token_id, token in sorted(backend.get_added_tokens_decoder().items())
    )


def _surrounding_ids(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """What the post-processor puts before and after one text."""
    inner = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(inner) + 1):
        if inner and whole[start : start + len(inner)] == inner:
            return whole[:start], whole[start + len(inner) :]
    return whole, []
