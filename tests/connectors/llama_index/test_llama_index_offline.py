"""Installations and environments that break LlamaIndex offline, and what ours does in them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import llama_index.core
import pytest

import engine
from llm_connectors.llama_index import doctor

SRC = Path(engine.__file__).parents[1]
STATIC = Path(llama_index.core.__file__).parent / "_static"


def problems(environment: dict[str, str], static: Path = STATIC) -> dict[str, str]:
    found = doctor.diagnose(environment, static)
    return {finding.name: finding.problem for finding in found if finding.problem is not None}


def test_nothing_is_wrong_with_what_the_package_brings() -> None:
    assert {"OpenAI's tokenizer files", "NLTK's data"}.isdisjoint(problems({}))


def test_variables_that_point_away(tmp_path: Path) -> None:
    found = problems({"TIKTOKEN_CACHE_DIR": str(tmp_path), "NLTK_DATA": str(tmp_path)})
    assert "TIKTOKEN_CACHE_DIR" in found["OpenAI's tokenizer files"]
    assert "stopwords and tokenizers/punkt_tab" in found["NLTK's data"]


def test_data_that_is_missing_or_linked(tmp_path: Path) -> None:
    found = problems({}, tmp_path)
    assert set(found) >= {"OpenAI's tokenizer files", "NLTK's data"}
    for name in ("corpora/stopwords", "tokenizers/punkt_tab"):
        folder = tmp_path / "nltk_cache" / name
        folder.mkdir(parents=True)
        # An empty folder is what a broken wheel leaves.
        assert name in problems({}, tmp_path)["NLTK's data"]
        (folder / "english").write_text("a")
    assert "NLTK's data" not in problems({}, tmp_path)
    assert "NLTK reads its data" not in problems({}, tmp_path)
    (tmp_path / "other").hardlink_to(folder / "english")
    assert "1 of its files are hard links" in problems({}, tmp_path)["NLTK reads its data"]


@pytest.mark.parametrize("is_broken", [False, True])
def test_from_the_shell(tmp_path: Path, is_broken: bool) -> None:
    broken = {"NLTK_DATA": str(tmp_path)} if is_broken else {}
    done = subprocess.run(
        [sys.executable, "-m", "llm_connectors.llama_index.doctor"],
        env={**os.environ, "PYTHONPATH": str(SRC), **broken},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ("PROBLEM NLTK's data" in done.stdout) == is_broken, done.stdout + done.stderr
    assert done.returncode == int("PROBLEM" in done.stdout)
    assert done.stderr == ""


def test_configured_pipelines_need_neither_nltk_nor_tiktoken(
    tmp_path: Path, support_dir: Path
) -> None:
    """Index, splitter, memory and prompt helper, where both would have to download."""
    code = """
        import socket
        def refuse(*_args, **_kwargs):
            raise SystemExit("a socket was opened")
        socket.socket.connect = socket.getaddrinfo = refuse
        from llama_index.core import Document, VectorStoreIndex
        from llama_index.core.embeddings import MockEmbedding
        from llama_index.core.memory import ChatMemoryBuffer
        from llama_index_fake_engine import FakeEngine
        from llm_connectors.llama_index import LocalLLM, configure_settings
        configure_settings(LocalLLM(engine=FakeEngine(), max_tokens=64), MockEmbedding(embed_dim=2))
        index = VectorStoreIndex.from_documents([Document(text="A sentence. Another. " * 400)])
        assert len(index.docstore.docs) > 1
        for mode in ("compact", "refine", "tree_summarize"):
            print(index.as_query_engine(response_mode=mode).query("What?"))
        memory = ChatMemoryBuffer.from_defaults(token_limit=2000)
        print(index.as_chat_engine(chat_mode="context", memory=memory).chat("What?"))
        import tiktoken.registry
        assert not tiktoken.registry.ENCODINGS
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (support_dir, SRC))),
            "TIKTOKEN_CACHE_DIR": str(tmp_path),
            "NLTK_DATA": str(tmp_path / "nltk"),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Seen") == 4, done.stdout
