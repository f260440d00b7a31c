"""Every example runs as it stands, is short, and prints something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))

# Examples that take the size of their work as an argument.
SIZES = {"async_app.py": 4, "langgraph_parallel.py": 4, "structured_extraction.py": 10}

pytestmark = [pytest.mark.demo_model, pytest.mark.usefixtures("embedding_model")]


def test_the_examples_are_all_there() -> None:
    assert set(NAMES) == {
        "async_app.py",
        "demo.py",
        "langchain_async.py",
        "langchain_batch.py",
        "langchain_rag.py",
        "llama_index_agent.py",
        "llama_index_extraction.py",
        "llama_index_ingestion.py",
        "langgraph_parallel.py",
        "llama_index_rag.py",
        "offline_batch.py",
        "one_engine_for_both.py",
        "quickstart.py",
        "streaming.py",
        "streaming_reasoning.py",
        "structured_extraction.py",
        "tool_agent.py",
    }


@pytest.mark.parametrize("name", NAMES)
def test_example_runs(name: str, demo_model: str, tmp_path: Path) -> None:
    if name != "demo.py":
        assert len((EXAMPLES / name).read_text().splitlines()) < 75
    size = [str(SIZES[name])] if name in SIZES else []
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", str(EXAMPLES / name), *size],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # nothing may depend on the checkout
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stdout.strip()) > 20
