"""Exact probabilities of a few given answers, from a model that generates.

A ballot is a prompt that ends where the model would name one of its options. Each option is forced
as a one-token answer, and the engine says how likely the model itself held it; over the options
these are made to add up to one. All options of all ballots are one submission, and those of one
ballot find its prompt in the prefix cache.
"""

from __future__ import annotations

import asyncio
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine import ContextOverflowError, RequestError, SamplingParams
from llm_connectors._texts import within

if TYPE_CHECKING:
    from engine import Engine, RequestHandle, RequestOutput

YES_NO = ("Yes", "No")
LETTERS = tuple(string.ascii_uppercase)
_FORCE = 100.0
"""Added to one token's logit, far beyond what logits differ by. Log probabilities that the engine
reports are those before it."""


@dataclass(frozen=True, slots=True)
class Ballot:
    """A question with its options.

    Attributes:
        text: What the model is asked.
        options: How it may answer; their first tokens must differ.
    """

    text: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tally:
    """What came of one ballot.

    Attributes:
        probabilities: Of each option; they add up to one.
        num_prompt_tokens: Tokens of the prompt, once per option.
        num_cached_tokens: Of these, tokens found in the prefix cache.
    """

    probabilities: tuple[float, ...]
    num_prompt_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class Election:
    """Ballots under way.

    Attributes:
        ballots: As given.
        tokens: The forced token of each option, ballot by ballot.
        handles: One per option, in the same order.
    """

    ballots: Sequence[Ballot]
    tokens: list[list[int]]
    handles: list[RequestHandle]

    def wait(self, timeout: float | None) -> list[Tally]:
        """The tallies; after an error, or when `timeout` seconds have passed, all are aborted."""
        try:
            return self._count([handle.result(timeout) for handle in self.handles])
        finally:
            self.abort()

    async def await_all(self, timeout: float | None) -> list[Tally]:
        """`wait` on the event loop; a cancelled task aborts them as well."""
        try:
            gathered = asyncio.gather(*(_output(handle) for handle in self.handles))
            return self._count(await within(gathered, timeout))
        finally:
            self.abort()

    def abort(self) -> None:
        """Give up what has not finished."""
        for handle in self.handles:
            handle.abort()

    def _count(self, outputs: Sequence[RequestOutput]) -> list[Tally]:
        tallies = []
        start = 0
        for tokens in self.tokens:
            own = outputs[start : start + len(tokens)]
            start += len(tokens)
            tallies.append(
                Tally(
                    _softmax([_logprob(*pair) for pair in zip(own, tokens, strict=True)]),
                    sum(one.usage.prompt_tokens for one in own),
                    sum(one.usage.cached_tokens for one in own),
                )
            )
        return tallies


def submit_ballots(engine: Engine, ballots: Sequence[Ballot]) -> Election:
    """Hand all ballots to the engine.

    Raises:
        RequestError: The model does not generate, or writes two options with the same first token.
        ContextOverflowError: A prompt is longer than the model reads.
    """
    tokens = [_tokens(engine, ballot.options) for ballot in ballots]
    prompts = _prompts(engine, [ballot.text for ballot in ballots])
    for ids in prompts:
        if len(ids) >= engine.max_model_len:
            msg = (
                f"State and question make a prompt of {len(ids)} tokens; the model reads "
                f"{engine.max_model_len - 1}. Shorten the state."
            )
            raise ContextOverflowError(msg)
    handles = engine.submit_many(
        [ids for ids, own in zip(prompts, tokens, strict=True) for _ in own],
        [
            SamplingParams(temperature=0.0, max_tokens=1, logprobs=0, logit_bias={token: _FORCE})
            for own in tokens
            for token in own
        ],
    )
    return Election(ballots, tokens, handles)


def _prompts(engine: Engine, texts: list[str]) -> list[list[int]]:
    if engine.has_chat_template:
        return engine.apply_chat_template_batch(
            [[{"role": "user", "content": text}] for text in texts]
        )
    return [engine.tokenize(f"{text}\nAnswer: ") for text in texts]


def _tokens(engine: Engine, options: Sequence[str]) -> list[int]:
    tokens = [engine.tokenize(option, add_special_tokens=False)[0] for option in options]
    if len(set(tokens)) < len(tokens):
        msg = (
            f"{engine.model_name!r} writes some of {', '.join(options)} with the same first token."
        )
        raise RequestError(msg)
    return tokens


async def _output(handle: RequestHandle) -> RequestOutput:
    return await handle


def _logprob(output: RequestOutput, token: int) -> float:
    at = output.outputs[0].logprobs
    assert at, "they were asked for"
    return at[0][token].logprob


def _softmax(values: Sequence[float]) -> tuple[float, ...]:
    most = max(values)
    weights = [math.exp(value - most) for value in values]
    return tuple(weight / sum(weights) for weight in weights)
