"""`PoolingHandle`: one object to wait for, await or abort one list of texts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator
from typing import Any, Protocol

from engine.outputs import PoolingOutput

_MAX_INLINE_CHARS = 8192
"""Most characters an async call tokenizes in the event loop's thread: about 2 ms, cheaper than a
hop to a worker thread. Longer lists go to one."""


class Source(Protocol):
    """What a handle waits for: a `RequestHandle`, or several behind one face."""

    request_id: str

    @property
    def is_done(self) -> bool:
        """True once `result` would not block."""

    def result(self, timeout: float | None = None) -> Any:
        """The outcome; aborts when `timeout` passes."""

    def abort(self) -> None:
        """Give up."""

    def __await__(self) -> Generator[Any, None, Any]:
        """The outcome, without blocking the event loop."""


class PoolingHandle:
    """The caller's end of `Engine.submit_embed` and `submit_score`. Made by these, never by hand.

    Ends in exactly one of: a `PoolingOutput`, or a typed error that every reader gets. The texts
    that have not run are dropped when `abort` is called, when `result(timeout=…)` runs out of time
    or when an awaiting task is cancelled; readers then get `RequestAbortedError`.

    Args:
        source: What brings the raw outcome.
        finish: Makes the output of it, in the reader's thread, once.

    Attributes:
        request_id: For logs.
    """

    def __init__(self, source: Source, finish: Callable[[Any], PoolingOutput]) -> None:
        self._source = source
        self._finish = finish
        self._lock = threading.Lock()
        self._output: PoolingOutput | None = None
        self.request_id = source.request_id

    def __repr__(self) -> str:
        return f"<PoolingHandle {self.request_id} {'done' if self.is_done else 'running'}>"

    @property
    def is_done(self) -> bool:
        """True once the output or the error is there."""
        return self._source.is_done

    def result(self, timeout: float | None = None) -> PoolingOutput:
        """Wait for all vectors or scores.

        Args:
            timeout: Seconds to wait at most; None waits for as long as it takes.

        Raises:
            RequestTimeoutError: `timeout` passed; the rest was aborted.
            EngineError: What ended the request instead of an output.
        """
        return self._finished(self._source.result(timeout))

    def __await__(self) -> Generator[Any, None, PoolingOutput]:
        raw = yield from self._source.__await__()
        return self._finished(raw)

    def abort(self) -> None:
        """Give up. Idempotent; callable from any thread."""
        self._source.abort()

    def _finished(self, raw: Any) -> PoolingOutput:
        with self._lock:
            if self._output is None:
                self._output = self._finish(raw)
            return self._output


class Ready:
    """A source whose outcome is known: that of no texts.

    Args:
        outcome: The outcome.
    """

    is_done = True
    request_id = "pooling-nothing"

    def __init__(self, outcome: PoolingOutput) -> None:
        self._outcome = outcome

    def result(self, timeout: float | None = None) -> PoolingOutput:
        """The outcome."""
        return self._outcome

    def abort(self) -> None:
        """Nothing runs."""

    def __await__(self) -> Generator[Any, None, PoolingOutput]:
        return self._outcome
        yield


async def awaited(submit: Callable[[], PoolingHandle], num_chars: int) -> PoolingOutput:
    """The output of a submission, without holding up the event loop.

    Args:
        submit: Tokenizes and submits.
        num_chars: Of all its texts.

    A task that is cancelled aborts the request, also while it is still being made.
    """
    if num_chars <= _MAX_INLINE_CHARS:
        return await submit()
    making = asyncio.get_running_loop().run_in_executor(None, submit)
    try:
        handle = await asyncio.shield(making)
    except asyncio.CancelledError:
        making.add_done_callback(_abort_made)
        raise
    return await handle


def _abort_made(making: asyncio.Future[PoolingHandle]) -> None:
    if not making.cancelled() and making.exception() is None:
        making.result().abort()
