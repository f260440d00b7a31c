"""Extractors that keep an engine busy where LlamaIndex's own take turns."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core import extractors as core
from llama_index.core.async_utils import run_jobs
from llama_index.core.bridge.pydantic import Field, SerializeAsAny
from llama_index.core.llms.llm import LLM
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import BaseNode, MetadataMode

DEFAULT_CONCURRENCY = 64
"""Requests in flight at most, where LlamaIndex's default is 4."""


class TitleExtractor(core.TitleExtractor):
    """LlamaIndex's `TitleExtractor` with all its requests side by side.

    The original asks for a document's candidate titles one after the other, for at most four
    documents at a time, and does not pass `num_workers` on. Results and options are the same; the
    default here is 64 at once.
    """

    def __init__(
        self, llm: LLM | None = None, *, num_workers: int = DEFAULT_CONCURRENCY, **options: Any
    ) -> None:
        super().__init__(llm, num_workers=num_workers, **options)

    async def extract_titles(self, nodes_by_doc_id: dict[Any, list[BaseNode]]) -> dict[Any, str]:
        """Title of each document, by its id; `num_workers` requests in flight at most."""
        slots = asyncio.Semaphore(self.num_workers)

        async def ask(template: str, text: str) -> str:
            async with slots:
                return await self.llm.apredict(PromptTemplate(template=template), context_str=text)

        async def title(nodes: list[BaseNode]) -> str:
            texts = [node.get_content(MetadataMode.NONE) for node in nodes]
            candidates = await asyncio.gather(*(ask(self.node_template, text) for text in texts))
            return await ask(self.combine_template, ", ".join(candidates))

        titles = await run_jobs(
            [title(nodes) for nodes in nodes_by_doc_id.values()],
            show_progress=self.show_progress,
            workers=max(1, len(nodes_by_doc_id)),
        )
        return dict(zip(nodes_by_doc_id, titles, strict=True))


class ExtractorGroup(core.BaseExtractor):
    """Several extractors as one, all of whose requests run side by side.

    A pipeline runs its extractors one after the other, so each waits for the slowest answer of the
    one before. In a group they start together, and with `with_shared_prefix` the requests about one
    node read its text only once. No extractor of a group sees what another found.
    """

    is_text_node_only: bool = False
    extractors: list[SerializeAsAny[core.BaseExtractor]] = Field(
        description="Run together; of two that write the same key the later one counts."
    )

    @classmethod
    def class_name(cls) -> str:
        """Name in serialized form."""
        return "ExtractorGroup"

    async def aextract(self, nodes: Sequence[BaseNode]) -> list[dict[str, Any]]:
        """What all extractors found, one dict per node."""
        running = [asyncio.ensure_future(one.aextract(nodes)) for one in self.extractors]
        try:
            found = await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()
        merged: list[dict[str, Any]] = [{} for _ in nodes]
        for rows in found:
            for target, row in zip(merged, rows, strict=True):
                target.update(row)
        return merged
