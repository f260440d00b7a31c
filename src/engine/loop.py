"""The engine thread: take requests in, schedule, run, publish; one thread per engine.

    any thread ──post──► inbox ──► scheduler ──► runner ──► output processor ──► handles
                                      ▲            │  several steps launched before the
                                      └── complete ┘  oldest one's result is read (launch_ahead)

Everything the loop owns (scheduler, runner, output processor) is touched by this thread alone.
Other threads only append commands to the inbox, a deque, and set an event that wakes an idle loop.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from engine.core.batch import ScheduledBatch, StepOutput
from engine.core.request import Request
from engine.errors import EngineClosedError, EngineDeadError, StepError
from engine.handle import RequestSink, Wakeups, wake_loops
from engine.launch_ahead import LaunchAhead
from engine.stats import Counters

if TYPE_CHECKING:
    from engine.core.output import OutputProcessor
    from engine.core.scheduler import Scheduler

logger = logging.getLogger(__name__)


class PendingStep(Protocol):
    """A launched step (see `engine.runner.pending_step.PendingStep`)."""

    @property
    def is_done(self) -> bool:
        """True once `wait` would not block."""

    def wait(self) -> StepOutput:
        """The step's result, once the device has it."""


class Runner(Protocol):
    """What the loop needs of a model runner; tests bring a fake one."""

    def execute(self, batch: ScheduledBatch) -> PendingStep:
        """Launch one step."""

    def free_row(self, row: int) -> None:
        """The sequence in `row` ended."""

    def check_health(self) -> None:
        """Raise if the device can no longer be used at all."""


@dataclass(slots=True, frozen=True)
class _Submit:
    pairs: Sequence[tuple[Request, RequestSink]]


@dataclass(slots=True, frozen=True)
class _Abort:
    request: Request


@dataclass(slots=True, frozen=True)
class _Stream:
    request: Request


@dataclass(slots=True, frozen=True)
class _ResetPrefixCache:
    pass


