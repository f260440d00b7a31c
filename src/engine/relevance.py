"""Relevance as a language model judges it: the probability of "Yes" against "No".

The question is asked once per document, query first, so that all documents of a query share the
beginning in the prefix cache. Nothing is parsed: of each prompt two one-token answers are forced,
"Yes" and "No", and the score is exp(a) / (exp(a) + exp(b)) of their log probabilities in the
model's own distribution. The second answer finds the first one's KV blocks in the prefix cache.
Pointwise relevance by token likelihood follows Sachan et al. 2022 (arXiv 2204.07496) and Nogueira
et al. 2020 (arXiv 2003.06713).
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import ContextOverflowError, RequestError
from engine.outputs import PoolingOutput, RequestOutput, Usage
from engine.pooling_handle import PoolingHandle
from engine.pooling_texts import OVERFLOW_POLICIES
from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.handle import RequestHandle

DEFAULT_INSTRUCTION = "Is the document relevant to the query?"
_ANSWERS = ("Yes", "No")
_FORCE = 100.0
"""Added to one token's logit: far beyond what models' logits differ by. Reported log
probabilities are those before it is added."""


class JudgementGroup:
    """The requests of one list of documents as one source; see `pooling_handle.Source`.

    Args:
        handles: Two for each document: "Yes" and "No".
    """

    def __init__(self, handles: Sequence[RequestHandle]) -> None:
        self._handles = handles
        self.request_id = handles[0].request_id

    @property
    def is_done(self) -> bool:
        """True once every judgement is there, or one has failed."""
        return all(handle.is_done for handle in self._handles)

    def result(self, timeout: float | None = None) -> list[RequestOutput]:
        """All outputs; the first error ends the rest."""
        try:
            return [handle.result(timeout) for handle in self._handles]
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Give up on all of them."""
        for handle in self._handles:
            handle.abort()

    def __await__(self) -> Generator[Any, None, list[RequestOutput]]:
        return self._wait().__await__()

    async def _wait(self) -> list[RequestOutput]:
        try:
            return list(await asyncio.gather(*map(_output_of, self._handles)))
        finally:
            self.abort()  # changes nothing for those that have finished


async def _output_of(handle: RequestHandle) -> RequestOutput:
    return await handle


def submit_judgements(
    engine: Engine,
    queries: Sequence[str],
    documents: Sequence[str],
    *,
    on_overflow: str,
    instruction: str | None,
) -> PoolingHandle:
    """Have a model that generates judge each document, in one submission.

    Raises:
        RequestError: Texts are malformed, or the model's tokens cannot tell yes from no.
        ContextOverflowError: A prompt is too long and may not be cut.
    """
    if on_overflow not in OVERFLOW_POLICIES:
        msg = f"on_overflow={on_overflow!r} must be one of {', '.join(OVERFLOW_POLICIES)}."
        raise RequestError(msg)
    answers = [_first_token(engine, answer) for answer in _ANSWERS]
    if answers[0] == answers[1]:
        msg = f"{engine.model_name!r} writes 'Yes' and 'No' with the same first token."
        raise RequestError(msg)
    question = DEFAULT_INSTRUCTION if instruction is None else instruction
    prompts = _prompts(engine, queries, documents, question)
    room = engine.max_model_len - 1
    for index, ids in enumerate(prompts):
        if len(ids) <= room:
            continue
        if on_overflow == "error":
            msg = (
                f"documents[{index}] makes a prompt of {len(ids)} tokens; the model reads {room}. "
                "Split it, or pass on_overflow='truncate' to have the end of it ignored."
            )
            raise ContextOverflowError(msg)
        shorter = _cut(engine, documents[index], len(ids) - room)
        prompts[index] = _prompts(engine, queries[index : index + 1], [shorter], question)[0]
    params = [
        SamplingParams(temperature=0.0, max_tokens=1, logprobs=0, logit_bias={token: _FORCE})
        for token in answers
    ]
    handles = engine.submit_many(
        [ids for ids in prompts for _ in answers], [one for _ in prompts for one in params]
    )
    return PoolingHandle(JudgementGroup(handles), lambda outputs: _scores(outputs, answers))


def _prompts(
    engine: Engine, queries: Sequence[str], documents: Sequence[str], question: str
) -> list[list[int]]:
    texts = [
        f"{question} Answer with Yes or No.\n\nQuery: {query}\n\nDocument: {document}\n\n{question}"
        for query, document in zip(queries, documents, strict=True)
    ]
    if engine.has_chat_template:
        return engine.apply_chat_template_batch(
            [[{"role": "user", "content": text}] for text in texts]
        )
    return [engine.tokenize(f"{text}\nAnswer: ") for text in texts]


def _cut(engine: Engine, document: str, num_surplus: int) -> str:
    """`document` without its last tokens; a few more go, since tokens may merge at the cut."""
    ids = engine.tokenize(document, add_special_tokens=False)
    num_kept = len(ids) - num_surplus - 8
    if num_kept < 0:
        msg = f"The query leaves no room for a document in {engine.max_model_len} tokens."
        raise ContextOverflowError(msg)
    return engine.detokenize(ids[:num_kept])


def _first_token(engine: Engine, text: str) -> int:
    return engine.tokenize(text, add_special_tokens=False)[0]


def _scores(outputs: list[RequestOutput], answers: list[int]) -> PoolingOutput:
    logprobs = np.array([_logprob(one, answers[i % 2]) for i, one in enumerate(outputs)])
    odds = logprobs[0::2] - logprobs[1::2]
    scores = 1.0 / (1.0 + np.exp(-odds))
    metrics = outputs[-1].metrics
    usage = Usage(
        prompt_tokens=sum(one.usage.prompt_tokens for one in outputs),
        completion_tokens=len(outputs),
        cached_tokens=sum(one.usage.cached_tokens for one in outputs),
    )
    return PoolingOutput(scores.astype(np.float32)[:, None], usage, metrics)


def _logprob(output: RequestOutput, token: int) -> float:
    at = output.outputs[0].logprobs
    assert at is not None, "they were asked for"
    return at[0][token].logprob
