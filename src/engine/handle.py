"""`RequestHandle`: one object to wait for, stream, await or abort one request.

The engine thread writes into the handle (`publish`); any number of threads and event loops read
from it. A handle belongs to no event loop: each `await` and each `async for` binds to the loop it
runs in, for as long as it runs.

    engine thread                      readers
    publish(deltas | output | error)   result()      waits on the condition
      ├ appends to the delta log       for delta     own cursor into the log
      ├ notifies the condition         await         future in the reader's loop
      └ returns the loops to wake      async for     own cursor, future in the reader's loop

Deltas are kept in one append-only log. Every iterator has a cursor of its own and takes all that
is new at once, so a slow reader gets fewer, larger deltas and never holds up the engine.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from engine.errors import RequestTimeoutError
from engine.outputs import Delta, RequestOutput

if TYPE_CHECKING:
    from engine.core.request import Request

_Loop = asyncio.AbstractEventLoop

Wakeups = list[tuple[_Loop, asyncio.Future[None], bool]]
"""Futures to complete, each in its own event loop, and whether a stream waits (`wake_loops`)."""


class RequestSink(Protocol):
    """Where the engine thread puts what a request yields: its handle, or the way to it."""

    def publish(
        self,
        deltas: Sequence[Delta] | None = None,
        output: RequestOutput | None = None,
        error: BaseException | None = None,
    ) -> Wakeups:
        """See `RequestHandle.publish`."""


class RequestHandle:
    """The caller's end of one request. Made by `Engine.submit`, never by hand.

    Every request ends in exactly one of: a `RequestOutput` whose answers have a `finish_reason`,
    or a typed error, which then every reader gets.

    A request is aborted, and its KV blocks come back within a step, when `abort` is called, when
    `result(timeout=…)` runs out of time, when an awaiting task is cancelled, or when a stream is
    left early; the latter two only if nobody else is reading this handle at that moment.
    """

    __slots__ = (
        "_condition",
        "_deltas",
        "_error",
        "_futures",
        "_is_streamed",
        "_lock",
        "_num_readers",
        "_on_abort",
        "_on_end",
        "_on_stream",
        "_output",
        "_request",
        "request_id",
    )

    def __init__(
        self,
        request: Request,
        on_abort: Callable[[Request], None],
        on_stream: Callable[[Request], None],
    ) -> None:
        self.request_id = request.request_id
        self._request = request
        self._on_abort = on_abort
        self._on_stream = on_stream
        # Reentrant: a stream that the garbage collector finds here ends with this lock.
        self._lock = threading.RLock()
        # Made when a thread has to wait. It is ten objects, which most handles of a long list
        # never need, and a thousand of which bring on a full garbage collection.
        self._condition: threading.Condition | None = None
        # Lists once somebody streams or waits: each would be an object that the collector walks.
        self._deltas: list[Delta] | tuple[()] = ()
        self._output: RequestOutput | None = None
        self._error: BaseException | None = None
        self._futures: Wakeups | tuple[()] = ()
        self._is_streamed = False
        self._num_readers = 0
        self._on_end: Callable[[RequestHandle], None] | None = None

    def __repr__(self) -> str:
        state = "running"
        if self._error is not None:
            state = f"failed: {self._error!r}"
        elif self._output is not None:
            state = "finished"
        return f"<RequestHandle {self.request_id} {state}>"

    @property
    def is_done(self) -> bool:
        """True once the output or the error is there."""
        return self._output is not None or self._error is not None

    # ---------------------------------------------------------------- whole results

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for the whole output.

        Args:
            timeout: Seconds to wait at most; None waits for as long as it takes.

        Raises:
            RequestTimeoutError: `timeout` passed; the request is aborted.
            EngineError: What ended the request instead of an output.
        """
        with self._lock:
            self._num_readers += 1
            try:
                in_time = self._wait_for(lambda: self.is_done, timeout)
            finally:
                self._num_readers -= 1
        if not in_time:
            self.abort()
            msg = (
                f"Request {self.request_id} was not finished after {timeout} s and was aborted. "
                "Allow more time or ask for fewer tokens."
            )
            raise RequestTimeoutError(msg)
        return self._take_result()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the request has ended, at most `timeout` seconds; never aborts it.

        Returns:
            True once it has ended.
        """
        with self._lock:
            return self._wait_for(lambda: self.is_done, timeout)

    @property
    def has_failed(self) -> bool:
        """True once an error has ended the request; `result` raises it."""
        return self._error is not None

    def call_at_end(self, function: Callable[[RequestHandle], None]) -> None:
        """Have `function` called with this handle once it is done: at once, if it is already.

        Otherwise the engine thread calls it, in the middle of a step: it must be quick and must not
        raise. There is room for one function.
        """
        with self._lock:
            if not self.is_done:
                assert self._on_end is None, "somebody waits for this handle's end already"
                self._on_end = function
                return
        function(self)

    def _wait_for(self, is_ready: Callable[[], bool], timeout: float | None = None) -> bool:
        """Block until `is_ready`. Called with the lock held, which is free while this waits."""
        if is_ready():
            return True
        if self._condition is None:
            self._condition = threading.Condition(self._lock)
        return self._condition.wait_for(is_ready, timeout)

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self._wait_async().__await__()

    async def _wait_async(self) -> RequestOutput:
        with self._lock:
            self._num_readers += 1
        try:
            while not self.is_done:
                await self._next_event(lambda: self.is_done, is_stream=False)
        finally:
            self._release_reader()
        return self._take_result()

    def _take_result(self) -> RequestOutput:
        if self._error is not None:
            raise self._error
        assert self._output is not None, "a finished request has an output or an error"
        return self._output

    # ---------------------------------------------------------------- streams

    def __iter__(self) -> Iterator[Delta]:
        self._start_stream()
        cursor = 0
        try:
            while True:
                with self._lock:
                    self._wait_for(partial(self._has_more, cursor))
                new, cursor = self._deltas_since(cursor)
                yield from new
                if not new and self.is_done:
                    self._raise_error()
                    return
        finally:
            self._release_reader()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        self._start_stream()
        cursor = 0
        try:
            while True:
                new, cursor = self._deltas_since(cursor)
                for delta in new:
                    yield delta
                if new:
                    continue
                if self.is_done:
                    self._raise_error()
                    return
                await self._next_event(partial(self._has_more, cursor), is_stream=True)
        finally:
            self._release_reader()

    def _start_stream(self) -> None:
        with self._lock:
            self._num_readers += 1
            is_first = not self._is_streamed
            self._is_streamed = True
            if is_first:
                self._deltas = [] if self._output is None else _deltas_of(self._output)
                if self._output is not None:
                    return
        if is_first and not self.is_done:
            self._on_stream(self._request)

    def _has_more(self, cursor: int) -> bool:
        return self.is_done or len(self._deltas) > cursor

    def _deltas_since(self, cursor: int) -> tuple[list[Delta], int]:
        """New deltas, those of one answer merged into one, and the new cursor."""
        with self._lock:
            new = self._deltas[cursor:]
            return merge_deltas(new), cursor + len(new)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    # ---------------------------------------------------------------- abort

    def abort(self) -> None:
        """Give up on the request. Idempotent; callable from any thread.

        Readers get what was generated so far, with `finish_reason` "abort".
        """
        if not self.is_done:
            self._on_abort(self._request)

    def _release_reader(self) -> None:
        with self._lock:
            self._num_readers -= 1
            is_abandoned = self._num_readers == 0 and not self.is_done
        if is_abandoned:
            self.abort()

    # ---------------------------------------------------------------- the engine thread's side

    def publish(
        self,
        deltas: Sequence[Delta] | None = None,
        output: RequestOutput | None = None,
        error: BaseException | None = None,
    ) -> Wakeups:
        """Hand over what is new. Called by the engine thread only.

        Args:
            deltas: New pieces; ignored unless somebody streams.
            output: The whole output; ends the request.
            error: Ends the request instead.

        Returns:
            Futures to complete, each in its own event loop (see `wake_loops`).
        """
        with self._lock:
            if self.is_done:
                return []
            if self._is_streamed:
                assert isinstance(self._deltas, list), "made by the first stream"
                self._deltas.extend(deltas or ())
                if output is not None and not self._deltas:
                    self._deltas.extend(_deltas_of(output))
            self._output = output
            self._error = error
            if self._condition is not None:
                self._condition.notify_all()
            futures, self._futures = list(self._futures), ()
            on_end, self._on_end = (self._on_end, None) if self.is_done else (None, self._on_end)
        if on_end is not None:
            on_end(self)
        return futures

    async def _next_event(self, is_ready: Callable[[], bool], *, is_stream: bool) -> None:
        """Wait until the engine publishes something, unless `is_ready` says it has already."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        with self._lock:
            if is_ready():
                return
            self._futures = [*self._futures, (loop, future, is_stream)]
        await future


