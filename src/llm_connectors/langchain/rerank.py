"""`LocalRerank`: LangChain documents ranked by the in-process engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import Field
from typing_extensions import override

from llm_connectors._texts import within
from llm_connectors.langchain._engine_fields import EngineFields
from llm_connectors.langchain.errors import LANGCHAIN_ERRORS


class LocalRerank(EngineFields, BaseDocumentCompressor, BaseCrossEncoder):
    """Keeps the documents that answer a query best, best first.

        rerank = LocalRerank(model="cross-encoder/ms-marco-MiniLM-L6-v2", top_n=3)
        best = rerank.compress_documents(documents, "When does the ferry leave?")
        scores = rerank.score([("a query", "a document"), ("another", "one more")])

    What scores depends on the model: a cross-encoder's score, the cosine of the vectors of a model
    that embeds, or the probability of "Yes" against "No" of one that generates; the latter can be
    the very engine of a `ChatLocal`. All documents are one submission.

    It is a `BaseDocumentCompressor`, for retrievers, and a `BaseCrossEncoder`.

    Raises:
        pydantic.ValidationError: A name is unknown or a value is bad.
    """

    top_n: int | None = Field(default=3, ge=1)
    """Documents to keep at most; None keeps all."""

    min_score: float | None = None
    """Documents with a smaller score are dropped. What scores mean depends on the model."""

    instruction: str | None = None
    """What a model that generates is asked of each document; other models take none."""

    score_key: str = "relevance_score"
    """Where the score is put in a document's metadata."""

    @override
    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """The best documents, new objects with their score in the metadata; best first.

        Args:
            documents: Left as they are.
            query: What they should answer.
            callbacks: Not used: nothing is run here that has callbacks.
        """
        with LANGCHAIN_ERRORS.converting():
            texts = [document.page_content for document in documents]
            scores = self._engine().score(query, texts, timeout=self.timeout, **self._options())
            return self._best(documents, scores.tolist())

    @override
    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """`compress_documents` on the event loop."""
        with LANGCHAIN_ERRORS.converting():
            texts = [document.page_content for document in documents]
            engine = await self._aengine()
            scoring = engine.ascore(query, texts, **self._options())
            return self._best(documents, (await within(scoring, self.timeout)).tolist())

    @override
    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """The score of each pair of query and document, in order."""
        with LANGCHAIN_ERRORS.converting():
            queries, documents = _apart(text_pairs)
            scores = self._engine().score(
                queries, documents, timeout=self.timeout, **self._options()
            )
            return _floats(scores)

    async def ascore(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """`score` on the event loop."""
        with LANGCHAIN_ERRORS.converting():
            queries, documents = _apart(text_pairs)
            engine = await self._aengine()
            scoring = engine.ascore(queries, documents, **self._options())
            return _floats(await within(scoring, self.timeout))

    def _options(self) -> dict[str, Any]:
        return {"on_overflow": self.on_overflow, "instruction": self.instruction}

    def _best(self, documents: Sequence[Document], scores: list[float]) -> list[Document]:
        ranked = sorted(zip(scores, documents, strict=True), key=lambda pair: -pair[0])
        least = float("-inf") if self.min_score is None else self.min_score
        return [
            document.model_copy(update={"metadata": {**document.metadata, self.score_key: score}})
            for score, document in ranked[: self.top_n]
            if score >= least
        ]


def _apart(text_pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    return [query for query, _ in text_pairs], [document for _, document in text_pairs]


def _floats(scores: Any) -> list[float]:
    values: list[float] = scores.tolist()
    return values
