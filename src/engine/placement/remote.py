"""`RemoteHost`: the parent's side of an engine loop that runs in a child process.

any thread     submit, abort, stream ──► socket ──► child (see `engine.placement.worker`)
reader thread  starts the child, reads its replies, writes them into the handles, wakes each
event loop once per read; learns of the child's end and answers everybody
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import pickle
import queue
import socket
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine.config import EngineConfig, ResolvedConfig
from engine.core.request import Request
from engine.errors import EngineClosedError, EngineDeadError, EngineError
from engine.handle import RequestSink, Wakeups, wake_loops
from engine.loader.resolve import resolve_model
from engine.loop import forked_error
from engine.model_text import ModelText, load_model_text
from engine.placement.channel import MessageReader, MessageWriter
from engine.placement.child import Child
from engine.placement.host import EXIT_TIMEOUT_S, HostFacts
from engine.placement.wire import decode_deltas, decode_error, decode_output, encode_request
from engine.stats import EngineStats

if TYPE_CHECKING:
    from engine.placement.host import AnyRequest

logger = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 60.0
"""For the interpreter to come up; half a second as a rule."""

_READY_TIMEOUT_S = 3600.0
"""For loading the model, from a slow network drive if need be."""

_MILESTONES = {"started": "started", "hello": "up", "ready": "ready"}
_STATS_TIMEOUT_S = 1.0
_SEND_BUFFER_BYTES = 1 << 22


class RemoteHost:
    """Starts a child process with an engine and speaks for it; see `EngineHost`."""

    def __init__(self, config: EngineConfig) -> None:
        started_s = time.monotonic()
        self._name = config.model
        self._pid = os.getpid()
        # What is wrong with the files is found here, before a process is made for them.
        files = resolve_model(
            config.model,
            revision=config.revision,
            local_files_only=config.local_files_only,
            load_format=config.load_format,
        )
        self._sock, childs_sock = socket.socketpair()
        # Long prompts then leave the caller at once. The other way the default is right: what the
        # parent has not read for a while is better merged than queued (see `Outbox`).
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._writer = MessageWriter(self._sock)
        # Guards the decision "accept or refuse" against the child's end.
        self._accept_lock = threading.Lock()
        self._refusal: EngineError | None = None
        self._numbers = itertools.count()
        self._open: dict[int, tuple[AnyRequest, RequestSink]] = {}
        self._number_of: dict[AnyRequest, int] = {}
        self._answers = threading.Condition()
        self._questions = itertools.count(1)
        self._last_answer = 0
        self._milestones: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._child: Child | None = None
        self._stats: EngineStats | None = None
        self._is_over = False
        self._reader = threading.Thread(
            target=self._run, args=(childs_sock,), name=f"engine-{config.model}", daemon=True
        )
        self._reader.start()
        try:
            self._milestone("started", _HELLO_TIMEOUT_S)
            level = logging.getLogger("engine").getEffectiveLevel()
            self._writer.write(("start", config, level))
            self._text = load_model_text(config, files)
            self._milestone("hello", _HELLO_TIMEOUT_S)
            facts, self._resolved_pickle, stats = self._milestone("ready", _READY_TIMEOUT_S)
        except BaseException:
            self._kill()
            raise
        self._stats = stats
        self._facts: HostFacts = dataclasses.replace(facts, start_s=time.monotonic() - started_s)

    def _milestone(self, name: str, timeout_s: float) -> tuple[Any, ...]:
        """Wait for the next step of the start, and take what comes with it."""
        try:
            kind, *details = self._milestones.get(timeout=timeout_s)
        except queue.Empty:
            last_words = "" if self._child is None else f" {self._child.last_words()}"
            msg = (
                f"The engine's process for {self._name!r} was not {_MILESTONES[name]} after "
                f"{timeout_s:g} s and was ended.{last_words}"
            )
            raise EngineDeadError(msg) from None
        if kind == "failed":
            raise details[0]
        assert kind == name, f"{kind!r} came before {name!r}"
        return tuple(details)

    # ---------------------------------------------------------------- EngineHost

    @property
    def text(self) -> ModelText:
        """See `EngineHost`."""
        return self._text

    @property
    def facts(self) -> HostFacts:
        """See `EngineHost`."""
        return self._facts

    @property
    def resolved_config(self) -> ResolvedConfig:
        """See `EngineHost`. Imports torch, whose names for device and dtype are in it."""
        resolved: ResolvedConfig = pickle.loads(self._resolved_pickle)
        return resolved

    @property
    def is_alive(self) -> bool:
        """See `EngineHost`."""
        return self._refusal is None and not self._is_forked()

    def _is_forked(self) -> bool:
        return os.getpid() != self._pid

    def post_submit(self, pairs: Sequence[tuple[AnyRequest, RequestSink]]) -> None:
        """See `EngineHost`."""
        if self._is_forked():
            raise forked_error(self._name, self._pid)
        numbered = [(next(self._numbers), request, sink) for request, sink in pairs]
        records = [encode_request(number, request) for number, request, _ in numbered]
        with self._accept_lock:
            if self._refusal is not None:
                raise self._error_for_caller()
            for number, request, sink in numbered:
                self._open[number] = (request, sink)
                self._number_of[request] = number
        try:
            self._writer.write(("submit", records))
        except BaseException:  # KeyboardInterrupt: the caller will never see the handles
            for _, request, _ in numbered:
                self.post_abort(request)
            raise

    def post_abort(self, request: AnyRequest) -> None:
        """See `EngineHost`."""
        self._post("abort", request)

    def post_stream(self, request: AnyRequest) -> None:
        """See `EngineHost`."""
        self._post("stream", request)

    def _post(self, name: str, request: AnyRequest) -> None:
        number = self._number_of.get(request)
        if number is not None and not self._is_forked():
            self._writer.write((name, number))

    def post_reset_prefix_cache(self) -> None:
        """See `EngineHost`."""
        if self.is_alive:
            self._writer.write(("reset_prefix_cache",))

    def stats(self) -> EngineStats:
        """See `EngineHost`. A question to the child; if it does not answer, the last known."""
        if not self._is_forked() and threading.current_thread() is not self._reader:
            with self._answers:
                question = next(self._questions)
            self._writer.write(("stats", question))
            with self._answers:
                self._answers.wait_for(
                    lambda: self._last_answer >= question or self._is_over, _STATS_TIMEOUT_S
                )
        assert self._stats is not None, "they come with 'ready'"
        return dataclasses.replace(self._stats, start_s=self._facts.start_s)

    def stop(self, *, drain: bool, timeout: float | None) -> bool:
        """See `EngineHost`. A child that does not end by itself is killed."""
        if self._is_forked():
            return False
        msg = f"Engine {self._name!r} is closed. Make a new one to submit requests."
        self._refuse(EngineClosedError(msg))
        if threading.current_thread() is self._reader:
            # The last reference went away in here; the child ends, and then this thread.
            self._hang_up()
            return False
        if drain:
            self._writer.write(("drain",), timeout)
            self._reader.join(timeout)
        if self._reader.is_alive():
            self._hang_up()
            self._reader.join(EXIT_TIMEOUT_S if timeout is None else timeout)
        if self._reader.is_alive():
            self._kill()
        return not self._reader.is_alive()

    def _hang_up(self) -> None:
        """End the stream of orders, upon which the child ends at once."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def _kill(self) -> None:
        self._hang_up()
        if self._child is not None:
            self._child.kill()
        self._reader.join(EXIT_TIMEOUT_S)

    def _error_for_caller(self) -> EngineError:
        """A fresh error of the refusal's kind: every caller adds a traceback of his own."""
        assert self._refusal is not None, "asked only once there is one"
        error = type(self._refusal)(str(self._refusal))
        error.__cause__ = self._refusal.__cause__
        return error

    # ---------------------------------------------------------------- the reader thread

    def _run(self, childs_sock: socket.socket) -> None:
        try:
            child = self._child = Child(childs_sock)
        except Exception as error:
            self._milestones.put(("failed", error))
            end = EngineDeadError(str(error))
            end.__cause__ = error
            self._end(end)
            return
        self._milestones.put(("started",))
        reader = MessageReader(self._sock)
        unreadable: Exception | None = None
        try:
            while (messages := reader.read()) is not None:
                self._take(messages)
        except Exception as error:
            logger.exception("Replies of the engine's process %d cannot be read", child.pid)
            unreadable = error
            child.kill()
        end = EngineDeadError(f"{child.epitaph(child.wait())} Make a new engine.")
        end.__cause__ = unreadable
        self._milestones.put(("failed", end))
        self._end(end)

    def _take(self, messages: list[tuple[Any, ...]]) -> None:
        wakeups: Wakeups = []
        for name, *arguments in messages:
            if name == "replies":
                for number, deltas, output, error in arguments[0]:
                    wakeups += self._publish(number, deltas, output, error)
            elif name == "stats":
                self._take_stats(*arguments)
            elif name == "log":
                _log(*arguments)
            elif name == "ended":
                self._take_ending(*arguments)
            elif name == "failed":
                self._milestones.put(("failed", decode_error(arguments[0])))
            else:
                self._milestones.put((name, *arguments))
        wake_loops(wakeups)

    def _publish(self, number: int, deltas: Any, output: Any, error: Any) -> Wakeups:
        entry = self._open.get(number)
        if entry is None:
            return []
        request, sink = entry
        if output is not None or error is not None:
            del self._open[number]
            del self._number_of[request]
            if isinstance(request, Request):
                request.forget_sequences()
        whole = None if output is None else decode_output(request, output)
        cause = None if error is None else decode_error(error)
        if isinstance(cause, EngineDeadError):
            # Nobody who hears of it may find the engine alive a moment later.
            self._refuse(cause)
        return sink.publish(decode_deltas(deltas, whole), whole, cause)

    def _take_stats(self, question: int, stats: EngineStats) -> None:
        with self._answers:
            self._stats = stats
            self._last_answer = max(self._last_answer, question)
            self._answers.notify_all()

    def _take_ending(self, error: Any, stats: EngineStats) -> None:
        self._take_stats(0, stats)
        if error is None:
            return
        dead = decode_error(error)
        assert isinstance(dead, EngineDeadError), "so a loop ends"
        self._refuse(dead)

    def _refuse(self, reason: EngineError) -> None:
        """Accept nothing more, for this reason unless there was one before."""
        with self._accept_lock:
            if self._refusal is None:
                self._refusal = reason

    def _end(self, error: EngineError) -> None:
        """Refuse new requests, and answer all that are still waiting."""
        self._refuse(error)
        self._sock.close()
        wakeups: Wakeups = []
        waiting = list(self._open.values())
        self._open.clear()
        self._number_of.clear()
        for _, sink in waiting:
            wakeups += sink.publish(error=self._error_for_caller())
        with self._answers:
            self._is_over = True
            if self._stats is not None:
                self._stats = dataclasses.replace(
                    self._stats,
                    running=0,
                    waiting=0,
                    kv_blocks_used=0,
                    requests_failed=self._stats.requests_failed + len(waiting),
                )
            self._answers.notify_all()
        wake_loops(wakeups)


def _log(name: str, level: int, message: str, trace: str | None) -> None:
    """Log a record of the child under its own name, if this process wants it."""
    target = logging.getLogger(name)
    if target.isEnabledFor(level):
        record = target.makeRecord(name, level, "(engine process)", 0, message, (), None)
        record.exc_text = trace
        target.handle(record)
