"""`LocalDecisions`: LangChain's decision models over the in-process engine (core 1.8 and later)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

from langchain_core.decisions import BaseDecisionModel, ClassifierResponse
from langchain_core.messages import BaseMessage
from pydantic import model_validator
from typing_extensions import override

from engine import RequestError
from llm_connectors.langchain._ballots import (
    LETTERS,
    YES_NO,
    Ballot,
    Tally,
    submit_ballots,
)
from llm_connectors.langchain._engine_fields import EngineFields
from llm_connectors.langchain._outputs import PROVIDER
from llm_connectors.langchain.errors import LANGCHAIN_ERRORS


class LocalDecisions(EngineFields, BaseDecisionModel):
    """Typed answers with exact probabilities: no text is generated and none is parsed.

        decisions = LocalDecisions(model="Qwen/Qwen3-4B-Instruct-2507")
        response = decisions.invoke(
            {"state": "Please help at once!", "questions": {"urgent": Noul(instructions="Urgent?")}}
        )
        response.nouls["urgent"].noul

    A `Noul` is the probability of "Yes" against "No"; the options of `Choice` and `Score` are
    lettered, and have the probabilities of their letters. All questions are one submission; the
    state comes first, so that they share it in the prefix cache. The `confidence` of an answer is
    the probability of its likeliest option. Text only: `Box` and media blocks raise. The model has
    to follow instructions; those of a few hundred million parameters mostly do not.

    Raises:
        pydantic.ValidationError: A name is unknown or a value is bad.
    """

    @model_validator(mode="after")
    def _check_overflow(self) -> Self:
        if self.on_overflow != "error":
            msg = "on_overflow must be 'error': a state that is cut would be another state."
            raise ValueError(msg)
        return self

    @property
    def _provider(self) -> str:
        return PROVIDER

    @override
    def _classify(self, state: Any, questions: dict[str, Any]) -> ClassifierResponse:
        with LANGCHAIN_ERRORS.converting():
            ballots = _ballots(state, questions)
            tallies = submit_ballots(self._engine(), ballots).wait(self.timeout)
            return self._response(questions, tallies)

    @override
    async def _aclassify(self, state: Any, questions: dict[str, Any]) -> ClassifierResponse:
        with LANGCHAIN_ERRORS.converting():
            ballots = _ballots(state, questions)
            election = submit_ballots(await self._aengine(), ballots)
            return self._response(questions, await election.await_all(self.timeout))

    def _response(self, questions: Mapping[str, Any], tallies: list[Tally]) -> ClassifierResponse:
        pairs = zip(questions.items(), tallies, strict=True)
        num_read = sum(tally.num_prompt_tokens for tally in tallies)
        num_written = sum(len(tally.probabilities) for tally in tallies)
        return ClassifierResponse.model_validate(
            {
                "model": self.model,
                "answers": {name: _answer(question, tally) for (name, question), tally in pairs},
                "usage": {
                    "input_tokens": num_read,
                    "output_tokens": num_written,
                    "total_tokens": num_read + num_written,
                    "input_token_details": {
                        "cache_read": sum(tally.num_cached_tokens for tally in tallies)
                    },
                },
            }
        )


def _answer(question: Any, tally: Tally) -> dict[str, Any]:
    odds = tally.probabilities
    if question.type == "noul":
        return {"type": "noul", "noul": odds[0]}
    if question.type == "choice":
        by_label = dict(zip(question.criteria, odds, strict=True))
        best = max(by_label, key=lambda label: by_label[label])
        return {
            "type": "choice",
            "choice": best,
            "probabilities": by_label,
            "confidence": by_label[best],
        }
    return {
        "type": "score",
        "score": sum(level * share for level, share in enumerate(odds)),
        "legend": dict(enumerate(question.criteria)),
        "probabilities": dict(enumerate(odds)),
        "confidence": max(odds),
    }


def _ballots(state: Any, questions: Mapping[str, Any]) -> list[Ballot]:
    """One for each question, each with the whole state first.

    Raises:
        RequestError: There are no questions, one asks for what is not supported, or the state holds
            media.
    """
    if not questions:
        msg = "questions is empty. Ask at least one."
        raise RequestError(msg)
    before = f"{_text(state)}\n\n"
    return [_ballot(before, name, question) for name, question in questions.items()]


def _ballot(before: str, name: str, question: Any) -> Ballot:
    if question.type == "box":
        msg = f"questions[{name!r}] is a Box, a place in an image; this model reads text only."
        raise RequestError(msg)
    asked = before + _text(question.instructions)
    if question.type == "noul":
        for answer, about in zip(YES_NO, _sides(question.criteria), strict=True):
            if about is not None:
                asked += f"\n{answer}: {_text(about)}"
        return Ballot(f"{asked}\n\nAnswer with Yes or No.", YES_NO)
    options = _options(question)
    if len(options) > len(LETTERS):
        msg = (
            f"questions[{name!r}] has {len(options)} options; at most {len(LETTERS)} can be told "
            "apart by one letter. Ask in two steps."
        )
        raise RequestError(msg)
    letters = LETTERS[: len(options)]
    lines = "".join(
        f"\n{letter}. {option}" for letter, option in zip(letters, options, strict=True)
    )
    return Ballot(f"{asked}\n{lines}\n\nAnswer with one letter.", letters)


def _sides(criteria: Any) -> tuple[Any, Any]:
    return (None, None) if criteria is None else (criteria.true, criteria.false)


def _options(question: Any) -> list[str]:
    if question.type == "score":
        return [_text(level) for level in question.criteria]
    return [
        label if about is None else f"{label}: {_text(about)}"
        for label, about in question.criteria.items()
    ]


def _text(value: Any) -> str:
    """A state or an instruction as the model reads it: text as it is, the rest as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, BaseMessage):
        return f"{value.type}: {_message_text(value)}"
    if isinstance(value, Sequence) and value and all(isinstance(m, BaseMessage) for m in value):
        return "\n".join(_text(message) for message in value)
    return json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseMessage):
        return {"role": value.type, "content": _message_text(value)}
    if isinstance(value, Mapping):
        if value.get("type") in ("image", "audio", "video", "file"):
            msg = f"The state holds a block of type {value['type']!r}; this model reads text only."
            raise RequestError(msg)
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    return value


def _message_text(message: BaseMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    texts = []
    for block in message.content:
        if isinstance(block, str):
            texts.append(block)
        elif block.get("type") == "text":
            texts.append(str(block.get("text", "")))
        else:
            msg = f"A message holds a block of type {block.get('type')!r}; text alone is read."
            raise RequestError(msg)
    return "".join(texts)
