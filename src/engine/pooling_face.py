"""`PoolingFace`: the part of `Engine` that embeds texts and scores documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from engine.errors import RequestError
from engine.handle import RequestHandle
from engine.outputs import PoolingOutput, RequestMetrics, Usage
from engine.pooling_facts import PoolingFacts
from engine.pooling_handle import PoolingHandle, Ready, awaited
from engine.pooling_texts import PoolingTexts, text_list
from engine.prompts import Prompt, is_one_prompt
from engine.relevance import submit_judgements

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.core.pooling_request import PoolingRequest
    from engine.engine import Engine
    from engine.placement.host import EngineHost

FloatArray = npt.NDArray[np.float32]

_TINY = 1e-12
"""A vector shorter than this stays as it is when normalised."""


class PoolingFace:
    """What `Engine` inherits; it brings the attributes."""

    config: EngineConfig
    _host: EngineHost
    _texts: PoolingTexts | None = None

    @property
    def task(self) -> str:
        """What the loaded model does: "generate", "embed" or "score"."""
        facts = self._host.facts.pooling
        return "generate" if facts is None else facts.kind

    @property
    def embedding_width(self) -> int:
        """Entries of a vector of `embed`.

        Raises:
            RequestError: The model does not embed.
        """
        return self._embedding_facts().width

    @property
    def embedding_prompts(self) -> dict[str, str]:
        """Name -> text of the model's own prompts, for `embed(prompt_name=…)`."""
        facts = self._host.facts.pooling
        return {} if facts is None else dict(facts.prompts)

    # ---------------------------------------------------------------- embed

    def embed(
        self,
        texts: Prompt | Sequence[Prompt],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        on_overflow: str = "error",
        timeout: float | None = None,
    ) -> FloatArray:
        """A vector for one text, or one for each of a list; blocks until all are there.

        A list is one submission; texts of all callers share the batches. Equal texts of a list are
        computed once.

        Args:
            texts: A string, a list of token ids, or a list of either. An empty string is a text.
            prompt_name: One of `embedding_prompts`, put before each text. "query" and "document"
                always work: a model without such a prompt uses its default one, or none.
            prompt: What to put before each text instead.
            normalize: Give vectors the length 1. Default: as the model does.
            dimensions: Keep only the first so many entries (for models trained with Matryoshka
                losses); normalised after the cut. Default: all.
            on_overflow: What becomes of a text longer than the model reads: "error", or "truncate"
                to ignore its end, as sentence-transformers does.
            timeout: Seconds to wait at most.

        Returns:
            [width] float32 for one text, [N, width] for a list.

        Raises:
            RequestError: A text or an option is malformed, or the model does not embed.
            ContextOverflowError: A text is too long.
            RequestTimeoutError: `timeout` passed; the rest was aborted.
            EngineError: What ended the request instead.
        """
        is_single = is_one_prompt(texts)
        given: list[Any] = [texts] if is_single else text_list(texts)
        handle = self.submit_embed(
            given,
            prompt_name=prompt_name,
            prompt=prompt,
            normalize=normalize,
            dimensions=dimensions,
            on_overflow=on_overflow,
        )
        vectors = _waited(handle, timeout).vectors
        return vectors[0] if is_single else vectors

    async def aembed(
        self,
        texts: Prompt | Sequence[Prompt],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        on_overflow: str = "error",
    ) -> FloatArray:
        """`embed` without blocking the event loop; a cancelled task aborts what has not run."""
        is_single = is_one_prompt(texts)
        given: list[Any] = [texts] if is_single else text_list(texts)
        submit = partial(
            self.submit_embed,
            given,
            prompt_name=prompt_name,
            prompt=prompt,
            normalize=normalize,
            dimensions=dimensions,
            on_overflow=on_overflow,
        )
        vectors = (await awaited(submit, _num_chars(given))).vectors
        return vectors[0] if is_single else vectors

    def submit_embed(
        self,
        texts: Sequence[Prompt],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        on_overflow: str = "error",
    ) -> PoolingHandle:
        """Start to embed a list and return at once. Any thread; arguments as in `embed`."""
        facts = self._embedding_facts()
        given = text_list(texts)
        finish = partial(
            _embeddings,
            normalize=facts.normalizes if normalize is None else normalize,
            dimensions=_checked_dimensions(dimensions, facts.width),
        )
        maker = self._pooling_texts(facts)
        worded = maker.prompt(prompt_name, prompt)
        if not given:
            return PoolingHandle(_nothing(facts.width), partial(finish, inverse=None))
        distinct, inverse = _distinct(given)
        request = maker.single(distinct, [worded] * len(distinct), on_overflow)
        return self._hand_over_pooling(request, partial(finish, inverse=inverse))

    # ---------------------------------------------------------------- score

    def score(
        self,
        query: str | Sequence[str],
        documents: str | Sequence[str],
        *,
        on_overflow: str = "error",
        instruction: str | None = None,
        timeout: float | None = None,
    ) -> FloatArray:
        """How well each document answers the query; larger is better. Blocks until all are there.

        What the number is depends on the model: a cross-encoder's score (through a sigmoid unless
        its config says otherwise); the cosine between the vectors of query and document, with the
        model's prompts for either, where the model embeds; the probability of "Yes" against "No"
        to the question whether the document is relevant, where it generates.

        Args:
            query: For all documents, or one for each.
            documents: One or several.
            on_overflow: As in `embed`; the longer of query and document is cut first.
            instruction: What a model that generates is asked, instead of "Is the document relevant
                to the query?"; the other kinds take none.
            timeout: Seconds to wait at most.

        Returns:
            [N] float32, in the documents' order.

        Raises:
            RequestError: A text or an option is malformed, or the numbers of queries and documents
                differ.
            ContextOverflowError: Query and document are too long together.
            RequestTimeoutError: `timeout` passed; the rest was aborted.
            EngineError: What ended the request instead.
        """
        handle = self.submit_score(
            query, documents, on_overflow=on_overflow, instruction=instruction
        )
        return _waited(handle, timeout).vectors[:, 0]

    async def ascore(
        self,
        query: str | Sequence[str],
        documents: str | Sequence[str],
        *,
        on_overflow: str = "error",
        instruction: str | None = None,
    ) -> FloatArray:
        """`score` without blocking the event loop; a cancelled task aborts what has not run."""
        submit = partial(
            self.submit_score, query, documents, on_overflow=on_overflow, instruction=instruction
        )
        num_chars = _num_chars([documents] if isinstance(documents, str) else documents)
        return (await awaited(submit, num_chars)).vectors[:, 0]

    def submit_score(
        self,
        query: str | Sequence[str],
        documents: str | Sequence[str],
        *,
        on_overflow: str = "error",
        instruction: str | None = None,
    ) -> PoolingHandle:
        """Start to score and return at once. Any thread; arguments as in `score`.

        The output's `vectors` are [N, 1].
        """
        given = [documents] if isinstance(documents, str) else text_list(documents, "documents")
        queries = [query] * len(given) if isinstance(query, str) else text_list(query, "query")
        if len(queries) != len(given):
            msg = (
                f"{len(queries)} queries were given for {len(given)} documents. Give one for each."
            )
            raise RequestError(msg)
        facts = self._host.facts.pooling
        if not given:
            return PoolingHandle(_nothing(1), lambda output: output)
        if facts is None:
            return submit_judgements(
                cast("Engine", self),
                queries,
                given,
                on_overflow=on_overflow,
                instruction=instruction,
            )
        if instruction is not None:
            msg = f"instruction={instruction!r} is read by models that generate, not by this one."
            raise RequestError(msg)
        maker = self._pooling_texts(facts)
        if facts.kind == "score":
            request = maker.pairs(queries, given, on_overflow)
            return self._hand_over_pooling(
                request, partial(_activated, is_sigmoid=facts.activation == "sigmoid")
            )
        distinct = list(dict.fromkeys(queries))
        prompts = [maker.prompt("query", None)] * len(distinct)
        prompts += [maker.prompt("document", None)] * len(given)
        request = maker.single([*distinct, *given], prompts, on_overflow)
        places = np.array([distinct.index(one) for one in queries])
        return self._hand_over_pooling(request, partial(_cosines, query_places=places))

    # ---------------------------------------------------------------- inside

    def _embedding_facts(self) -> PoolingFacts:
        facts = self._host.facts.pooling
        if facts is None:
            msg = (
                f"{self.config.model!r} was loaded to generate text. To embed with it, load it "
                "with task='embed'; a model made for embedding is much better at it."
            )
            raise RequestError(msg)
        if facts.kind == "score":
            msg = (
                f"{self.config.model!r} scores pairs of texts and has no vectors. Use Engine.score."
            )
            raise RequestError(msg)
        return facts

    def _pooling_texts(self, facts: PoolingFacts) -> PoolingTexts:
        # Two threads may make one each: they are alike.
        if self._texts is None:
            tokenizer = self._host.text.tokenizer
            self._texts = PoolingTexts(facts, tokenizer, self._host.facts.vocab_size)
        return self._texts

    def _hand_over_pooling(self, request: PoolingRequest, finish: Any) -> PoolingHandle:
        host = self._host
        # The handle keeps the engine alive, as that of a generating request does.
        handle = RequestHandle(
            cast("Any", request), lambda one: self._abort_pooling(one), lambda one: None
        )
        host.post_submit([(request, handle)])
        return PoolingHandle(handle, finish)

    def _abort_pooling(self, request: Any) -> None:
        self._host.post_abort(request)


