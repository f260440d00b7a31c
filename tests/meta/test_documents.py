"""What the documents name exists: exports, files, make targets, and the README's code runs."""

from __future__ import annotations

import os
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


# Other packages' constructors, in the page for those who come from them.
_OTHERS = ("VLLM(", "ChatOllama(", "ChatLlamaCpp(", "HuggingFacePipeline", "ChatOpenAI(")
# What its examples take for granted.
_GIVEN = """
from pydantic import BaseModel
class Person(BaseModel):
    name: str
prompts = ["One", "Two"]
"""


@pytest.mark.demo_model
@pytest.mark.parametrize(
    ("document", "num_blocks"),
    [
        ("README.md", 5),
        ("docs/LANGCHAIN.md", 3),
        ("docs/CONSTRAINTS.md", 1),
        ("docs/MIGRATION.md", 5),
    ],
)
def test_the_documents_code_runs(
    demo_model: str, tmp_path: Path, document: str, num_blocks: int
) -> None:
    """All Python blocks of a document in one process, one after the other, on the demo model."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    if document == "docs/MIGRATION.md":
        blocks = [block for block in blocks if not any(name in block for name in _OTHERS)]
    assert len(blocks) == num_blocks
    source = "\n".join(blocks)
    if document == "docs/MIGRATION.md":
        source = re.sub(r'"(org/model|Qwen/Qwen3-0.6B|model.Q4_0.gguf)"', f'"{demo_model}"', source)
        source = _GIVEN + source
    script = tmp_path / "document.py"
    script.write_text(source)
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
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
