"""The engine's sampling options as connector fields, and call keywords turned into them.

`engine.SamplingParams` declares every option once, with its range and default. Here they become
pydantic fields (so that frameworks can bind, configure, copy and print them) whose defaults are
read from there; a test holds the two lists together. Two things differ on purpose:

- `max_tokens` is 512: a chat answer cut after vLLM's 16 tokens helps nobody.
- `logprobs` also takes `True`, with `top_logprobs` beside it, as in the OpenAI API.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel

from engine import RequestError, SamplingParams, nearest_name_hint

T = TypeVar("T")

DEFAULT_MAX_TOKENS = 512

ALIASES: dict[str, str] = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "stop_sequences": "stop",
}
"""Other libraries' names for our options, accepted wherever the option is."""

SAMPLING_NAMES: tuple[str, ...] = (*SamplingParams.field_names(), "top_logprobs")
"""Names of all fields of `SamplingFields`."""

_ENGINE_DEFAULTS: dict[str, Any] = {
    field.name: field.default for field in dataclasses.fields(SamplingParams)
}


def _default(name: str) -> Any:
    """The engine's default of option `name`."""
    return _ENGINE_DEFAULTS[name]


class SamplingFields(BaseModel):
    """Mixin: one field per option of `engine.SamplingParams`. `None` means "off"."""

    n: int = _default("n")
    """Answers to sample per prompt, >= 1. They share the prompt's KV blocks."""

    temperature: float = _default("temperature")
    """0 is greedy; larger is more varied. Default 1.0, the model's own distribution."""

    top_p: float = _default("top_p")
    """Sample from the smallest set of tokens whose probability reaches this, in (0, 1]."""

    top_k: int = _default("top_k")
    """Sample from the k likeliest tokens; 0 or -1 takes all."""

    min_p: float = _default("min_p")
    """Drop tokens less likely than this fraction of the likeliest, in [0, 1]."""

    seed: int | None = _default("seed")
    """Makes the draws repeatable, whatever else runs beside the request."""

    stop: str | Sequence[str] | None = _default("stop")
    """Strings that end the answer. `stop` given with a call is added to these."""

    stop_token_ids: Sequence[int] | None = _default("stop_token_ids")
    """Token ids that end the answer, beside the model's own."""

    include_stop_str_in_output: bool = _default("include_stop_str_in_output")
    """Keep the stop string in the answer."""

    ignore_eos: bool = _default("ignore_eos")
    """Go on after the model's end-of-sequence token."""

    max_tokens: int | None = DEFAULT_MAX_TOKENS
    """New tokens at most; `None` is as many as the context holds. Default 512."""

    min_tokens: int = _default("min_tokens")
    """New tokens before the end-of-sequence and stop ids may be sampled."""

    presence_penalty: float = _default("presence_penalty")
    """Subtracted from the logit of each token already in the answer, in [-2, 2]."""

    frequency_penalty: float = _default("frequency_penalty")
    """The same, times the number of its occurrences, in [-2, 2]."""

    repetition_penalty: float = _default("repetition_penalty")
    """> 1 makes tokens of the prompt and the answer less likely."""

    logit_bias: Mapping[int, float] | None = _default("logit_bias")
    """Token id -> number added to its logit."""

    bad_words: Sequence[str] | None = _default("bad_words")
    """Strings the answer must not contain."""

    logprobs: bool | int | None = _default("logprobs")
    """Report log probabilities: `True`, or how many of the likeliest tokens to report too."""

    top_logprobs: int | None = None
    """How many of the likeliest tokens to report per position; switches `logprobs` on."""

    prompt_logprobs: int | None = _default("prompt_logprobs")
    """How many likeliest tokens to report for each token of the prompt."""

    skip_special_tokens: bool = _default("skip_special_tokens")
    """Leave control tokens out of the text."""

    json_schema: Mapping[str, Any] | str | None = _default("json_schema")
    """JSON schema the answer must fit: a dict or JSON text; excludes the next three."""

    regex: str | None = _default("regex")
    """Regular expression the whole answer must match."""

    choice: Sequence[str] | None = _default("choice")
    """Strings of which the answer is one."""

    grammar: str | None = _default("grammar")
    """Lark or EBNF grammar of the answer."""

    json_whitespace: str = _default("json_whitespace")
    """White space in an answer with a `json_schema`: "spaced", "compact" or "flexible"."""

    def sampling_values(self) -> dict[str, Any]:
        """Every sampling field by name."""
        return {name: getattr(self, name) for name in SAMPLING_NAMES}


