"""Coroutines from sync code, whatever event loop the caller is in."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def run_in_loop_thread(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """The result of `work()`, run on an event loop in a thread of its own.

    So it also works where a loop is running already, as in a notebook; that loop is blocked until
    the result is there. The thread sees the caller's context variables: instrumentation spans and
    tags stay connected.
    """

    def run() -> T:
        return asyncio.run(work())

    context = contextvars.copy_context()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="llama-index-loop") as pool:
        return pool.submit(context.run, run).result()