class ReaderClock:
    """CPU time that event loops have spent on the deltas of streams.

    Written by the loops' threads without a lock: of two that write at once, one may be lost.

    Attributes:
        seconds: Since the start. What a reader does after it has given its loop a turn is not in
            it, and readers in plain threads are not.
        count: How often a reader was given something.
    """

    __slots__ = ("count", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        self.count = 0

    def read(self) -> tuple[float, int]:
        """Both."""
        return self.seconds, self.count

    def stop(self, started_s: float, count: int) -> None:
        """Add the time since `started_s` of `time.thread_time`, in the same thread."""
        self.seconds += time.thread_time() - started_s
        self.count += count


def wake_loops(futures: Wakeups, clock: ReaderClock | None = None) -> None:
    """Complete futures with one wake-up per event loop, however many requests wait in it.

    Args:
        futures: What handles gave back.
        clock: Measures the streams among the readers.
    """
    by_loop: dict[_Loop, tuple[list[asyncio.Future[None]], list[asyncio.Future[None]]]] = {}
    for loop, future, is_stream in futures:
        streams, others = by_loop.setdefault(loop, ([], []))
        (streams if is_stream else others).append(future)
    for loop, (streams, others) in by_loop.items():
        try:
            loop.call_soon_threadsafe(_complete, loop, streams, others, clock)
        except RuntimeError:
            # The loop was closed while its task waited: nobody is left to tell.
            continue


def _complete(
    loop: _Loop,
    streams: list[asyncio.Future[None]],
    others: list[asyncio.Future[None]],
    clock: ReaderClock | None,
) -> None:
    if streams:
        started_s = time.thread_time()
        _set_results(streams)
        if clock is not None:
            # Behind the readers just woken, which the loop lets run in this order.
            loop.call_soon(clock.stop, started_s, len(streams))
    _set_results(others)


def _set_results(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


def merge_deltas(deltas: Sequence[Delta]) -> list[Delta]:
    """One delta per answer, in the order in which the answers first appear."""
    if len(deltas) < 2:
        return list(deltas)
    merged: dict[int, Delta] = {}
    for delta in deltas:
        so_far = merged.get(delta.index)
        if so_far is None:
            merged[delta.index] = delta
            continue
        logprobs = so_far.logprobs
        if delta.logprobs is not None:
            logprobs = [*(logprobs or []), *delta.logprobs]
        merged[delta.index] = Delta(
            index=delta.index,
            text=so_far.text + delta.text,
            token_ids=[*so_far.token_ids, *delta.token_ids],
            finish_reason=delta.finish_reason or so_far.finish_reason,
            stop_reason=delta.stop_reason if delta.finish_reason else so_far.stop_reason,
            logprobs=logprobs,
            usage=delta.usage or so_far.usage,
            metrics=delta.metrics or so_far.metrics,
        )
    # The request's last delta carries the usage and must stay last.
    return sorted(merged.values(), key=lambda delta: delta.usage is not None)


def _deltas_of(output: RequestOutput) -> list[Delta]:
    """A finished request as a stream: one delta per answer."""
    deltas = [
        Delta(
            index=answer.index,
            text=answer.text,
            token_ids=list(answer.token_ids),
            finish_reason=answer.finish_reason,
            stop_reason=answer.stop_reason,
            logprobs=answer.logprobs,
        )
        for answer in output.outputs
    ]
    deltas[-1].usage = output.usage
    deltas[-1].metrics = output.metrics
    return deltas
