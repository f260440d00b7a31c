"""What pyproject.toml requires; run as a script, it prints what `make test-newest` installs."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = {"torch", "triton"}
"""Builds for GPUs and for CPUs differ; those that were tested are named beside the pins."""
TOOLS = {"build", "codespell", "hatchling", "matplotlib", "mypy", "pre-commit", "ruff"}
"""No test imports them, or their versions say nothing about the package."""


def ranges() -> dict[str, Requirement]:
    """Each required package's range; tools and torch left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    parts = (project["dependencies"], *project["optional-dependencies"].values())
    found = {canonicalize_name(one.name): one for part in parts for one in map(Requirement, part)}
    return {
        name: one
        for name, one in found.items()
        if name not in {"llm-connectors", *LEFT_OUT, *TOOLS}
    }


def pins(file: str) -> dict[str, str]:
    """Package -> version in a file of constraints."""
    lines = (ROOT / file).read_text().splitlines()
    pinned = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pinned}


if __name__ == "__main__":
    for requirement in ranges().values():
        print(f"{requirement.name}{requirement.specifier}")
