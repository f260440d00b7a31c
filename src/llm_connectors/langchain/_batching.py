"""Serving a list of prompts at once: one hand-over to the engine instead of a thread each.

LangChain's own `batch` runs `invoke` in at most 32 threads, so a GPU that could run hundreds of
sequences idles. Here all prompts of a list are submitted together and collected as they finish;
the cap LangChain calls `max_concurrency` becomes a window that slides, not waves that wait for
their slowest member.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar

from engine import EngineError, RequestOutput, RequestTimeoutError
from llm_connectors.langchain._fields import CallOptions
from llm_connectors.langchain._streaming import timeout_error, wait
from llm_connectors.langchain.errors import LANGCHAIN_ERRORS

if TYPE_CHECKING:
    from engine import Engine, RequestHandle

MAX_PROMPTS_PER_SUBMIT = 256
"""Prompts rendered and tokenized before they are handed over together: the sequences an engine
runs at once by default. The rest of a longer list is tokenized while these run."""

Prompt = str | list[int]
ResultT = TypeVar("ResultT")


class Run(ABC, Generic[ResultT]):
    """One item of a list call: its input, its callbacks and what becomes of it."""

    @abstractmethod
    def cached(self) -> ResultT | None:
        """The result out of LangChain's cache, if it is there."""

    @classmethod
    @abstractmethod
    def prompts(cls, engine: Engine, runs: Sequence[Self]) -> list[Prompt]:
        """What to submit for each of `runs`, which are of one call.

        Raises:
            EngineError: An input cannot be rendered.
        """

    def options_for(self, engine: Engine, options: CallOptions) -> CallOptions:
        """Options as `engine` is to be given them, the same for all runs of a call."""
        return options

    @abstractmethod
    def result(self, output: RequestOutput) -> ResultT:
        """The engine's output as a result, put into the cache."""

    @abstractmethod
    def end(self, result: ResultT) -> None:
        """Tell the callbacks that the run succeeded."""

    @abstractmethod
    def fail(self, error: BaseException) -> None:
        """Tell the callbacks that the run failed."""


def serve_runs(
    runs: Sequence[Run[ResultT]],
    get_engine: Callable[[CallOptions], Engine],
    get_options: Callable[[], CallOptions],
    *,
    max_in_flight: int | None = None,
    as_completed: bool = False,
    return_exceptions: bool = False,
) -> Generator[tuple[int, ResultT | Exception]]:
    """Serve all runs and yield (index, result or error), each run's callbacks fired exactly once.

    Results from the cache come first, the others in order of submission, or as they finish with
    `as_completed` or a cap.

    Args:
        runs: Runs whose start callbacks have been fired.
        get_engine: Loads the engine; called after the cache, so that hits need no model.
        get_options: Checks the call's options.
        max_in_flight: Requests submitted and not finished at most. `None`: all of them.
        as_completed: Yield in order of completion.
        return_exceptions: Yield an item's error and go on. Otherwise the first error ends
            everything: requests still running are aborted, their runs fail with that error.

    Raises:
        Exception: The first error, unless `return_exceptions`.
    """
    pending = dict(enumerate(runs))
    outcomes = _outcomes(
        runs, get_engine, get_options, max_in_flight=max_in_flight, as_completed=as_completed
    )
    try:
        with closing(outcomes):
            for index, outcome in outcomes:
                run = pending.pop(index)
                if isinstance(outcome, Exception):
                    run.fail(outcome)
                    if not return_exceptions:
                        raise outcome
                else:
                    run.end(outcome)
                yield index, outcome
    except BaseException as error:
        for run in pending.values():
            run.fail(error)
        raise


