"""What a benchmark row must say about where it was measured."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(os.environ.get("OUT", ROOT / "bench-results"))

_PACKAGES = ("torch", "triton", "transformers", "langchain-core", "llama-index-core")


def describe_environment(commit: str | None = None) -> dict[str, Any]:
    """Commit, hardware and versions.

    Imports neither torch nor CUDA, so that a parent process can ask and leave the GPU to its
    children.

    Args:
        commit: Of the code measured, where the working tree is a copy without its repository.
    """
    found: dict[str, Any] = {
        "commit": commit or _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        **{name.replace("-", "_"): _version(name) for name in _PACKAGES},
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "cpu": _cpu_name(),
        "gpu": None,
        "driver": None,
    }
    gpu = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "-i=0")
    if gpu:
        found["gpu"], found["driver"] = (part.strip() for part in gpu.split(",", 1))
    return found


def gpu_used_gib() -> float | None:
    """GiB taken on the first GPU by all processes; None without one."""
    used = _output("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i=0")
    return int(used) / 1024 if used else None


def write_rows(name: str, rows: list[dict[str, Any]]) -> Path:
    """Append the rows, each with the environment, to `<name>.jsonl` in the results folder."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    environment = describe_environment()
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps({**environment, **row}) + "\n")
    return path


def print_table(header: list[str], rows: list[list[Any]]) -> None:
    """A plain table with aligned columns."""
    cells = [header, *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    sys.stdout.flush()


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), None)
