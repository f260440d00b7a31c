"""Wait for many requests, with a progress bar."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from engine.handle import RequestHandle
from engine.outputs import RequestOutput

_REFRESH_S = 0.1


def wait_for_all(handles: Sequence[RequestHandle], *, use_tqdm: bool) -> list[RequestOutput]:
    """Outputs of all handles, in order.

    The waiting thread wakes up once, at the end of all or the first error. Woken for each of a
    thousand, it would take the interpreter from the engine thread a thousand times.

    If one of them failed, or the wait is interrupted (`KeyboardInterrupt`), all others are aborted
    and the error goes on to the caller.
    """
    try:
        if use_tqdm:
            _show_progress(handles)
        else:
            _AllEnded(handles).wait()
        for handle in handles:
            if handle.has_failed:
                handle.result()
        return [handle.result() for handle in handles]
    except BaseException:
        for handle in handles:
            handle.abort()
        raise


class _AllEnded:
    """Opens once all handles are done, or one has failed."""

    def __init__(self, handles: Sequence[RequestHandle]) -> None:
        self._num_handles = len(handles)
        # Appending is one step for the interpreter, whichever threads do it.
        self._ended: list[RequestHandle] = []
        self._is_open = threading.Event()
        if not handles:
            self._is_open.set()
        note = self._note  # one object for all, not one for each
        for handle in handles:
            handle.call_at_end(note)

    def wait(self) -> None:
        self._is_open.wait()

    def _note(self, handle: RequestHandle) -> None:
        self._ended.append(handle)
        if handle.has_failed or len(self._ended) == self._num_handles:
            self._is_open.set()


def _show_progress(handles: Sequence[RequestHandle]) -> None:
    """A bar over finished requests with output tokens per second, until all are done."""
    from tqdm.auto import tqdm

    started_s = time.monotonic()
    num_tokens = 0
    waiting = list(handles)
    bar: Any
    with tqdm(total=len(handles), unit="request", dynamic_ncols=True) as bar:
        while waiting:
            waiting[0].wait(_REFRESH_S)
            finished = [handle for handle in waiting if handle.is_done]
            if not finished:
                continue
            waiting = [handle for handle in waiting if not handle.is_done]
            for handle in finished:
                num_tokens += handle.result().usage.completion_tokens
            rate = num_tokens / max(time.monotonic() - started_s, 1e-6)
            bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
            bar.update(len(finished))
