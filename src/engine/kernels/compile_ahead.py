"""Kernels compiled side by side before they are first launched.

Triton compiles a kernel when it is first launched, one after the other: 36 kernels take some 20
seconds on a slow host, the longest 8. Nearly all of that time is spent in compilers that do not
hold the GIL, so threads help. Inside `compiling_ahead` threads compile, and a launch waits for no
kernel but its own. Inside `only_compiling` a launch of a `launchable` kernel by the same thread
hands the kernel to them and goes on; inside `without_launches` it does nothing at all. Whatever
torch does between such launches happens, on numbers that mean nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import torch
import triton

_MOST_THREADS = 16
_instead_of_launching: ContextVar[Callable[..., None] | None] = ContextVar(
    "instead_of_launching", default=None
)


class Launchable:
    """A kernel that is launched as `kernel[grid](…)`, but for the contexts of this module.

    Attributes:
        jit: The kernel as Triton's own object, for its compiler.
    """

    __slots__ = ("jit",)

    def __init__(self, jit: Any) -> None:
        self.jit = jit

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        """What launches the kernel on a grid."""
        instead = _instead_of_launching.get()
        if instead is None:
            return self.jit[grid]  # type: ignore[no-any-return]
        return lambda *args, **kwargs: instead(self.jit, grid, args, kwargs)


def launchable(jit: Any) -> Launchable:
    """Decorator, over `triton.jit`, of every kernel that is launched from Python."""
    return Launchable(jit)


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """Launches by this thread do nothing: for what allocates memory and needs no numbers."""
    token = _instead_of_launching.set(lambda *_: None)
    try:
        yield
    finally:
        _instead_of_launching.reset(token)


@contextlib.contextmanager
def compiling_ahead() -> Iterator[None]:
    """Whatever this thread has Triton compile is compiled by others; at the end all of it is done.

    Errors of the compiler stay away: whoever launches that kernel gets them.
    """
    num_threads = min(len(os.sched_getaffinity(0)), _MOST_THREADS)
    with (
        ThreadPoolExecutor(num_threads, "compile-kernels") as executor,
        triton.AsyncCompileMode(executor, ignore_errors=True),
    ):
        yield


@contextlib.contextmanager
def only_compiling() -> Iterator[None]:
    """Launches by this thread compile their kernels; inside `compiling_ahead` without waiting."""
    seen: set[Any] = set()

    def compile_once(jit: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The layers of a model launch the same kernels, and asking Triton takes a millisecond.
        key = (jit, *map(_kind_of, args), *((name, kwargs[name]) for name in kwargs))
        if key not in seen:
            seen.add(key)
            jit.run(*args, grid=grid, warmup=True, **kwargs)

    token = _instead_of_launching.set(compile_once)
    try:
        yield
    finally:
        _instead_of_launching.reset(token)


def _kind_of(argument: Any) -> Any:
    """What Triton may compile a kernel for; finer than it is."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if isinstance(argument, int | float | None):
        return argument
    # Descriptors of tensors and the like: made anew for each launch.
    return type(argument), repr(getattr(argument, "shape", None))
