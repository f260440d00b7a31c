"""One request as deltas, synchronously and asynchronously, with a time limit and a sure end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Generator
from typing import TYPE_CHECKING

from engine import Delta, RequestError, RequestOutput, RequestTimeoutError, merge_deltas
from llm_connectors.langchain._fields import CallOptions

if TYPE_CHECKING:
    from engine import RequestHandle

Piece = tuple[Delta, RequestOutput | None]
"""What is new, and with the last delta the finished request."""


def check_can_stream(options: CallOptions) -> None:
    """Refuse to stream several answers: LangChain's chunks cannot say whose they are.

    Raises:
        RequestError: `n` is larger than 1.
    """
    if options.params.n > 1:
        msg = f"n={options.params.n} answers cannot be streamed. Use n=1, or invoke or generate."
        raise RequestError(msg)


def iterate(handle: RequestHandle, options: CallOptions) -> Generator[Piece]:
    """Yield deltas with news, then the last one, which always comes, and comes once.

    Closing the generator early aborts the request.

    Args:
        handle: The request; one answer.
        options: `timeout` and `stream_interval` are read.

    Raises:
        RequestTimeoutError: `timeout` seconds passed; the request is aborted.
        EngineError: What ended the request.
    """
    timeout = options.timeout
    limit = _TimeLimit(handle, timeout)
    # Waiting for the next delta has no time limit of its own, so a timer aborts the request.
    timer = threading.Timer(timeout or 0.0, limit.expire) if timeout is not None else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    last: Delta | None = None
    collector = _Collector(options.stream_interval)
    try:
        for delta in handle:
            if delta.finish_reason is not None:
                last = collector.with_rest(delta)
            elif (ready := collector.push(delta)) is not None and _has_news(ready):
                yield ready, None
        output = handle.result()
        limit.check(output)
        yield last or _empty_last(output), output
    finally:
        if timer is not None:
            timer.cancel()
        # Now, and not when the handle's own iterator happens to be collected.
        handle.abort()


async def aiterate(handle: RequestHandle, options: CallOptions) -> AsyncGenerator[Piece]:
    """`iterate` for an event loop."""
    timeout = options.timeout
    limit = _TimeLimit(handle, timeout)
    timer = None
    if timeout is not None:
        timer = asyncio.get_running_loop().call_later(timeout, limit.expire)
    last: Delta | None = None
    collector = _Collector(options.stream_interval)
    try:
        async for delta in handle:
            if delta.finish_reason is not None:
                last = collector.with_rest(delta)
            elif (ready := collector.push(delta)) is not None and _has_news(ready):
                yield ready, None
        output = await handle
        limit.check(output)
        yield last or _empty_last(output), output
    finally:
        if timer is not None:
            timer.cancel()
        handle.abort()


async def wait(handle: RequestHandle, timeout: float | None) -> RequestOutput:
    """Await the whole output. Cancelling the task aborts the request.

    Raises:
        RequestTimeoutError: `timeout` seconds passed; the request is aborted.
        EngineError: What ended the request.
    """
    if timeout is None:
        return await handle
    limit = _TimeLimit(handle, timeout)
    timer = asyncio.get_running_loop().call_later(timeout, limit.expire)
    try:
        output = await handle
    finally:
        timer.cancel()
    limit.check(output)
    return output


class _Collector:
    """Holds deltas back until there are enough tokens for a piece; the first goes out at once.

    Args:
        interval: Tokens of a piece; None lets every delta through.
    """

    def __init__(self, interval: int | None) -> None:
        self._interval = interval
        self._held: list[Delta] = []
        self._num_held = 0
        self._is_first = True

    def push(self, delta: Delta) -> Delta | None:
        """A delta that is not the last. Returns a piece when there is one."""
        if self._interval is None:
            return delta
        self._held.append(delta)
        self._num_held += len(delta.token_ids)
        is_enough = self._num_held >= self._interval or (self._is_first and _has_news(delta))
        if not is_enough:
            return None
        self._is_first = False
        return self._take()

    def with_rest(self, delta: Delta) -> Delta:
        """The last delta together with what was held back."""
        self._held.append(delta)
        return self._take()

    def _take(self) -> Delta:
        (merged,) = merge_deltas(self._held)
        self._held, self._num_held = [], 0
        return merged


class _TimeLimit:
    """Aborts a request when its time is up, and tells such an end from the caller's own abort."""

    def __init__(self, handle: RequestHandle, timeout: float | None) -> None:
        self._handle = handle
        self._timeout = timeout
        self._is_expired = False

    def expire(self) -> None:
        """Called by the timer, in any thread."""
        self._is_expired = True
        self._handle.abort()

    def check(self, output: RequestOutput) -> None:
        """Raise `RequestTimeoutError` if the limit cut this output short."""
        if self._is_expired and any(one.finish_reason == "abort" for one in output.outputs):
            raise timeout_error(output.request_id, self._timeout)


def timeout_error(request_id: str, timeout: float | None) -> RequestTimeoutError:
    """The error of a request that was aborted because its time was up."""
    return RequestTimeoutError(
        f"Request {request_id} was not finished after timeout={timeout} s and was aborted. Allow "
        "more time or ask for fewer tokens."
    )


def _has_news(delta: Delta) -> bool:
    return bool(delta.text or delta.logprobs)


def _empty_last(output: RequestOutput) -> Delta:
    """The end of a stream whose last delta was lost to an abort."""
    answer = output.outputs[0]
    return Delta(
        index=0, text="", finish_reason=answer.finish_reason, stop_reason=answer.stop_reason
    )