def _waited(handle: PoolingHandle, timeout: float | None) -> PoolingOutput:
    try:
        return handle.result(timeout)
    except BaseException:  # KeyboardInterrupt: nobody waits any more
        handle.abort()
        raise


def _num_chars(texts: Any) -> int:
    """Length of the strings among `texts`; what is no list of texts is refused elsewhere."""
    if not isinstance(texts, Sequence):
        return 0
    return sum(len(one) for one in texts if isinstance(one, str))


def _nothing(width: int) -> Ready:
    empty = np.empty((0, width), np.float32)
    return Ready(PoolingOutput(empty, Usage(0, 0), RequestMetrics(arrival_s=0.0)))


def _distinct(texts: list[Any]) -> tuple[list[Any], npt.NDArray[np.intp] | None]:
    """Texts without repetition, and the place of each among them; None where all differ."""
    keys = [one if isinstance(one, str) else tuple(one) for one in texts]
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    if len(places) == len(texts):
        return texts, None
    inverse = np.array([places[key] for key in keys], dtype=np.intp)
    return [key if isinstance(key, str) else list(key) for key in places], inverse


def _checked_dimensions(dimensions: int | None, width: int) -> int:
    if dimensions is None:
        return width
    if isinstance(dimensions, bool) or not isinstance(dimensions, int):
        msg = f"dimensions={dimensions!r} must be an integer."
        raise RequestError(msg)
    if not 1 <= dimensions <= width:
        msg = f"dimensions={dimensions} must be in [1, {width}]: the model's vectors have {width}."
        raise RequestError(msg)
    return dimensions


