"""`LLMRerank` whose batches of nodes are judged side by side, in sync code too."""

from __future__ import annotations

from typing import Any

from llama_index.core import postprocessor as core
from llama_index.core.async_utils import run_jobs
from llama_index.core.bridge.pydantic import Field
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle

from llm_connectors.llama_index.errors import RequestError
from llm_connectors.llama_index.extractors import DEFAULT_CONCURRENCY
from llm_connectors.llama_index.loop_thread import run_in_loop_thread


class LLMRerank(core.LLMRerank):
    """LlamaIndex's `LLMRerank`, with `num_workers` requests in flight instead of four, or one.

    It still reads scores out of free text, with two slips of the original mended: number 0 is no
    document (there it means the last one), and a document named twice comes once. `LocalRerank`
    needs no text at all.
    """

    num_workers: int = Field(
        default=DEFAULT_CONCURRENCY, gt=0, description="Requests in flight at most."
    )

    def __init__(self, *args: Any, num_workers: int = DEFAULT_CONCURRENCY, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_workers = num_workers

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return run_in_loop_thread(lambda: self._apostprocess_nodes(nodes, query_bundle))

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            msg = "LLMRerank needs the query: pass query_bundle or query_str."
            raise RequestError(msg)
        batches = self._get_node_batches(nodes)
        answers = await run_jobs(
            [
                self.llm.apredict(
                    self.choice_select_prompt,
                    **self._get_predict_kwargs(batch, query_bundle.query_str),
                )
                for batch in batches
            ],
            workers=self.num_workers,
        )
        ranked: list[NodeWithScore] = []
        for answer, batch in zip(answers, batches, strict=True):
            ranked += self._parse_raw_response(answer, batch)
        ranked.sort(key=lambda node: node.score or 0.0, reverse=True)
        return ranked[: self.top_n]

    def _parse_raw_response(
        self, raw_response: str, nodes_batch: list[BaseNode]
    ) -> list[NodeWithScore]:
        numbers, scores = self._parse_choice_select_answer_fn(raw_response, len(nodes_batch))
        chosen: dict[int, float] = {}
        for place, number in enumerate(map(int, numbers)):
            if 1 <= number <= len(nodes_batch):
                chosen.setdefault(number, float(scores[place]) if scores else 1.0)
        return [
            NodeWithScore(node=nodes_batch[number - 1], score=score)
            for number, score in chosen.items()
        ]
