"""`batched`: components of LlamaIndex that send enough requests at once to fill a batch."""

from __future__ import annotations

import asyncio
import copy
from typing import Any, TypeVar, cast

from llama_index.core import extractors, postprocessor
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.evaluation import BatchEvalRunner
from llama_index.core.indices.property_graph import transformations
from llama_index.core.ingestion import IngestionPipeline
from pydantic import BaseModel

from llm_connectors.llama_index import path_extractors
from llm_connectors.llama_index.errors import RequestError
from llm_connectors.llama_index.extractors import (
    DEFAULT_CONCURRENCY,
    ExtractorGroup,
    TitleExtractor,
)
from llm_connectors.llama_index.llm_rerank import LLMRerank

T = TypeVar("T")

_TWINS: dict[type, type] = {
    extractors.TitleExtractor: TitleExtractor,
    postprocessor.LLMRerank: LLMRerank,
    transformations.SimpleLLMPathExtractor: path_extractors.SimpleLLMPathExtractor,
    transformations.SchemaLLMPathExtractor: path_extractors.SchemaLLMPathExtractor,
    transformations.DynamicLLMPathExtractor: path_extractors.DynamicLLMPathExtractor,
}
"""Classes of LlamaIndex that take turns however they are set -> ours with the same options."""


def batched(component: T, n: int = DEFAULT_CONCURRENCY) -> T:
    """A copy of `component` that has up to `n` requests in flight; LlamaIndex's default is 4.

    Args:
        component: An extractor, a graph extractor, an `LLMRerank`, a `BatchEvalRunner`, anything
            else with `num_workers`, an `IngestionPipeline` or a list. Of the last two, the parts
            that cannot be batched are kept as they are.
        n: Requests in flight at most, >= 1.

    Raises:
        RequestError: `n` is below 1, or the component has nothing to set.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        msg = f"n={n!r} must be an integer >= 1."
        raise RequestError(msg)
    copied = _batched(component, n)
    if copied is None:
        msg = (
            f"{type(component).__name__} has no number of workers to set. batched() takes "
            "extractors, graph extractors, LLMRerank, BatchEvalRunner, IngestionPipeline, and "
            "lists of them. For query engines use aquery_many."
        )
        raise RequestError(msg)
    return cast("T", copied)


def _batched(component: Any, n: int) -> Any | None:
    if isinstance(component, list | tuple):
        return type(component)([_batched(part, n) or part for part in component])
    if isinstance(component, IngestionPipeline):
        parts = _batched(component.transformations, n)
        return component.model_copy(update={"transformations": parts})
    if isinstance(component, BatchEvalRunner):
        runner = copy.copy(component)
        runner.workers, runner.semaphore = n, asyncio.Semaphore(n)
        return runner
    if isinstance(component, ExtractorGroup):
        return component.model_copy(update={"extractors": _batched(component.extractors, n)})
    if isinstance(component, BaseEmbedding):
        return None
    twin = _TWINS.get(type(component))
    if twin is not None:
        changed = component.model_copy(update={"num_workers": n})
        # The twins add methods only, so an instance of the original is one of theirs.
        changed.__class__ = twin
        return changed
    if isinstance(component, BaseModel):
        has_workers = "num_workers" in type(component).model_fields
        return component.model_copy(update={"num_workers": n}) if has_workers else None
    if hasattr(component, "num_workers"):
        changed = copy.copy(component)
        changed.num_workers = n
        return changed
    return None