class EngineLoop:
    """Runs steps until told to stop. `start`, `post_*` and `stop` may be called by any thread.

    Args:
        name: For the thread's name and the log.
        scheduler: Decides who runs.
        runner: Runs it.
        outputs: Turns tokens into deltas and outputs.
        counters: Counts steps and tokens.
        max_steps_in_flight: Steps launched before the oldest result is read, at most.
        publish: Called once per hand-over with the futures to complete.
    """

    def __init__(
        self,
        *,
        name: str,
        scheduler: Scheduler,
        runner: Runner,
        outputs: OutputProcessor,
        counters: Counters,
        max_steps_in_flight: int,
        publish: Callable[[Wakeups], None] = wake_loops,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._outputs = outputs
        self._counters = counters
        self._ahead = LaunchAhead(max_steps_in_flight)
        self._publish_wakeups = publish
        self._inbox: deque[_Submit | _Abort | _Stream | _ResetPrefixCache] = deque()
        self._wake = threading.Event()
        self._in_flight: deque[tuple[ScheduledBatch, PendingStep]] = deque()
        # Guards the decision "accept or refuse" against the loop's end, so that no request is
        # accepted that nobody will ever answer.
        self._accept_lock = threading.Lock()
        self._refusal: BaseException | None = None
        self._stop_mode: str | None = None
        self._thread: threading.Thread | None = None
        # A forked child gets this object without its thread: nobody would ever answer there.
        self._pid = os.getpid()
        self.name = name

    # ---------------------------------------------------------------- any thread

    def start(self, run_inside: Callable[[Callable[[], None]], None]) -> None:
        """Start the thread; `run_inside(body)` sets up the thread's state and calls `body`."""
        self._thread = threading.Thread(
            target=run_inside, args=(self._run,), name=f"engine-{self.name}", daemon=True
        )
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """True while the thread runs and accepts requests."""
        return self._refusal is None and not self._is_forked()

    def _is_forked(self) -> bool:
        return os.getpid() != self._pid

    def post_submit(self, pairs: Sequence[tuple[Request, RequestSink]]) -> None:
        """Hand over requests; all of them are seen by the same step.

        Raises:
            EngineClosedError: The engine was closed.
            EngineDeadError: The loop ended with an error.
        """
        if self._is_forked():
            raise forked_error(self.name, self._pid)
        with self._accept_lock:
            if self._refusal is not None:
                raise refusal_for_caller(self._refusal)
            self._inbox.append(_Submit(pairs))
        self._wake.set()

    def post_abort(self, request: Request) -> None:
        """Ask for the end of `request`; no effect once it is finished."""
        self._inbox.append(_Abort(request))
        self._wake.set()

    def post_stream(self, request: Request) -> None:
        """Somebody iterates over the request's handle: publish its deltas from now on."""
        self._inbox.append(_Stream(request))
        self._wake.set()

    def post_reset_prefix_cache(self) -> None:
        """Forget all cached prefixes before the next submitted request."""
        self._inbox.append(_ResetPrefixCache())
        self._wake.set()

    def stop(self, *, drain: bool, timeout: float | None) -> bool:
        """End the thread and wait for it.

        Args:
            drain: Finish what was submitted first; otherwise running requests end with
                `EngineClosedError`.
            timeout: Seconds to wait; after them a draining loop is told to end at once.

        Returns:
            True once the thread has ended.
        """
        if self._is_forked():
            return False
        with self._accept_lock:
            if self._refusal is None:
                self._refusal = EngineClosedError(
                    f"Engine {self.name!r} is closed. Make a new one to submit requests."
                )
            if self._stop_mode != "now":
                self._stop_mode = "drain" if drain else "now"
        self._wake.set()
        thread = self._thread
        if thread is None:
            return True
        if thread is threading.current_thread():
            # The last reference went away in here; the loop ends by itself after this step.
            return False
        thread.join(timeout)
        if thread.is_alive() and drain:
            self._stop_mode = "now"
            self._wake.set()
            thread.join(timeout)
        return not thread.is_alive()

    def join(self) -> BaseException:
        """Wait for the loop's end, whatever ends it. Returns why it accepts nothing more."""
        assert self._thread is not None, "start comes first"
        self._thread.join()
        assert self._refusal is not None, "a loop that has ended refuses requests"
        return self._refusal

    # ---------------------------------------------------------------- the engine thread

    def _run(self) -> None:
        try:
            while not self._should_end():
                self._take_inbox()
                if self._step():
                    continue
                self._publish()
                assert not self._scheduler.has_unfinished or self._inbox, (
                    "the scheduler has sequences but schedules none"
                )
                # Cleared before the inbox is looked at again, so that a post between the look
                # and the wait is not lost.
                self._wake.clear()
                if not self._inbox and self._stop_mode is None:
                    self._wake.wait()
            self._end(EngineClosedError(f"Engine {self.name!r} was closed."))
        except BaseException as error:  # every waiting caller must learn of it
            logger.exception("The engine loop of %s ended with an error", self.name)
            self._end(error)

    def _should_end(self) -> bool:
        if self._stop_mode == "now":
            return True
        is_idle = not self._inbox and not self._in_flight and not self._scheduler.has_unfinished
        return self._stop_mode == "drain" and is_idle

    def _take_inbox(self) -> None:
        while self._inbox:
            command = self._inbox.popleft()
            if isinstance(command, _Submit):
                for request, handle in command.pairs:
                    self._outputs.add(request, handle)
                    for seq in request.sequences:
                        self._scheduler.add(seq)
            elif isinstance(command, _Abort):
                self._outputs.abort(command.request)
            elif isinstance(command, _Stream):
                self._outputs.start_stream(command.request)
            else:
                self._scheduler.reset_prefix_cache()

    def _step(self) -> bool:
        """Launch what may be launched, then read what is done. False: nothing to do."""
        started_s = time.perf_counter()
        has_launched = self._launch_steps()
        num_settled = self._outputs.settle()
        if not self._in_flight:
            return has_launched or num_settled > 0
        host_s = time.perf_counter() - started_s
        self._ahead.wait(self._in_flight[0][1], len(self._in_flight))
        arrived_s = time.perf_counter()
        num_steps, num_new_tokens = 0, num_settled
        while self._in_flight and (not num_steps or self._in_flight[0][1].is_done):
            batch, pending = self._in_flight.popleft()
            try:
                output = pending.wait()
            except Exception as error:
                self._fail_step(error)
                return True
            num_new_tokens += self._outputs.process(batch, output)
            num_steps += 1
        self._ahead.note_done(num_steps, is_queue_empty=not self._in_flight)
        self._publish()
        host_s += time.perf_counter() - arrived_s
        self._counters.count_steps(num_steps, num_new_tokens, host_s)
        return True

    def _launch_steps(self) -> bool:
        """Launch until the device has enough to do; False: nobody could be scheduled."""
        if not self._in_flight:
            self._ahead.begin()
        has_launched = False
        while len(self._in_flight) < self._ahead.depth:
            batch = self._scheduler.schedule()
            if batch is None:
                break
            has_launched = True
            try:
                self._in_flight.append((batch, self._runner.execute(batch)))
            except Exception as error:
                # Those launched before end with it: the scheduler has counted on all of them.
                self._fail_step(error)
                break
        return has_launched

    def _fail_step(self, error: Exception) -> None:
        """End the requests of a failed step, and of all launched with it, with a `StepError`.

        Steps launched later read tokens and KV blocks that the failed one should have written, so
        their requests end too. Whoever waits, or was not scheduled, goes on.
        """
        logger.warning("A step failed; its requests end with StepError", exc_info=error)
        while self._in_flight:
            _, pending = self._in_flight.popleft()
            try:
                pending.wait()
            except Exception:
                logger.debug("A step launched with the failed one failed too", exc_info=True)
        self._outputs.fail_steps(lambda: _step_error(error))
        self._publish()
        self._runner.check_health()

    def _publish(self) -> None:
        self._publish_wakeups(self._outputs.take_wakeups())

    def _end(self, error: BaseException) -> None:
        """Refuse new requests, and answer all that are still waiting with the cause."""
        with self._accept_lock:
            if self._refusal is None:
                self._refusal = error
        while self._inbox:
            command = self._inbox.popleft()
            if isinstance(command, _Submit):
                for _, handle in command.pairs:
                    self._publish_wakeups(handle.publish(error=refusal_for_caller(error)))
        self._in_flight.clear()
        try:
            self._outputs.fail_all(lambda: refusal_for_caller(error))
        except Exception:
            # Everybody has been answered by then; only the books of a dead engine are off.
            logger.exception("The state of %s could not be cleaned up", self.name)
        self._publish()


def forked_error(name: str, pid: int) -> EngineClosedError:
    """What a child forked from the process `pid`, where the engine is, gets for its requests."""
    return EngineClosedError(
        f"Engine {name!r} runs in the process {pid} that this one was forked from. Make an engine "
        "in this process, or start it with the 'spawn' method."
    )


def refusal_for_caller(cause: BaseException) -> BaseException:
    """A fresh `EngineClosedError` or `EngineDeadError` with its cause, one per caller."""
    if isinstance(cause, EngineClosedError):
        return EngineClosedError(str(cause))
    error = EngineDeadError(
        f"The engine loop ended with {type(cause).__name__}: {cause}. Make a new engine."
    )
    error.__cause__ = cause
    return error


def _step_error(cause: Exception) -> StepError:
    is_out_of_memory = "out of memory" in str(cause).lower() or isinstance(cause, MemoryError)
    advice = (
        "Lower gpu_memory_utilization or max_num_batched_tokens."
        if is_out_of_memory
        else "The engine goes on; submit the request again."
    )
    error = StepError(
        f"The step this request ran in failed with {type(cause).__name__}: {cause}. {advice}"
    )
    error.__cause__ = cause
    return error
