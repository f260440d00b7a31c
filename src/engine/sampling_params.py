"""`SamplingParams`: how one request's tokens are chosen and when it ends."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from engine.constraints.spec import (
    CONSTRAINT_FIELDS,
    JSON_WHITESPACE,
    ConstraintSpec,
    check_one_constraint,
    checked_choice,
    checked_json_schema,
    checked_text,
)
from engine.errors import RequestError, nearest_name_hint

MAX_LOGPROBS = 1024
"""Most alternatives `logprobs` and `prompt_logprobs` may ask for; bounds the copy to the host."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Options of one request. Frozen: derive another one with `replace`.

    Every field is honoured or the constructor raises `RequestError`; `None` always means "off".

    Attributes:
        n: Answers to sample for the prompt, >= 1. They share the prompt's KV blocks.
        temperature: 0 is greedy; > 0 divides the logits. Default 1.0, the model's own distribution.
        top_p: Keep the smallest set of tokens whose probability reaches this, in (0, 1].
        top_k: Keep the k likeliest tokens; 0 or -1 keeps all.
        min_p: Drop tokens less likely than this fraction of the likeliest, in [0, 1].
        seed: Makes the draws a function of (seed, answer index, position) alone, whatever else
            runs beside the request. `None` draws a fresh seed for each request.
        stop: A string or strings that end the answer; matched on text, across token boundaries.
        stop_token_ids: Token ids that end the answer, beside the model's own end-of-sequence ids.
        include_stop_str_in_output: Keep the matched stop string (or stop token) in the answer.
        ignore_eos: Do not end at the model's end-of-sequence ids.
        max_tokens: New tokens at most, >= 1. `None`: as many as the context holds. Default 16,
            as in vLLM, whose snippets should behave the same here.
        min_tokens: New tokens before the end-of-sequence and stop ids may be sampled, >= 0.
        presence_penalty: Subtracted from the logit of each token already in the answer, [-2, 2].
        frequency_penalty: The same, times the number of its occurrences, [-2, 2].
        repetition_penalty: > 1 makes tokens of prompt and answer less likely (CTRL, Keskar et al.
            2019: positive logits divided by it, negative ones multiplied), > 0.
        logit_bias: Token id -> number added to its logit.
        bad_words: Strings the answer must not contain; the last token of each is never sampled
            where it would complete the string.
        logprobs: Report the sampled token's log probability and those of this many likeliest
            tokens, 0 to `MAX_LOGPROBS`. Raw model probabilities, before any of the above.
        prompt_logprobs: The same for each prompt token. Switches prefix-cache reads off for the
            request, because cached tokens have no logits.
        skip_special_tokens: Leave control tokens out of the text.
        json_schema: JSON schema the answer must fit: a dict, or JSON text, as which it is kept.
            At most one of this and the next three may be set. Whether it can be enforced is found
            out at submit; how near `max_tokens` an answer is completed says docs/CONSTRAINTS.md.
        regex: Regular expression the whole answer must match, in the syntax of Rust's regex crate:
            no look-around, no back-references.
        choice: Strings of which the answer is one.
        grammar: Grammar of the answer: Lark as llguidance reads it, or EBNF with `root ::= …` as
            llama.cpp does. Lark may contain `%json {schema}`, `/regex/` and control tokens, which
            stand for the token itself: `start: <|tool_call|> %json {"type": "object"}`. Free text
            up to an opener is a lazy rule; docs/CONSTRAINTS.md shows tool calls.
        json_whitespace: Between the values of an answer with a `json_schema`. "spaced", the
            default: one space after each comma and colon, as `json.dumps` writes; "compact": none;
            "flexible": as the model likes, at most 20 characters at a place. Small models fill an
            answer with white space where they may, so it is not the default.

    Raises:
        RequestError: A value has the wrong type or is out of range; the message names both.
        ConstraintError: Two constraints are set, or one is malformed.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_whitespace: str = "spaced"

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1, 128)
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_float("top_p", self.top_p, 0.0, 1.0, low_is_open=True)
        _check_int("top_k", self.top_k, -1, None)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_is_open=True)
        _check_int("min_tokens", self.min_tokens, 0, None)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, None)
            if self.min_tokens > self.max_tokens:
                msg = (
                    f"min_tokens={self.min_tokens} is larger than max_tokens={self.max_tokens}. "
                    "Raise max_tokens or lower min_tokens."
                )
                raise RequestError(msg)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**64 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check_int(name, value, 0, MAX_LOGPROBS)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                msg = f"{name}={getattr(self, name)!r} must be True or False."
                raise RequestError(msg)
        self._freeze("stop", _strings("stop", self.stop))
        self._freeze("bad_words", _strings("bad_words", self.bad_words))
        self._freeze("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        self._freeze("logit_bias", _logit_bias(self.logit_bias))
        self._check_constraint()

    def _check_constraint(self) -> None:
        if self.json_whitespace not in JSON_WHITESPACE:
            msg = f"json_whitespace={self.json_whitespace!r} must be one of {JSON_WHITESPACE}."
            raise RequestError(msg)
        fields = {name: getattr(self, name) for name in CONSTRAINT_FIELDS}
        check_one_constraint(fields)
        if self.json_schema is not None:
            self._freeze("json_schema", checked_json_schema(self.json_schema))
        if self.choice is not None:
            self._freeze("choice", checked_choice(self.choice))
        for name in ("regex", "grammar"):
            if fields[name] is not None:
                self._freeze(name, checked_text(name, fields[name]))

    def _freeze(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        return hash(tuple(repr(getattr(self, f.name)) for f in dataclasses.fields(self)))

    @property
    def is_greedy(self) -> bool:
        """True where the likeliest token is always taken (temperature 0)."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """True where presence, frequency or repetition penalty changes the logits."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    @property
    def constraint(self) -> ConstraintSpec | None:
        """The one constraint that is set, if any."""
        for kind in CONSTRAINT_FIELDS:
            value = getattr(self, kind)
            if value is not None:
                source = json.dumps(value) if kind == "choice" else value
                return ConstraintSpec(kind, source, self.json_whitespace)
        return None

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Names of all options, in declaration order."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_kwargs(cls, **options: Any) -> SamplingParams:
        """Build from a dict of options.

        Raises:
            RequestError: A name is unknown (the nearest valid one is suggested) or a value is bad.
        """
        for name in options:
            if name not in cls.field_names():
                hint = nearest_name_hint(name, cls.field_names())
                msg = f"Unknown sampling parameter {name!r}.{hint}"
                raise RequestError(msg)
        return cls(**options)

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with `changes` applied and checked."""
        values = {name: getattr(self, name) for name in self.field_names()}
        return self.from_kwargs(**{**values, **changes})


def _check_int(name: str, value: Any, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        msg = f"{name}={value!r} must be an integer."
        raise RequestError(msg)
    if value < low or (high is not None and value > high):
        limit = f">= {low}" if high is None else f"in [{low}, {high}]"
        msg = f"{name}={value} must be {limit}."
        raise RequestError(msg)


def _check_float(
    name: str, value: Any, low: float, high: float, *, low_is_open: bool = False
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        msg = f"{name}={value!r} must be a number."
        raise RequestError(msg)
    inside = low < value <= high if low_is_open else low <= value <= high
    if not math.isfinite(value) or not inside:
        bracket = "(" if low_is_open else "["
        msg = f"{name}={value} must be in {bracket}{low}, {high}]."
        raise RequestError(msg)


def _strings(name: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    values = (value,) if isinstance(value, str) else tuple(value)
    for item in values:
        if not isinstance(item, str) or not item:
            msg = f"{name} must hold non-empty strings, got {item!r}."
            raise RequestError(msg)
    return values or None


def _token_ids(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    values = (value,) if isinstance(value, int) else tuple(value)
    for item in values:
        _check_int(name, item, 0, 2**31 - 1)
    return values or None


def _logit_bias(value: Any) -> Mapping[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        msg = f"logit_bias={value!r} must map token ids to numbers."
        raise RequestError(msg)
    checked: dict[int, float] = {}
    for key, bias in value.items():
        token_id = int(key) if isinstance(key, str) and key.isdigit() else key
        _check_int("logit_bias token id", token_id, 0, 2**31 - 1)
        if isinstance(bias, bool) or not isinstance(bias, int | float) or math.isnan(bias):
            msg = f"logit_bias[{key!r}]={bias!r} must be a number."
            raise RequestError(msg)
        checked[token_id] = float(bias)
    return checked or None
