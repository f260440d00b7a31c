"""Sampling kernels against their plain-torch twin, which is itself tested against transformers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed on this platform", allow_module_level=True)

from sampler_kernel_cases import CASES, GPU_CASES


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    """Results of all cases in a process of its own: Triton reads its switch when imported."""
    script = Path(__file__).parents[1] / "support" / "sampler_kernel_cases.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, str | None] = json.loads(done.stdout)
    return results


@pytest.mark.parametrize("case", CASES)
def test_in_the_interpreter(interpreted: dict[str, str | None], case: str) -> None:
    assert interpreted[case] is None, interpreted[case]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", GPU_CASES)
def test_on_the_gpu(case: str) -> None:
    GPU_CASES[case]("cuda")
