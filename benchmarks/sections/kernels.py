"""Kernels against their ceilings, by `bench_kernels.py` and `bench_sampler.py` as they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from plan import Job, Plan
from rows import RowFile

SECTION = "kernels"
_SCRIPTS = ("bench_kernels.py", "bench_sampler.py")


def jobs(plan: Plan) -> list[Job]:
    """One job per script."""
    if plan.device != "cuda":
        return []
    return [Job(SECTION, script, {"script": script}, ()) for script in _SCRIPTS]


def measure(plan: Plan, rows: RowFile, *, script: str) -> None:
    """Run the script; it writes rows of its own, beside ours."""
    subprocess.run([sys.executable, str(Path(__file__).parents[1] / script)], check=True)
