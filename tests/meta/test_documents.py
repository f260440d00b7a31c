"""What the documents name exists: exports, files, make targets, and the README's code runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import engine

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def test_every_export_can_be_imported() -> None:
    for name in engine.__all__:
        assert getattr(engine, name) is not None
    assert sorted(engine.__all__) == dir(engine)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_exist(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target
    rooms = (ROOT, ROOT / "src", ROOT / "src" / "engine", ROOT / "src" / "llm_connectors")
    for name in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|toml))`", text):
        assert any((room / name).exists() for room in rooms), f"{document.name} names {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in re.findall(r"`make ([a-z-]+)", document.read_text()):
        assert name in targets, name


def test_ci_runs_the_readmes_test_command() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "make check" in (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^check: .*\btest\b", makefile, re.MULTILINE)
    assert "make test" in (ROOT / "README.md").read_text()


@pytest.mark.demo_model
def test_the_readmes_code_runs(demo_model: str, tmp_path: Path) -> None:
    """All Python blocks of the README in one process, one after the other."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "finish_reason" not in done.stderr


def test_no_file_is_too_long() -> None:
    """A file is one noun; at 500 lines it is two."""
    for path in (ROOT / "src").rglob("*.py"):
        num_lines = len(path.read_text().splitlines())
        assert num_lines <= 500, f"{path} has {num_lines} lines"


def test_enough_tests_are_collected() -> None:
    output = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:randomly", str(ROOT)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    ).stdout
    match = re.search(r"(\d+)(?:/\d+)? tests? collected", output)
    assert match is not None, output[-500:]
    assert int(match.group(1)) > 2000
