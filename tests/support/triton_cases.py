"""What the tests of Triton kernels share: where they run, and how a kernel is found."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest
import torch
from kernel_cases import TOLERANCE

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter multiplies bfloat16 matrices as if their bits were integers, and takes seconds for
# a case: two dtypes and small shapes.
DTYPES = [torch.float32, torch.float16] if IS_INTERPRETED else list(TOLERANCE)

NEEDS_TRITON = [
    # sigmoid of large negative numbers: exp gives inf, whose inverse is the right 0.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.gpu,
    pytest.mark.skipif(
        not IS_INTERPRETED and not torch.cuda.is_available(),
        reason="needs a CUDA device, or TRITON_INTERPRET=1",
    ),
]


def on_gpu_only(*values: object) -> list[object]:
    """Parameters too slow for the interpreter."""
    return [] if IS_INTERPRETED else list(values)


def assert_rows_alike(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal bits on a GPU. Interpreted products are NumPy's, whose BLAS rounds a row by the shape
    of its matrix and by the processor: there the rows need only be close."""
    if IS_INTERPRETED:
        torch.testing.assert_close(got, want, **TOLERANCE[want.dtype])
    else:
        assert torch.equal(got, want)


def kernels(name: str) -> ModuleType:
    """The module of a kernel; imported late, since triton may be absent where a test skips."""
    return importlib.import_module(f"engine.kernels.{name}")
