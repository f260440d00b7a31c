"""`LocalEmbeddings`: LangChain embeddings over the in-process engine."""

from __future__ import annotations

from typing import Any

from langchain_core.embeddings import Embeddings
from pydantic import Field
from typing_extensions import override

from llm_connectors._texts import text_list, within
from llm_connectors.langchain._engine_fields import EngineFields
from llm_connectors.langchain.errors import LANGCHAIN_ERRORS


class LocalEmbeddings(EngineFields, Embeddings):
    """Vectors of texts in this process. Making one loads nothing; the model is shared.

        embeddings = LocalEmbeddings(model="all-minilm-l6-v2")
        vectors = embeddings.embed_documents(["One list", "is one submission"])
        vector = await embeddings.aembed_query("What is one submission?")

    A list is handed to the engine at once, whatever its length; calls of several threads and event
    loops share its batches. The async methods never block the event loop and abort what has not
    run when their task is cancelled.

    Raises:
        pydantic.ValidationError: A name is unknown or a value is bad.
    """

    normalize: bool | None = None
    """Give vectors the length 1. Default: as the model does."""

    dimensions: int | None = Field(default=None, ge=1)
    """Keep only the first so many entries, for models trained for that. Default: all."""

    query_prompt: str | None = None
    """Put before each query. Default: the model's own prompt for queries, where it has one."""

    document_prompt: str | None = None
    """Put before each document. Default: the model's own prompt for documents."""

    @override
    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """A vector for each text, in order."""
        with LANGCHAIN_ERRORS.converting():
            options = self._options("document", self.document_prompt)
            vectors = self._engine().embed(text_list(texts), timeout=self.timeout, **options)
            return _floats(vectors)

    @override
    def embed_query(self, text: str) -> list[float]:
        """The vector of a query."""
        with LANGCHAIN_ERRORS.converting():
            options = self._options("query", self.query_prompt)
            vectors = self._engine().embed(text_list([text]), timeout=self.timeout, **options)
            return _floats(vectors)[0]

    @override
    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """`embed_documents` on the event loop."""
        with LANGCHAIN_ERRORS.converting():
            options = self._options("document", self.document_prompt)
            engine = await self._aengine()
            return _floats(await within(engine.aembed(text_list(texts), **options), self.timeout))

    @override
    async def aembed_query(self, text: str) -> list[float]:
        """`embed_query` on the event loop."""
        with LANGCHAIN_ERRORS.converting():
            options = self._options("query", self.query_prompt)
            engine = await self._aengine()
            return _floats(await within(engine.aembed(text_list([text]), **options), self.timeout))[
                0
            ]

    def _options(self, prompt_name: str, prompt: str | None) -> dict[str, Any]:
        return {
            "prompt_name": prompt_name if prompt is None else None,
            "prompt": prompt,
            "normalize": self.normalize,
            "dimensions": self.dimensions,
            "on_overflow": self.on_overflow,
        }


def _floats(vectors: Any) -> list[list[float]]:
    rows: list[list[float]] = vectors.tolist()
    return rows
