"""`LocalEmbedding`: LlamaIndex's embedding class over the in-process engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.core.bridge.pydantic import Field

from llm_connectors._params import check_names
from llm_connectors._runtime import lease_for
from llm_connectors._texts import text_list, within
from llm_connectors.llama_index.engine_component import EngineComponent
from llm_connectors.llama_index.errors import ERRORS, RequestError
from llm_connectors.llama_index.pickling import remember

if TYPE_CHECKING:
    from engine import Engine

DEFAULT_BATCH_SIZE = 512


class LocalEmbedding(EngineComponent, BaseEmbedding):
    """Vectors of texts and queries in this process; truly asynchronous, no server.

    The model is loaded on first use, `load()` or `await aload()`, and shared by all objects (and by
    the LangChain classes) that ask for the same model with the same `engine_kwargs`. A list goes to
    the engine as one submission; lists of several callers share its batches.

    Example:
        >>> embed = LocalEmbedding("all-minilm-l6-v2")
        >>> len(embed.get_text_embedding("some text"))  # doctest: +SKIP
        384

    Raises:
        ConfigError: No model is given, or an engine option is unknown or bad.
        RequestError: Another option is unknown or bad.
    """

    embed_batch_size: int = Field(default=DEFAULT_BATCH_SIZE, gt=0, le=2048)
    """Texts of one call. Default 512, not LlamaIndex's 10: the engine makes its own batches by
    tokens, and each call waits for all of its texts."""

    normalize: bool | None = None
    """Give vectors the length 1. Default: as the model does."""

    dimensions: int | None = None
    """Keep only the first so many entries, for models trained for that. Default: all."""

    query_prompt: str | None = None
    """Put before each query. Default: the model's own prompt for queries, where it has one."""

    text_prompt: str | None = None
    """Put before each text. Default: the model's own prompt for documents."""

    on_overflow: str = "error"
    """What becomes of a text longer than the model reads: "error", or "truncate" to ignore its
    end."""

    timeout: float | None = None
    """Seconds after which a call is aborted with `RequestTimeoutError`. Default: none."""

    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further `engine.EngineConfig` fields by name: `dtype`, `device`, `task`, ..."""

    def __init__(
        self, model: str | None = None, *, engine: Engine | None = None, **options: Any
    ) -> None:
        """Record the options; nothing is loaded.

        Args:
            model: As in `engine.EngineConfig.model`; also taken as `model_name`. May be left out
                where `engine` is given.
            engine: An engine made by the caller, who also closes it.
            **options: Any other field.
        """
        with ERRORS.converting():
            check_names(options.keys(), type(self).model_fields, "LocalEmbedding option")
            name = options.pop("model_name", None) if model is None else model
            lease = lease_for(name, options.get("engine_kwargs"), engine)
        policy = options.get("on_overflow", "error")
        if policy not in ("error", "truncate"):
            msg = f"on_overflow={policy!r} must be 'error' or 'truncate'."
            raise RequestError(msg)
        if engine is not None:
            options["engine_kwargs"] = lease.options
            remember(lease)
        super().__init__(model_name=lease.config.model, **options)
        self._lease = lease

    @classmethod
    def class_name(cls) -> str:
        """Name in serialized form; `load_embed_model` knows it."""
        return "LocalEmbedding"

    # ------------------------------------------------------------------ LlamaIndex's six

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._vectors([query], "query", self.query_prompt)[0]

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return (await self._avectors([query], "query", self.query_prompt))[0]

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return (await self._aget_text_embeddings([text]))[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self._vectors(texts, "document", self.text_prompt)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await self._avectors(texts, "document", self.text_prompt)

    # ------------------------------------------------------------------ one submission

    def _vectors(self, texts: list[str], name: str, prompt: str | None) -> list[Embedding]:
        engine = self.engine
        with ERRORS.converting():
            options = self._options(name, prompt)
            vectors: list[Embedding] = engine.embed(
                text_list(texts), timeout=self.timeout, **options
            ).tolist()
            return vectors

    async def _avectors(self, texts: list[str], name: str, prompt: str | None) -> list[Embedding]:
        engine = await self._aengine()
        with ERRORS.converting():
            embedding = engine.aembed(text_list(texts), **self._options(name, prompt))
            vectors: list[Embedding] = (await within(embedding, self.timeout)).tolist()
            return vectors

    def _options(self, prompt_name: str, prompt: str | None) -> dict[str, Any]:
        return {
            "prompt_name": prompt_name if prompt is None else None,
            "prompt": prompt,
            "normalize": self.normalize,
            "dimensions": self.dimensions,
            "on_overflow": self.on_overflow,
        }