def _outcomes(
    runs: Sequence[Run[ResultT]],
    get_engine: Callable[[CallOptions], Engine],
    get_options: Callable[[], CallOptions],
    *,
    max_in_flight: int | None,
    as_completed: bool,
) -> Generator[tuple[int, ResultT | Exception]]:
    missing: list[int] = []
    for index, run in enumerate(runs):
        result = run.cached()
        if result is None:
            missing.append(index)
        else:
            yield index, result
    if not missing:
        return
    try:
        with LANGCHAIN_ERRORS.converting():
            options = get_options()
            engine = get_engine(options)
            options = runs[0].options_for(engine, options)
    except EngineError as error:
        yield from ((index, error) for index in missing)
        return
    outputs = serve(
        engine,
        lambda positions: type(runs[0]).prompts(engine, [runs[missing[one]] for one in positions]),
        len(missing),
        options,
        max_in_flight=max_in_flight,
        as_completed=as_completed,
    )
    with closing(outputs):
        for position, output in outputs:
            index = missing[position]
            if isinstance(output, EngineError):
                yield index, LANGCHAIN_ERRORS.convert(output)
            elif isinstance(output, Exception):
                yield index, output
            else:
                yield index, runs[index].result(output)


def serve(
    engine: Engine,
    render: Callable[[Sequence[int]], list[Prompt]],
    num_prompts: int,
    options: CallOptions,
    *,
    max_in_flight: int | None = None,
    as_completed: bool = False,
) -> Generator[tuple[int, RequestOutput | Exception]]:
    """Submit all prompts and yield (index, output or error). Leaving early aborts the rest.

    Args:
        engine: Who serves.
        render: The prompts of some indices, rendered together; may raise `EngineError`.
        num_prompts: Their indices are 0 to `num_prompts` - 1.
        options: The same for all.
        max_in_flight: Requests submitted and not finished at most. `None`: all of them.
        as_completed: Yield in order of completion instead of submission.
    """
    limit = max_in_flight or num_prompts
    is_capped = limit < num_prompts
    collector = _AsCompleted(options) if is_capped or as_completed else _InOrder(options)
    num_submitted = num_in_flight = 0
    try:
        while num_submitted < num_prompts or num_in_flight:
            room = min(limit - num_in_flight, MAX_PROMPTS_PER_SUBMIT, num_prompts - num_submitted)
            if room > 0:
                indices = range(num_submitted, num_submitted + room)
                num_submitted += room
                handles, failed = _submit(engine, render, indices, options)
                for index, handle in handles:
                    collector.add(index, handle)
                num_in_flight += len(handles)
                yield from failed
            else:
                yield collector.take()
                num_in_flight -= 1
    finally:
        collector.close()


async def aserve(
    engine: Engine,
    render: Callable[[Sequence[int]], list[Prompt]],
    num_prompts: int,
    options: CallOptions,
) -> AsyncGenerator[tuple[int, RequestOutput | Exception]]:
    """`serve` for an event loop: all at once, in order of submission, no time limit.

    Prompts are rendered in a worker thread. Leaving early, or cancelling, aborts the rest.
    """
    handles: list[tuple[int, RequestHandle]] = []
    try:
        for start in range(0, num_prompts, MAX_PROMPTS_PER_SUBMIT):
            indices = range(start, min(start + MAX_PROMPTS_PER_SUBMIT, num_prompts))
            ready, failed = await asyncio.to_thread(_rendered, render, indices)
            # Not in the thread as well: a cancelled task could not abort what it never saw.
            submitted, refused = _hand_over(engine, ready, options)
            handles += submitted
            for index, error in (*failed, *refused):
                yield index, error
        for index, handle in handles:
            try:
                outcome: RequestOutput | Exception = await handle
            except Exception as error:
                outcome = error
            yield index, outcome
    finally:
        for _index, handle in handles:
            handle.abort()


def _submit(
    engine: Engine,
    render: Callable[[Sequence[int]], list[Prompt]],
    indices: Sequence[int],
    options: CallOptions,
) -> tuple[list[tuple[int, RequestHandle]], list[tuple[int, EngineError]]]:
    """Hand prompts over so that they start in the same step; errors stay with their prompt."""
    ready, failed = _rendered(render, indices)
    handles, refused = _hand_over(engine, ready, options)
    return handles, failed + refused


