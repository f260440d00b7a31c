"""Many queries at once: what LlamaIndex lacks and a batching engine lives on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.schema import QueryBundle

from llm_connectors.llama_index.errors import RequestError
from llm_connectors.llama_index.loop_thread import run_in_loop_thread


async def aquery_many(
    query_engine: BaseQueryEngine,
    queries: Sequence[str | QueryBundle],
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
    if concurrency < 1:
        msg = f"concurrency={concurrency} must be >= 1."
        raise RequestError(msg)
    slots = asyncio.Semaphore(concurrency)

    async def answer(query: str | QueryBundle) -> RESPONSE_TYPE:
        async with slots:
            return await query_engine.aquery(query)

    tasks = [asyncio.ensure_future(answer(query)) for query in queries]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def query_many(
    query_engine: BaseQueryEngine,
    queries: Sequence[str | QueryBundle],
    *,
    concurrency: int = 64,
) -> list[RESPONSE_TYPE]:
    """`aquery_many` for sync code, on an event loop in a thread of its own.

    So it also works where a loop is running already, as in a notebook; that loop is blocked until
    the answers are there.
    """
    return run_in_loop_thread(lambda: aquery_many(query_engine, queries, concurrency=concurrency))