def _embeddings(
    raw: PoolingOutput,
    *,
    inverse: npt.NDArray[np.intp] | None,
    normalize: bool,
    dimensions: int,
) -> PoolingOutput:
    vectors = raw.vectors
    if dimensions < vectors.shape[1]:
        vectors = np.ascontiguousarray(vectors[:, :dimensions])
    if normalize:
        vectors = normalized(vectors)
    if inverse is not None:
        vectors = vectors[inverse]
    return dataclasses.replace(raw, vectors=vectors)


def _cosines(raw: PoolingOutput, *, query_places: npt.NDArray[np.intp]) -> PoolingOutput:
    vectors = normalized(raw.vectors)
    num_queries = len(vectors) - len(query_places)
    scores = np.einsum("nw,nw->n", vectors[:num_queries][query_places], vectors[num_queries:])
    return dataclasses.replace(raw, vectors=scores.astype(np.float32)[:, None])


def _activated(raw: PoolingOutput, *, is_sigmoid: bool) -> PoolingOutput:
    if not is_sigmoid:
        return raw
    scores = 1.0 / (1.0 + np.exp(-raw.vectors.astype(np.float64)))
    return dataclasses.replace(raw, vectors=scores.astype(np.float32))


def normalized(vectors: FloatArray) -> FloatArray:
    """Rows of length 1, new; a row of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: FloatArray = vectors / np.maximum(lengths, _TINY)
    return scaled
