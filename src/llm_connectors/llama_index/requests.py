"""One submitted request and its four ways out: wait, await, iterate, iterate asynchronously.

All endpoints of `LocalLLM` come through here, so that sync and async, whole and streamed answers
cannot differ. Nothing here is bound to an event loop: the engine's handle binds to the loop it is
read in, per call.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Generator
from typing import TYPE_CHECKING, Any, TypeVar

from engine import Delta, EngineError, RequestTimeoutError
from llm_connectors.llama_index.errors import ERRORS
from llm_connectors.llama_index.responses import Answer, GrowingAnswer, whole_answer

if TYPE_CHECKING:
    from engine import RequestHandle
    from llm_connectors._answer_plan import AnswerStream

T = TypeVar("T")


class PendingAnswer:
    """A request that is running. Read it once, in one of the four ways.

    Args:
        handle: The engine's handle.
        model_name: For the response's `raw`.
        timeout: Seconds from now until the request is aborted; None waits.
        reader: Parts reasoning, text and tool calls; None for an answer that is plain text.
    """

    def __init__(
        self,
        handle: RequestHandle,
        model_name: str,
        timeout: float | None,
        reader: AnswerStream | None = None,
    ) -> None:
        self._reader = reader
        self._handle = handle
        self._model_name = model_name
        self._timeout = timeout
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._finalizer: weakref.finalize[..., Any] | None = None

    def abort(self) -> None:
        """Give up; nothing happens to a request that is done."""
        self._handle.abort()

    def wait(self) -> Answer:
        """Block until the answer is whole.

        The engine runs in a thread of its own, so a call inside a running event loop blocks that
        loop but cannot deadlock.
        """
        with ERRORS.converting():
            output = self._handle.result(timeout=self._remaining())
            return whole_answer(output, self._model_name, self._reader)

    async def wait_async(self) -> Answer:
        """Await the whole answer; cancelling the task aborts the request."""
        with ERRORS.converting():
            try:
                async with asyncio.timeout(self._remaining()):
                    output = await self._handle
            except TimeoutError as error:
                if isinstance(error, EngineError):
                    raise
                raise self._timeout_error() from None
            return whole_answer(output, self._model_name, self._reader)

    def stream(self, convert: Callable[[Answer], T]) -> Generator[T, None, None]:
        """Answers so far, the last one whole. Closing or dropping the generator aborts."""
        return self._abort_when_dropped(self._stream(convert))

    def stream_async(self, convert: Callable[[Answer], T]) -> AsyncGenerator[T, None]:
        """`stream`, asynchronous."""
        return self._abort_when_dropped(self._stream_async(convert))

    def _stream(self, convert: Callable[[Answer], T]) -> Generator[T, None, None]:
        answers = GrowingAnswer(self._handle.request_id, self._model_name, self._reader)
        # The engine's iterator has no time limit of its own; aborting ends it.
        remaining = self._remaining()
        timer = None if remaining is None else threading.Timer(remaining, self._handle.abort)
        try:
            if timer is not None:
                timer.daemon = True
                timer.start()
            with ERRORS.converting():
                for delta in self._handle:
                    self._check_deadline(delta)
                    answer = answers.add(delta)
                    if answer is not None:
                        yield convert(answer)
        finally:
            if timer is not None:
                timer.cancel()
            self._give_up()

    async def _stream_async(self, convert: Callable[[Answer], T]) -> AsyncGenerator[T, None]:
        answers = GrowingAnswer(self._handle.request_id, self._model_name, self._reader)
        remaining = self._remaining()
        loop = asyncio.get_running_loop()
        timer = None if remaining is None else loop.call_later(remaining, self._handle.abort)
        try:
            with ERRORS.converting():
                async for delta in self._handle:
                    self._check_deadline(delta)
                    answer = answers.add(delta)
                    if answer is not None:
                        yield convert(answer)
        finally:
            if timer is not None:
                timer.cancel()
            self._give_up()

    def _abort_when_dropped(self, stream: T) -> T:
        # A generator that was never started runs no `finally` when it is dropped.
        self._finalizer = weakref.finalize(stream, self._handle.abort)
        self._finalizer.atexit = False
        return stream

    def _give_up(self) -> None:
        self._handle.abort()
        # A failed request's error leads, by its traceback, back to the stream: with the finalizer
        # in place that would keep itself, and the engine, for ever.
        if self._finalizer is not None:
            self._finalizer.detach()

    def _remaining(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _check_deadline(self, delta: Delta) -> None:
        if delta.finish_reason == "abort" and self._remaining() == 0.0:
            raise self._timeout_error()

    def _timeout_error(self) -> RequestTimeoutError:
        msg = (
            f"Request {self._handle.request_id} was not finished after {self._timeout} s and was "
            "aborted. Allow more time (timeout=...) or ask for fewer tokens."
        )
        return RequestTimeoutError(msg)
