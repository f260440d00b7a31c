"""Kernels compiled side by side before they are first launched.

Triton compiles a kernel when it is first launched, one after the other: 36 kernels take some 20
seconds on a slow host. Most of that time is spent in the compiler, which does not hold the GIL, so
threads help. Inside `compiling_ahead`, a launch of a `launchable` kernel by the same thread only
hands the kernel to a thread that compiles it; whatever torch does between such launches happens, on
numbers that mean nothing.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import triton

_MOST_THREADS = 16
_is_compiling_only: ContextVar[bool] = ContextVar("is_compiling_only", default=False)


class Launchable:
    """A kernel that is launched as `kernel[grid](…)`, or only compiled inside `compiling_ahead`.

    Attributes:
        jit: The kernel as Triton's own object, for its compiler.
    """

    __slots__ = ("jit",)

    def __init__(self, jit: Any) -> None:
        self.jit = jit

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        """What launches the kernel on a grid."""
        if not _is_compiling_only.get():
            return self.jit[grid]  # type: ignore[no-any-return]
        return functools.partial(self.jit.run, grid=grid, warmup=True)


def launchable(jit: Any) -> Launchable:
    """Decorator, over `triton.jit`, of every kernel that is launched from Python."""
    return Launchable(jit)


@contextlib.contextmanager
def compiling_ahead() -> Iterator[None]:
    """Compile what this thread launches meanwhile, side by side; return when all is compiled.

    Errors of the compiler stay away: whoever launches that kernel gets them.
    """
    num_threads = min(len(os.sched_getaffinity(0)), _MOST_THREADS)
    with (
        ThreadPoolExecutor(num_threads, "compile-kernels") as executor,
        triton.AsyncCompileMode(executor, ignore_errors=True),
    ):
        token = _is_compiling_only.set(True)
        try:
            yield
        finally:
            _is_compiling_only.reset(token)
