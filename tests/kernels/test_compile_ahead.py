"""Kernels are compiled side by side and without a launch, and once."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")
import triton
import triton.language as tl

from engine.kernels.compile_ahead import (
    Launchable,
    compiling_ahead,
    launchable,
    only_compiling,
    without_launches,
)


class FakeKernel:
    """Notes how it is called."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, tuple[Any, ...]]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args: self.calls.append(("launched", grid, args))

    def run(self, *args: Any, grid: Any, warmup: bool) -> None:
        assert warmup
        self.calls.append(("compiled", grid, args))


def test_a_launch_is_a_launch_outside_and_none_inside() -> None:
    fake = FakeKernel()
    kernel = Launchable(fake)
    kernel[(1,)](3)
    with compiling_ahead():
        with only_compiling():
            kernel[(2,)](4)
        kernel[(2,)](6)
    with without_launches():
        kernel[(3,)](4)
    kernel[(4,)](5)
    assert fake.calls == [
        ("launched", (1,), (3,)),
        ("compiled", (2,), (4,)),
        ("launched", (2,), (6,)),
        ("launched", (4,), (5,)),
    ]


def test_the_same_launch_is_handed_over_once() -> None:
    fake = FakeKernel()
    kernel = Launchable(fake)
    x, y = torch.zeros(8), torch.zeros(8)
    with compiling_ahead(), only_compiling():
        for tensor in (x, y, x.half(), x[1:]):
            for number in (1, 16):
                kernel[(1,)](tensor, number)
                kernel[(2,)](tensor, number)
    assert len(fake.calls) == 6


def test_other_threads_go_on_launching() -> None:
    fake = FakeKernel()
    with only_compiling():
        other = threading.Thread(target=lambda: Launchable(fake)[(1,)]())
        other.start()
        other.join()
    assert [call[0] for call in fake.calls] == ["launched"]


def test_it_ends_with_an_error_inside() -> None:
    fake = FakeKernel()
    with pytest.raises(ZeroDivisionError), compiling_ahead(), only_compiling():
        raise ZeroDivisionError
    Launchable(fake)[(1,)]()
    assert [call[0] for call in fake.calls] == ["launched"]


@launchable
@triton.jit
def _add_kernel(x_ptr, AMOUNT: tl.constexpr):
    index = tl.program_id(0)
    tl.store(x_ptr + index, tl.load(x_ptr + index) + AMOUNT)


@launchable
@triton.jit
def _broken_kernel(x_ptr, AMOUNT: tl.constexpr):
    tl.static_assert(AMOUNT == 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_are_there_afterwards_and_did_not_run() -> None:
    x = torch.zeros(4, dtype=torch.int32, device="cuda")
    with compiling_ahead():
        with only_compiling():
            for amount in (1, 2, 3, 1):
                _add_kernel[(4,)](x, AMOUNT=amount)
            _broken_kernel[(4,)](x, AMOUNT=1)
        assert x.tolist() == [0] * 4
        _add_kernel[(4,)](x, AMOUNT=3)  # waits for its own compiler
        assert x.tolist() == [3] * 4
    cache = _add_kernel.jit.device_caches[0][0]
    assert len(cache) == 3
    _add_kernel[(4,)](x, AMOUNT=2)
    assert len(cache) == 3
    assert x.tolist() == [5] * 4
    with pytest.raises(triton.CompilationError):
        _broken_kernel[(4,)](x, AMOUNT=1)
