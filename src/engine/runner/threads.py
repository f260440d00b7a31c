"""Set the number of CPU threads of one thread's operations without touching the host program."""

from __future__ import annotations

import os
import threading

import torch

_MAX_DEFAULT_THREADS = 16


def default_num_threads() -> int:
    """Cores this process may use, at most 16: decode is bandwidth-bound long before that."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cores = os.cpu_count() or 1
    return min(cores, _MAX_DEFAULT_THREADS)


def set_own_num_threads(num_threads: int) -> None:
    """Let torch use `num_threads` for operations started by the calling thread.

    OpenMP keeps the number per calling thread, but torch also remembers the last value set
    anywhere and gives it to threads that start later. So the old value is set again at once, in a
    short-lived thread: what the application sees does not change.
    """
    before = torch.get_num_threads()
    if before == num_threads:
        return
    torch.set_num_threads(num_threads)
    restorer = threading.Thread(target=torch.set_num_threads, args=(before,))
    restorer.start()
    restorer.join()
