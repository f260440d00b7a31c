"""The child process: a `LoopHost` that takes its orders from a socket.

    main thread      reads orders: submit, abort, stream, reset, stats, drain; the end of the stream
                     (parent closed or gone) ends this process at once
    life thread      loads the model, waits for the loop's end, says goodbye
    engine thread    the loop; its replies go out once per step (see `Outbox`)

Started by `engine.placement.child`. This process is ours: nothing here has to mind a host program.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.config import EngineConfig
from engine.constraints.compiler import ConstraintCompiler
from engine.errors import EngineClosedError, EngineError
from engine.handle import Wakeups
from engine.loop import refusal_for_caller
from engine.outputs import Delta, RequestOutput
from engine.placement.channel import MessageReader
from engine.placement.outbox import Outbox
from engine.placement.wire import AnyRecord, decode_request, encode_error

if TYPE_CHECKING:
    from engine.placement.host import AnyRequest
    from engine.placement.local import LoopHost

logger = logging.getLogger(__name__)

_SWITCH_INTERVAL_S = 0.0002
"""How long an order waits at most for an engine thread that does not give up the GIL."""

_PR_SET_PDEATHSIG = 1


class _Sink:
    """The child's end of one request: what the engine thread publishes goes to the outbox."""

    __slots__ = ("_number", "_outbox", "_requests")

    def __init__(self, number: int, outbox: Outbox, requests: dict[int, AnyRequest]) -> None:
        self._number = number
        self._outbox = outbox
        self._requests = requests

    def publish(
        self,
        deltas: Sequence[Delta] | None = None,
        output: RequestOutput | None = None,
        error: BaseException | None = None,
    ) -> Wakeups:
        if output is not None or error is not None:
            self._requests.pop(self._number, None)
        self._outbox.reply(self._number, deltas or (), output, error)
        return []


class _LogForwarder(logging.Handler):
    """Sends log records to the parent, whose handlers decide what becomes of them."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__()
        self._outbox = outbox
        self._formatter = logging.Formatter()

    def emit(self, record: logging.LogRecord) -> None:
        trace = None
        if record.exc_info:
            trace = self._formatter.formatException(record.exc_info)
        self._outbox.send("log", record.name, record.levelno, record.getMessage(), trace)


class _Worker:
    def __init__(self, sock: socket.socket) -> None:
        self._reader = MessageReader(sock)
        self._outbox = Outbox(sock)
        self._requests: dict[int, AnyRequest] = {}
        self._host: LoopHost | None = None
        self._compiler: ConstraintCompiler | None = None

    def serve(self) -> None:
        """Follow orders until the parent has no more."""
        while (messages := self._reader.read()) is not None:
            for name, *arguments in messages:
                getattr(self, f"_do_{name}")(*arguments)
        if self._host is not None:
            self._outbox.send("ended", None, self._host.stats())
        os._exit(0)

    # ---------------------------------------------------------------- orders

    def _do_start(self, config: EngineConfig, log_level: int) -> None:
        package_logger = logging.getLogger("engine")
        package_logger.addHandler(_LogForwarder(self._outbox))
        package_logger.propagate = False
        package_logger.setLevel(log_level)
        self._outbox.send("hello")
        threading.Thread(target=self._live, args=(config,), name="engine-life").start()

    def _do_submit(self, records: list[AnyRecord]) -> None:
        pairs = []
        for record in records:
            sink = _Sink(record.number, self._outbox, self._requests)
            try:
                request = decode_request(record, self._constraint_compiler())
            except EngineError as error:
                sink.publish(error=error)
                self._outbox.flush()
                continue
            self._requests[record.number] = request
            pairs.append((request, sink))
        try:
            self._engine.post_submit(pairs)
        except EngineError as error:
            for _, sink in pairs:
                sink.publish(error=error)
            self._outbox.flush()

    def _constraint_compiler(self) -> ConstraintCompiler:
        if self._compiler is None:
            text = self._engine.text
            self._compiler = ConstraintCompiler(
                text.tokenizer,
                self._engine.facts.vocab_size,
                text.eos_token_ids,
                has_many_threads=self._engine.facts.device.startswith("cuda"),
            )
        return self._compiler

    def _do_abort(self, number: int) -> None:
        request = self._requests.get(number)
        if request is not None:
            self._engine.post_abort(request)

    def _do_stream(self, number: int) -> None:
        request = self._requests.get(number)
        if request is not None:
            self._engine.post_stream(request)

    def _do_reset_prefix_cache(self) -> None:
        self._engine.post_reset_prefix_cache()

    def _do_stats(self, question: int) -> None:
        self._outbox.send("stats", question, self._engine.stats())

    def _do_drain(self) -> None:
        # The life thread sees the loop's end; this thread must hear of a change of mind.
        threading.Thread(
            target=self._engine.loop.stop, kwargs={"drain": True, "timeout": None}, daemon=True
        ).start()

    @property
    def _engine(self) -> LoopHost:
        assert self._host is not None, "the parent waits for 'ready' before it gives orders"
        return self._host

    # ---------------------------------------------------------------- life

    def _live(self, config: EngineConfig) -> None:
        try:
            # torch is first imported here, so that the main thread hears the parent meanwhile.
            from engine.placement.local import start_loop_host

            host = self._host = start_loop_host(config, self._outbox.flush)
        except BaseException as error:
            self._outbox.finish("failed", encode_error(error))
            os._exit(1)
        self._outbox.send("ready", host.facts, pickle.dumps(host.resolved_config), host.stats())
        cause = host.loop.join()
        if isinstance(cause, EngineClosedError):
            self._outbox.finish("ended", None, host.stats())
            os._exit(0)
        self._outbox.finish("ended", encode_error(refusal_for_caller(cause)), host.stats())
        os._exit(1)


def main(socket_fd: int) -> None:
    """Serve the parent at the other end of `socket_fd` until it is gone."""
    _die_with_parent()
    faulthandler.enable()
    # Ctrl-C is the parent's affair.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    # What this process starts, such as a compiler, must not keep the parent from seeing its end.
    os.set_inheritable(socket_fd, False)
    _Worker(socket.socket(fileno=socket_fd)).serve()


def _die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends (Linux).

    The end of the socket's stream says so everywhere, but takes a moment in which the engine thread
    lets go of the GIL, and a process forked from the parent may hold the other end open.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
