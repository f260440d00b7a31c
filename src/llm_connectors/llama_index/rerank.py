"""`LocalRerank`: LlamaIndex nodes ranked by the in-process engine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import Field
from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from llama_index_instrumentation import get_dispatcher

from llm_connectors._params import check_names
from llm_connectors._runtime import lease_for
from llm_connectors._texts import within
from llm_connectors.llama_index.engine_component import EngineComponent
from llm_connectors.llama_index.errors import ERRORS, RequestError
from llm_connectors.llama_index.pickling import remember

if TYPE_CHECKING:
    from collections.abc import Generator

    from engine import Engine

dispatcher = get_dispatcher(__name__)


class LocalRerank(EngineComponent, BaseNodePostprocessor):
    """Keeps the nodes that answer a query best, best first. No model output is parsed.

    What scores depends on the model: a cross-encoder's score, the cosine of the vectors of a model
    that embeds, or the probability of "Yes" against "No" of one that generates; the latter can be
    the very engine of a `LocalLLM`. All nodes are one submission.

    Example:
        >>> rerank = LocalRerank("smollm2-135m", top_n=3)
        >>> engine = index.as_query_engine(node_postprocessors=[rerank])  # doctest: +SKIP

    Raises:
        ConfigError: No model is given, or an engine option is unknown or bad.
        RequestError: Another option is unknown or bad.
    """

    model: str = ""
    """A Hugging Face folder, a hub id, or a packaged model."""

    top_n: int = Field(default=5, ge=1)
    """Nodes to keep at most."""

    min_score: float | None = None
    """Nodes with a smaller score are dropped. What scores mean depends on the model."""

    instruction: str | None = None
    """What a model that generates is asked of each node; other models take none."""

    metadata_mode: MetadataMode = MetadataMode.EMBED
    """Which metadata of a node the model reads beside its text."""

    on_overflow: str = "error"
    """What becomes of a node longer than the model reads: "error", or "truncate" to ignore its
    end."""

    timeout: float | None = None
    """Seconds after which a call is aborted with `RequestTimeoutError`. Default: none."""

    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further `engine.EngineConfig` fields by name: `dtype`, `device`, ..."""

    def __init__(
        self, model: str | None = None, *, engine: Engine | None = None, **options: Any
    ) -> None:
        """Record the options; nothing is loaded.

        Args:
            model: As in `engine.EngineConfig.model`. May be left out where `engine` is given.
            engine: An engine made by the caller, who also closes it.
            **options: Any other field.
        """
        with ERRORS.converting():
            check_names(options.keys(), type(self).model_fields, "LocalRerank option")
            lease = lease_for(model, options.get("engine_kwargs"), engine)
        policy = options.get("on_overflow", "error")
        if policy not in ("error", "truncate"):
            msg = f"on_overflow={policy!r} must be 'error' or 'truncate'."
            raise RequestError(msg)
        if engine is not None:
            options["engine_kwargs"] = lease.options
            remember(lease)
        super().__init__(model=lease.config.model, **options)
        self._lease = lease

    @classmethod
    def class_name(cls) -> str:
        """Name in serialized form."""
        return "LocalRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = _query_of(query_bundle)
        if not nodes:
            return []
        engine = self.engine
        with self._observed(nodes, query) as best, ERRORS.converting():
            texts = self._texts(nodes)
            scores = engine.score(query, texts, timeout=self.timeout, **self._options())
            best += self._best(nodes, scores.tolist())
        return best

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = _query_of(query_bundle)
        if not nodes:
            return []
        engine = await self._aengine()
        with self._observed(nodes, query) as best, ERRORS.converting():
            scoring = engine.ascore(query, self._texts(nodes), **self._options())
            best += self._best(nodes, (await within(scoring, self.timeout)).tolist())
        return best

    @contextmanager
    def _observed(
        self, nodes: Sequence[NodeWithScore], query: str
    ) -> Generator[list[NodeWithScore]]:
        """Events around one call, the old kind and the new; yields the list to fill."""
        best: list[NodeWithScore] = []
        dispatcher.event(
            ReRankStartEvent(
                query=query, nodes=list(nodes), top_n=self.top_n, model_name=self.model
            )
        )
        payload: dict[str, Any] = {
            EventPayload.NODES: list(nodes),
            EventPayload.MODEL_NAME: self.model,
            EventPayload.QUERY_STR: query,
            EventPayload.TOP_K: self.top_n,
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            yield best
            event.on_end(payload={EventPayload.NODES: best})
        dispatcher.event(ReRankEndEvent(nodes=best))

    def _texts(self, nodes: Sequence[NodeWithScore]) -> list[str]:
        return [one.node.get_content(metadata_mode=self.metadata_mode) for one in nodes]

    def _options(self) -> dict[str, Any]:
        return {"on_overflow": self.on_overflow, "instruction": self.instruction}

    def _best(self, nodes: Sequence[NodeWithScore], scores: list[float]) -> list[NodeWithScore]:
        ranked = sorted(zip(scores, nodes, strict=True), key=lambda pair: -pair[0])
        least = float("-inf") if self.min_score is None else self.min_score
        return [
            NodeWithScore(node=one.node, score=score)
            for score, one in ranked[: self.top_n]
            if score >= least
        ]


def _query_of(query_bundle: QueryBundle | None) -> str:
    if query_bundle is None:
        msg = "Nodes are ranked for a query. Pass query_str=… or query_bundle=…."
        raise RequestError(msg)
    return query_bundle.query_str