def _hand_over(
    engine: Engine, ready: list[tuple[int, Prompt]], options: CallOptions
) -> tuple[list[tuple[int, RequestHandle]], list[tuple[int, EngineError]]]:
    handles: list[tuple[int, RequestHandle]] = []
    failed: list[tuple[int, EngineError]] = []
    if not ready:
        return handles, failed
    try:
        submitted = engine.submit_many(
            [prompt for _index, prompt in ready], options.params, **options.submit
        )
        handles = list(zip((index for index, _prompt in ready), submitted, strict=True))
    except EngineError:
        # One bad prompt refuses the whole hand-over; find out which.
        for index, prompt in ready:
            try:
                handles.append((index, engine.submit(prompt, options.params, **options.submit)))
            except EngineError as error:
                failed.append((index, error))
    return handles, failed


def _rendered(
    render: Callable[[Sequence[int]], list[Prompt]], indices: Sequence[int]
) -> tuple[list[tuple[int, Prompt]], list[tuple[int, EngineError]]]:
    """All prompts together or, where one cannot be rendered, each by itself."""
    try:
        return list(zip(indices, render(indices), strict=True)), []
    except EngineError:
        ready: list[tuple[int, Prompt]] = []
        failed: list[tuple[int, EngineError]] = []
        for index in indices:
            try:
                ready += [(index, prompt) for prompt in render([index])]
            except EngineError as error:
                failed.append((index, error))
        return ready, failed


class _Collector(Protocol):
    """Waits for submitted requests."""

    def add(self, index: int, handle: RequestHandle) -> None:
        """Wait for this one too. Its time limit starts now."""

    def take(self) -> tuple[int, RequestOutput | Exception]:
        """The next finished request. Blocks."""

    def close(self) -> None:
        """Abort what was not taken."""


class _InOrder:
    """First submitted, first taken. Costs nothing beside the waiting."""

    def __init__(self, options: CallOptions) -> None:
        self._timeout = options.timeout
        self._waiting: deque[tuple[int, RequestHandle, float]] = deque()

    def add(self, index: int, handle: RequestHandle) -> None:
        deadline = time.monotonic() + (self._timeout or 0.0)
        self._waiting.append((index, handle, deadline))

    def take(self) -> tuple[int, RequestOutput | Exception]:
        index, handle, deadline = self._waiting[0]
        left = None if self._timeout is None else max(0.0, deadline - time.monotonic())
        try:
            outcome: RequestOutput | Exception = handle.result(timeout=left)
        except RequestTimeoutError:
            outcome = timeout_error(handle.request_id, self._timeout)  # names the whole limit
        except Exception as error:
            outcome = error
        self._waiting.popleft()  # only now: a KeyboardInterrupt while waiting must abort it
        return index, outcome

    def close(self) -> None:
        for _index, handle, _deadline in self._waiting:
            handle.abort()


class _AsCompleted:
    """Whoever finishes first. One thread with an event loop watches all requests."""

    def __init__(self, options: CallOptions) -> None:
        self._timeout = options.timeout
        self._finished: queue.SimpleQueue[tuple[int, RequestOutput | Exception]] = (
            queue.SimpleQueue()
        )
        self._loop = asyncio.new_event_loop()
        self._watchers: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(
            target=self._run_loop, name="llm-connectors-batch", daemon=True
        )
        self._thread.start()

    def add(self, index: int, handle: RequestHandle) -> None:
        self._loop.call_soon_threadsafe(self._start_watching, index, handle)

    def take(self) -> tuple[int, RequestOutput | Exception]:
        return self._finished.get()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run_loop(self) -> None:
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._cancel_watchers())
        finally:
            self._loop.close()

    async def _cancel_watchers(self) -> None:
        """Cancelling a task that awaits a request aborts the request."""
        watchers = list(self._watchers)
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)

    def _start_watching(self, index: int, handle: RequestHandle) -> None:
        watcher = self._loop.create_task(self._watch(index, handle))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)

    async def _watch(self, index: int, handle: RequestHandle) -> None:
        try:
            outcome: RequestOutput | Exception = await wait(handle, self._timeout)
        except Exception as error:
            outcome = error
        self._finished.put((index, outcome))
