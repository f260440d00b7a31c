"""`Outbox`: what a child process has to say to its parent, in one message per step.

    engine thread   reply … reply, flush ──┐
    main thread     send(stats)            ├─► socket, without waiting
    any thread      send(log record)     ──┘      │ full
                                                  ▼
                                    a thread that waits, until all is out

The engine thread never waits for the parent. While the socket is full, replies stay here and those
of one request melt into one, so a parent that does not get to read is not flooded: it later finds
one delta per request, not one per token.
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.handle import Wakeups, merge_deltas
from engine.outputs import Delta
from engine.placement.channel import pack
from engine.placement.wire import AnyOutput, encode_deltas, encode_error, encode_output


@dataclass(slots=True)
class _Reply:
    """What is new about one request since the last message."""

    deltas: list[Delta] = field(default_factory=list)
    output: AnyOutput | None = None
    error: BaseException | None = None

    def record(self, number: int) -> tuple[Any, ...]:
        return (
            number,
            encode_deltas(merge_deltas(self.deltas)),
            None if self.output is None else encode_output(self.output),
            None if self.error is None else encode_error(self.error),
        )


class Outbox:
    """Sends without ever blocking the sender. Any thread may use it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._replies: dict[int, _Reply] = {}
        self._frames: deque[memoryview] = deque()
        self._writer: threading.Thread | None = None

    def reply(
        self,
        number: int,
        deltas: Sequence[Delta],
        output: AnyOutput | None,
        error: BaseException | None,
    ) -> None:
        """Note what is new about request `number`; `flush` sends it."""
        with self._lock:
            reply = self._replies.get(number)
            if reply is None:
                reply = self._replies[number] = _Reply()
            reply.deltas += deltas
            reply.output = output
            reply.error = error

    def flush(self, _wakeups: Wakeups | None = None) -> None:
        """Send all replies as one message. The engine loop calls it once per step."""
        if not self._replies:
            return
        with self._lock:
            if self._writer is None:
                self._post(self._take_replies())

    def send(self, *message: Any) -> None:
        """Send a message of its own, behind the replies sent so far."""
        with self._lock:
            self._post(pack(message))

    def finish(self, *message: Any) -> None:
        """Send all replies and a last message, and wait until the parent's socket has them."""
        self.flush()
        while (writer := self._writer) is not None:
            writer.join()
        self.flush()
        self.send(*message)
        while (writer := self._writer) is not None:
            writer.join()

    def _take_replies(self) -> bytes:
        records = [reply.record(number) for number, reply in self._replies.items()]
        self._replies.clear()
        return pack(("replies", records))

    def _post(self, frame: bytes) -> None:
        """Send what the socket takes now, and leave the rest to a thread. Under the lock."""
        data = memoryview(frame)
        if self._writer is None:
            try:
                data = data[self._sock.send(data, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                pass
            except OSError:
                return  # The parent is gone; the main thread is about to notice.
            if not data:
                return
            self._writer = threading.Thread(target=self._write_rest, daemon=True)
            self._writer.start()
        self._frames.append(data)

    def _write_rest(self) -> None:
        while True:
            with self._lock:
                if not self._frames and self._replies:
                    self._frames.append(memoryview(self._take_replies()))
                if not self._frames:
                    self._writer = None
                    return
                data = self._frames.popleft()
            try:
                self._sock.sendall(data)
            except OSError:
                with self._lock:
                    self._frames.clear()
                    self._replies.clear()
                    self._writer = None
                return