def make_sampling_params(
    fields: Mapping[str, Any], call: Mapping[str, Any] | None = None
) -> SamplingParams:
    """The engine's parameters from an object's fields and the options of one call.

    Options of the call win, except `stop`, whose strings are added. Aliases are resolved.

    Args:
        fields: `SamplingFields.sampling_values()`, or any part of it.
        call: Sampling options of the call, by name or alias.

    Raises:
        RequestError: A name is unknown or a value is bad.
        ConstraintError: A constraint is asked for that the engine cannot enforce.
    """
    values = dict(fields)
    if call:
        given = resolve_aliases(call)
        if "stop" in given:
            given["stop"] = merge_stop(values.get("stop"), given["stop"])
        values |= given
    values["logprobs"] = _num_logprobs(values.get("logprobs"), values.pop("top_logprobs", None))
    check_names(values, _ENGINE_DEFAULTS, "sampling parameter")
    return SamplingParams(**values)


Memo = tuple[dict[str, Any], T]
"""Fields as they were, and what was made of them."""


def memoised(
    memo: Memo[T] | None, fields: dict[str, Any], make: Callable[[Mapping[str, Any]], T]
) -> Memo[T]:
    """`memo` if it was made of the same fields, else a new one.

    Calls without options of their own are the rule, and checking thirty fields costs more than
    comparing them.
    """
    if memo is not None and memo[0] == fields:
        return memo
    # Copies of containers notice a later change inside a list that a field holds.
    seen = {
        name: copy.deepcopy(value) if isinstance(value, list | dict) else value
        for name, value in fields.items()
    }
    return seen, make(fields)


def merge_stop(*groups: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """All stop strings of all groups, each once, in order of first appearance."""
    merged: dict[str, None] = {}
    for group in groups:
        if group is not None:
            merged |= dict.fromkeys((group,) if isinstance(group, str) else group)
    return tuple(merged) or None


def resolve_aliases(
    options: Mapping[str, Any], aliases: Mapping[str, str] = ALIASES
) -> dict[str, Any]:
    """`options` under our own names.

    Raises:
        RequestError: An option is given under two of its names.
    """
    resolved: dict[str, Any] = {}
    for name, value in options.items():
        own_name = aliases.get(name, name)
        if own_name in resolved or (own_name != name and own_name in options):
            msg = f"{name!r} is another name of {own_name!r}. Give one of them."
            raise RequestError(msg)
        resolved[own_name] = value
    return resolved


def check_names(names: Collection[str], valid_names: Collection[str], what: str) -> None:
    """Refuse names that nothing would read.

    Args:
        names: What the caller gave.
        valid_names: What is read, aliases included.
        what: Start of the message, for instance "ChatLocal() option".

    Raises:
        RequestError: A name is unknown; the nearest valid one is suggested.
    """
    for name in names:
        if name not in valid_names:
            hint = nearest_name_hint(name, valid_names)
            msg = f"Unknown {what} {name!r}.{hint}"
            raise RequestError(msg)


def _num_logprobs(logprobs: bool | int | None, top_logprobs: int | None) -> int | None:
    """OpenAI's pair of options as the engine's one number."""
    if isinstance(logprobs, bool):
        return (top_logprobs or 0) if logprobs else None
    if top_logprobs is None:
        return logprobs
    return top_logprobs if logprobs is None else max(logprobs, top_logprobs)
