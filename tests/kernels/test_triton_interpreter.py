"""Runs the tests of Triton kernels in Triton's interpreter, where there is no GPU to run them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Cases of each file in the interpreter: fewer means that some were lost.
MIN_PASSED = {
    "test_triton_kernels.py": 90,
    "test_decode_kernels.py": 28,
    "test_captured_step.py": 30,
    "test_triton_few_rows.py": 59,
    "test_triton_persistent.py": 16,
    "test_triton_fused.py": 41,
    "test_captured_run.py": 7,
    "test_triton_moe.py": 38,
    "test_triton_kv_cache.py": 50,
    "test_triton_quantised.py": 60,
    "test_gluon_quantised.py": 20,
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("file", list(MIN_PASSED))
def test_kernels_in_the_interpreter(file: str) -> None:
    root = Path(__file__).parents[2]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"tests/kernels/{file}"],
        cwd=root,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-2000:]
    passed = re.search(r"(\d+) passed", finished.stdout)
    assert passed is not None
    assert int(passed.group(1)) >= MIN_PASSED[file]
