"""Wait for many requests, with a progress bar."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from engine.handle import RequestHandle
from engine.outputs import RequestOutput

_REFRESH_S = 0.1


def wait_for_all(handles: Sequence[RequestHandle], *, use_tqdm: bool) -> list[RequestOutput]:
    """Outputs of all handles, in order.

    If one of them failed, or the wait is interrupted (`KeyboardInterrupt`), all others are aborted
    and the error goes on to the caller.
    """
    try:
        if use_tqdm:
            _show_progress(handles)
        return [handle.result() for handle in handles]
    except BaseException:
        for handle in handles:
            handle.abort()
        raise


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
