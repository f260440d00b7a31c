"""Set the number of CPU threads of one thread's operations without touching the host program."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_T = TypeVar("_T")

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
    anywhere and gives it to threads that start later. So what such a thread would get is asked for
    in one and set again in another: what the application sees does not change. Does nothing once
    the interpreter is ending and starts no more threads.
    """
    if torch.get_num_threads() == num_threads:
        return
    before: list[int] = []
    try:
        _run_in_thread(lambda: before.append(torch.get_num_threads()))
    except RuntimeError:
        return
    torch.set_num_threads(num_threads)
    _run_in_thread(lambda: torch.set_num_threads(before[0]))


def _run_in_thread(work: Callable[[], None]) -> None:
    # Not an executor: those refuse earlier than threads do.
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def in_short_lived_thread(work: Callable[[], _T]) -> _T:
    """`work()`, in a thread that has ended when this returns; its exception is the caller's.

    Every thread that runs a parallel operation keeps a team of OpenMP workers until it ends. GNU's
    OpenMP counts them all: with more than there are cores, workers no longer spin for the next
    operation but sleep, and each of the hundreds of operations of a step waits for them to wake.
    So loading must leave no team behind: on 2 cores the demo model's steps took 37-41 ms when the
    application's thread had loaded it and 24-26 ms when a thread that ended had (torch 2.13).
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-load") as executor:
        return executor.submit(work).result()
