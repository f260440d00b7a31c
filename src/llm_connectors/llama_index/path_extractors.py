"""LlamaIndex's graph extractors, callable where an event loop is running already.

The originals call `asyncio.run`, which raises in notebooks and web servers. `batched` puts these in
their place; with them, `PropertyGraphIndex` works there if it is given `use_async=False`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.indices.property_graph import transformations as core
from llama_index.core.schema import BaseNode, TransformComponent

from llm_connectors.llama_index.loop_thread import run_in_loop_thread

Nodes = Sequence[BaseNode]


class SimpleLLMPathExtractor(core.SimpleLLMPathExtractor):
    """Free triples."""

    def __call__(self, nodes: Nodes, show_progress: bool = False, **kwargs: Any) -> Nodes:
        """The nodes with their triples in the metadata."""
        return _call(self, nodes, show_progress, kwargs)


class SchemaLLMPathExtractor(core.SchemaLLMPathExtractor):
    """Triples of a given schema."""

    def __call__(self, nodes: Nodes, show_progress: bool = False, **kwargs: Any) -> list[BaseNode]:
        """The nodes with their triples in the metadata."""
        return list(_call(self, nodes, show_progress, kwargs))


class DynamicLLMPathExtractor(core.DynamicLLMPathExtractor):
    """Triples whose types may go beyond the given ones."""

    def __call__(self, nodes: Nodes, show_progress: bool = False, **kwargs: Any) -> list[BaseNode]:
        """The nodes with their triples in the metadata."""
        return list(_call(self, nodes, show_progress, kwargs))


def _call(
    extractor: TransformComponent, nodes: Nodes, show_progress: bool, kwargs: dict[str, Any]
) -> Nodes:
    return run_in_loop_thread(lambda: extractor.acall(nodes, show_progress=show_progress, **kwargs))
