"""`Child`: the process that runs an engine for this one; its start, its stderr and its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import engine
from engine.errors import ConfigError

_TAIL_BYTES = 16384
_EXIT_GRACE_S = 5.0
"""From the end of the child's stream to the end of the process; it has nothing to do then."""

_BOOTSTRAP = """\
import importlib.machinery, importlib.util, json, sys
fd, root, sys.path[:] = json.loads(sys.argv[1])
sys.argv[1:] = []
spec = importlib.machinery.PathFinder.find_spec("engine", [root])
package = sys.modules["engine"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from engine.placement.worker import main
main(fd)
"""
"""Not `-m`: that would look for `engine` in the current directory, or along a path of its own. This
finds the very package that the parent runs, wherever that came from, and everything else along the
parent's `sys.path`. No module of the user's is imported, so scripts need no `__main__` guard."""


class Child:
    """A running child process.

    Make it in a thread that lives as long as the child should: Linux kills the child when the
    *thread* that started it ends (see `engine.placement.worker`).

    Args:
        sock: The child's end of the socket; closed here.

    Raises:
        ConfigError: Processes of this kind cannot be started here.
    """

    def __init__(self, sock: socket.socket) -> None:
        root = Path(engine.__file__).parents[1]
        path = [entry for entry in sys.path if isinstance(entry, str) and entry]
        arguments = json.dumps([sock.fileno(), str(root), path])
        try:
            self._process = subprocess.Popen(
                # -P keeps the current directory out of the bootstrap's own imports.
                [_interpreter(), "-P", "-c", _BOOTSTRAP, arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(sock.fileno(),),
                # A session of its own: Ctrl-C and a closed terminal reach the parent alone.
                start_new_session=True,
            )
        except OSError as error:
            msg = f"placement='process' could not start {sys.executable!r}: {error}."
            raise ConfigError(msg) from error
        finally:
            sock.close()
        self.pid = self._process.pid
        self._tail = bytearray()
        self._relay = threading.Thread(
            target=self._pass_on_stderr, name=f"engine-stderr-{self.pid}", daemon=True
        )
        self._relay.start()

    def kill(self) -> None:
        """End it without asking; no effect once it has ended."""
        self._process.kill()

    def wait(self) -> int:
        """Wait for its end, which is near, and make sure of it.

        Returns:
            Its exit status, negative for a signal.
        """
        try:
            status = self._process.wait(_EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        # What it said last may still be on its way.
        self._relay.join(1.0)
        return status

    def epitaph(self, status: int) -> str:
        """How it ended and what it last wrote to stderr, in sentences."""
        how = f"ended with exit code {status}"
        if status < 0:
            how = f"was killed by signal {-status} ({signal.strsignal(-status)})"
        if status == -signal.SIGKILL:
            how += ", as the system does when memory runs out"
        return f"The engine's process {self.pid} {how}. {self.last_words()}"

    def last_words(self) -> str:
        """What it last wrote to stderr, in a sentence."""
        tail = self._tail.decode(errors="replace").strip()
        return f"The last it wrote to stderr:\n{tail}" if tail else "It wrote nothing to stderr."

    def _pass_on_stderr(self) -> None:
        """Copy what it writes to this process's stderr, and remember the last of it.

        To the file descriptor, as if the child had inherited it: writing to `sys.stderr` from a
        thread like this one can crash the interpreter's exit.
        """
        assert self._process.stdout is not None, "made with a pipe"
        with self._process.stdout as pipe:
            while data := os.read(pipe.fileno(), 1 << 16):
                self._tail += data
                del self._tail[:-_TAIL_BYTES]
                with contextlib.suppress(OSError):
                    os.write(2, data)


def _interpreter() -> str:
    if sys.platform == "win32":
        msg = "placement='process' is not available on Windows. Use placement='thread'."
        raise ConfigError(msg)
    if not sys.executable or getattr(sys, "frozen", False):
        msg = (
            "placement='process' starts a second Python interpreter, and this program has none "
            f"(sys.executable is {sys.executable!r}). Use placement='thread'."
        )
        raise ConfigError(msg)
    return sys.executable
