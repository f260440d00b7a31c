"""Many queries or retrievals at once: what LlamaIndex lacks and a batching engine lives on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.schema import NodeWithScore, QueryBundle

from llm_connectors.llama_index.errors import RequestError
from llm_connectors.llama_index.loop_thread import run_in_loop_thread

T = TypeVar("T")
Query = str | QueryBundle


async def aquery_many(
    query_engine: BaseQueryEngine,
    queries: Sequence[Query],
    *,
    concurrency: int = 64,
) -> list[RESPONSE_TYPE]:
    """Answers to `queries`, in order, from `query_engine.aquery` run side by side.

    One query runs most of its LLM calls one after the other, so an engine is kept busy only by
    several queries.

    Args:
        query_engine: Any query engine; true parallelism needs an LLM with true async.
        queries: Strings or bundles.
        concurrency: Queries in flight at most, >= 1. Each holds its retrieved nodes in memory;
            64 keeps a GPU busy while core's own share of a query (about 9 ms) caps the rate.

    Raises:
        RequestError: `concurrency` is below 1.
        Exception: What the first failing query raised; the others are cancelled.
    """
    return await _side_by_side(query_engine.aquery, queries, concurrency)


def query_many(
    query_engine: BaseQueryEngine,
    queries: Sequence[Query],
    *,
    concurrency: int = 64,
) -> list[RESPONSE_TYPE]:
    """`aquery_many` for sync code, on an event loop in a thread of its own.

    So it also works where a loop is running already, as in a notebook; that loop is blocked until
    the answers are there.
    """
    return run_in_loop_thread(lambda: aquery_many(query_engine, queries, concurrency=concurrency))


async def aretrieve_many(
    retriever: BaseRetriever, queries: Sequence[Query], *, concurrency: int = 64
) -> list[list[NodeWithScore]]:
    """The nodes found for each of `queries`, in order, from `retriever.aretrieve` side by side.

    The vectors of the queries share the batches of a `LocalEmbedding`'s engine.

    Args:
        retriever: Any retriever. Those whose store has no async search look into it one after the
            other.
        queries: Strings or bundles.
        concurrency: Retrievals in flight at most, >= 1.

    Raises:
        RequestError: `concurrency` is below 1.
        Exception: What the first failing retrieval raised; the others are cancelled.
    """
    return await _side_by_side(retriever.aretrieve, queries, concurrency)


def retrieve_many(
    retriever: BaseRetriever, queries: Sequence[Query], *, concurrency: int = 64
) -> list[list[NodeWithScore]]:
    """`aretrieve_many` for sync code, as `query_many`."""
    return run_in_loop_thread(lambda: aretrieve_many(retriever, queries, concurrency=concurrency))


async def _side_by_side(
    ask: Callable[[Query], Awaitable[T]], queries: Sequence[Query], concurrency: int
) -> list[T]:
    if concurrency < 1:
        msg = f"concurrency={concurrency} must be >= 1."
        raise RequestError(msg)
    slots = asyncio.Semaphore(concurrency)

    async def answer(query: Query) -> T:
        async with slots:
            return await ask(query)

    tasks = [asyncio.ensure_future(answer(query)) for query in queries]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
