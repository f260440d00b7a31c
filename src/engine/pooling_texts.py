"""From texts to a checked `PoolingRequest`: prompts, token ids, lengths. In the caller's thread."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.core.pooling_request import Int32Array, PoolingRequest
from engine.errors import ContextOverflowError, RequestError, nearest_name_hint
from engine.outputs import RequestMetrics
from engine.pooling_facts import PoolingFacts
from engine.prompts import Prompt, check_token_ids
from engine.text.tokenizer import Tokenizer, check_encodable

OVERFLOW_POLICIES = ("error", "truncate")
_PROMPT_NAMES = {"query": ("query",), "document": ("document", "passage", "corpus")}
"""What a caller may always ask for -> what a model may call it, in sentence-transformers' order."""


class PoolingTexts:
    """Makes requests of texts for one model. Thread-safe: it only reads.

    Args:
        facts: The model's.
        tokenizer: None for a model without one; texts are then token ids.
        vocab_size: Ids of the model.
    """

    def __init__(self, facts: PoolingFacts, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self._facts = facts
        self._tokenizer = tokenizer
        self._template = None if tokenizer is None else tokenizer.template()
        self._vocab_size = vocab_size

    def prompt(self, name: str | None, text: str | None) -> str:
        """What is put before each text.

        Args:
            name: Of one of the model's prompts, or "query" or "document", which a model without
                such a prompt answers with its default one.
            text: The prompt itself instead.

        Raises:
            RequestError: Both are given, or the name is unknown.
        """
        prompts = self._facts.prompts
        if text is not None:
            if name is not None:
                msg = f"prompt={text!r} and prompt_name={name!r} were given. Give one of them."
                raise RequestError(msg)
            check_encodable(text, "prompt")
            return text
        if name is None or (name in _PROMPT_NAMES and name not in prompts):
            names = (*_PROMPT_NAMES.get(name or "", ()), self._facts.default_prompt_name)
            return next((prompts[one] for one in names if one is not None and one in prompts), "")
        if name not in prompts:
            hint = nearest_name_hint(str(name), [*prompts, *_PROMPT_NAMES])
            known = ", ".join(map(repr, prompts)) or "none of its own"
            msg = f"prompt_name={name!r} is not known.{hint} The model has {known}."
            raise RequestError(msg)
        return prompts[name]

    def single(
        self, texts: Sequence[Prompt], prompts: Sequence[str], on_overflow: str
    ) -> PoolingRequest:
        """A request of one row a text.

        Args:
            texts: Strings, or token ids that are taken as they are.
            prompts: Put before each of them.
            on_overflow: "error", or "truncate": cut the end off.

        Raises:
            RequestError: A text is malformed or has no tokens.
            ContextOverflowError: A text is too long and may not be cut.
        """
        arrival_s = time.monotonic()
        _check_policy(on_overflow)
        limit = self._facts.max_tokens
        strings = [
            self._worded(one, prompt, f"texts[{index}]")
            for index, (one, prompt) in enumerate(zip(texts, prompts, strict=True))
            if isinstance(one, str)
        ]
        encoded = iter(self._encode(strings))
        rows: list[list[int]] = []
        for index, one in enumerate(texts):
            if isinstance(one, str):
                assert self._template is not None, "encoding has asked for it"
                ids = next(encoded)
                row = self._template.single(ids)
                if len(row) > limit:
                    self._check_may_cut(f"texts[{index}]", len(row), on_overflow)
                    row = self._template.single(ids, limit)
            else:
                row = check_token_ids(one, self._vocab_size).tolist()
                if len(row) > limit:
                    self._check_may_cut(f"texts[{index}]", len(row), on_overflow)
                    row = row[:limit]
            if not row:
                msg = f"texts[{index}] is empty, and this model adds no token of its own to it."
                raise RequestError(msg)
            rows.append(row)
        return _request(rows, None, arrival_s)

    def pairs(
        self, queries: Sequence[str], documents: Sequence[str], on_overflow: str
    ) -> PoolingRequest:
        """A request of one row for each query with its document.

        Raises:
            RequestError: A text is malformed.
            ContextOverflowError: A pair is too long and may not be cut.
        """
        arrival_s = time.monotonic()
        _check_policy(on_overflow)
        limit = self._facts.max_tokens
        distinct = list(dict.fromkeys(queries))
        worded = [self._worded(one, "", f"queries[{at}]") for at, one in enumerate(distinct)]
        worded += [self._worded(one, "", f"documents[{at}]") for at, one in enumerate(documents)]
        encoded = self._encode(worded)
        by_query = dict(zip(distinct, encoded, strict=False))
        assert self._template is not None, "encoding has asked for it"
        rows, second_starts = [], []
        for index, (query, second) in enumerate(
            zip(queries, encoded[len(distinct) :], strict=True)
        ):
            row, start = self._template.pair(by_query[query], second)
            if len(row) > limit:
                self._check_may_cut(f"documents[{index}] with its query", len(row), on_overflow)
                row, start = self._template.pair(by_query[query], second, limit)
            if not row:
                msg = f"documents[{index}] and its query are empty."
                raise RequestError(msg)
            rows.append(row)
            second_starts.append(start)
        return _request(rows, np.array(second_starts, dtype=np.int32), arrival_s)

    def _worded(self, text: Any, prompt: str, name: str) -> str:
        check_encodable(text, name)
        worded: str = prompt + text
        return worded.lower() if self._facts.lower_case else worded

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if self._tokenizer is None:
            msg = "This model has no tokenizer. Give the texts as lists of token ids."
            raise RequestError(msg)
        return self._tokenizer.encode_batch(texts, add_special_tokens=False)

    def _check_may_cut(self, name: str, num_tokens: int, on_overflow: str) -> None:
        limit = self._facts.max_tokens
        if on_overflow == "error":
            msg = (
                f"{name} has {num_tokens} tokens; the model reads {limit}. Split it into shorter "
                "texts, or pass on_overflow='truncate' to have the end of it ignored."
            )
            raise ContextOverflowError(msg)


def text_list(texts: Any, name: str = "texts") -> list[Any]:
    """`texts` as a list of strings and lists of token ids.

    Raises:
        RequestError: It is neither.
    """
    if isinstance(texts, str | bytes) or not isinstance(texts, Sequence | np.ndarray):
        msg = f"{name} must be a list of texts, got {type(texts).__name__}."
        raise RequestError(msg)
    return list(texts)


def _check_policy(on_overflow: str) -> None:
    if on_overflow not in OVERFLOW_POLICIES:
        msg = f"on_overflow={on_overflow!r} must be one of {', '.join(OVERFLOW_POLICIES)}."
        raise RequestError(msg)


def _request(
    rows: list[list[int]], second_starts: Int32Array | None, arrival_s: float
) -> PoolingRequest:
    return PoolingRequest(
        token_ids=np.concatenate([np.array(row, dtype=np.int32) for row in rows]),
        lens=np.array([len(row) for row in rows], dtype=np.int32),
        second_starts=second_starts,
        metrics=RequestMetrics(arrival_s=arrival_s),
    )
