"""The published suite on `LocalLLM`, on LlamaIndex's mocks as a control; each check seen red."""

from __future__ import annotations

import gc
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_index_subjects as subjects
import pytest
from llama_index_faults import EMBEDDING_FAULTS, FAULTS, SCRIPTED_FAULTS, kept

import engine
from llm_connectors.llama_index import LocalLLM
from llm_connectors.testing.llama_index import CHECKS, Subject

# LlamaIndex's agents and runners use names that have been retired.
# Faulty classes drop coroutines.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

NEEDS_MORE = {"26_embeddings", "28_close"}
MANY_ANSWERS = {"27_rag_offline"}


@pytest.mark.parametrize("name", [name for name in CHECKS if name not in NEEDS_MORE])
def test_on_a_real_engine(name: str) -> None:
    CHECKS[name](subjects.tiny(16) if name in MANY_ANSWERS else subjects.tiny())


@pytest.fixture(scope="module")
def process() -> Iterator[str]:
    """The placement, with an engine that ends with the module."""
    yield "process"
    subjects.tiny_engine("process").close()


@pytest.mark.parametrize(
    "name", ["03_streams_equal_answers", "12_gathered", "15_giving_up", "19_structured"]
)
def test_on_an_engine_in_a_process_of_its_own(name: str, process: str) -> None:
    CHECKS[name](subjects.tiny(placement=process))


SCRIPTED = ("01_identity", "04_one_final_chunk", "05_whole_characters", "17_tools")


@pytest.mark.parametrize("name", [*SCRIPTED, "20_agents", "22_events", "24_blocks"])
def test_on_a_scripted_engine(name: str) -> None:
    CHECKS[name](subjects.scripted())


def test_closing() -> None:
    CHECKS["28_close"](subjects.closable())


@pytest.fixture
def embedder(embedding_model: str) -> Iterator[engine.Engine]:
    with engine.Engine(embedding_model, device="cpu", num_threads=1) as made:
        yield made


@pytest.mark.embedding_model
def test_embeddings(embedder: engine.Engine) -> None:
    CHECKS["26_embeddings"](subjects.embedding(embedder))


def test_from_the_shell_as_documented(tmp_path: Path, support_dir: Path) -> None:
    source = Path(engine.__file__).parents[1]
    document = (source.parent / "docs" / "LLAMA_INDEX.md").read_text()
    (block,) = re.findall(r"```sh\n(pytest .*?)```", document, re.DOTALL)
    command = shlex.split(block.replace("\\\n", " "))
    command[command.index("my_package.my_module:make_llm")] = "llama_index_subjects:scripted"
    options = ["-q", "-k", "02_types or 26_emb", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", *command, *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (source, support_dir)))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "1 passed, 1 skipped, 26 deselected" in done.stdout, done.stdout + done.stderr


@pytest.mark.demo_model
@pytest.mark.usefixtures("demo_model", "embedding_model")
def test_the_documents_code_runs(tmp_path: Path) -> None:
    """All Python blocks in one process, one after the other."""
    source = Path(engine.__file__).parents[1]
    document = (source.parent / "docs" / "LLAMA_INDEX.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    assert len(blocks) == 2
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 3, done.stdout


# ---- the control: what LlamaIndex's own mocks pass and fail


def outcome(name: str, made: Subject) -> tuple[str, str]:
    """ "passed", "failed" or "skipped", and why."""
    try:
        CHECKS[name](made)
    except pytest.skip.Exception as reason:
        return "skipped", str(reason)
    except BaseException as error:
        return "failed", f"{type(error).__name__}: {error}"
    return "passed", ""


@pytest.fixture
def leaves_nothing() -> Iterator[None]:
    """What a faulty class drops is collected before the next test, which it would disturb."""
    yield
    while kept:
        left = kept.pop()
        left.close() if isinstance(left, engine.Engine) else left.abort()
    gc.collect()


NEEDS_PROBES = {"08_prompt_tokens", "12_gathered", "15_giving_up", "26_embeddings", "28_close"}
MOCK_FAILS = {
    *("04_one_final_chunk", "06_stop_strings", "07_call_options", "09_system_prompt"),
    *("10_metadata", "11_overflow", "17_tools", "18_streamed_objects", "19_structured"),
    *("20_agents", "21_usage", "22_events", "23_logprobs", "24_blocks"),
}


@pytest.mark.usefixtures("leaves_nothing")
@pytest.mark.parametrize("make", [subjects.mock, subjects.calling_mock])
def test_the_mocks_fail_what_they_cannot_do(make: Any) -> None:
    results = {name: outcome(name, Subject(make())) for name in CHECKS}
    for name, result in results.items():
        print(name, *result)
    assert {name for name, result in results.items() if result[0] == "skipped"} == NEEDS_PROBES
    assert {name for name, result in results.items() if result[0] == "failed"} >= MOCK_FAILS
    assert results["02_types"] == results["27_rag_offline"] == ("passed", "")


# ---- the checks, each on classes with one fault


def test_every_check_is_seen_red() -> None:
    assert {*FAULTS, *SCRIPTED_FAULTS, "26_embeddings"} == set(CHECKS)


def _each(faults: dict[str, list[tuple[type[Any], str]]]) -> list[Any]:
    return [
        pytest.param(name, faulty, words, id=f"{name}-{faulty.__name__}")
        for name, classes in faults.items()
        for faulty, words in classes
    ]


@pytest.mark.usefixtures("leaves_nothing")
@pytest.mark.parametrize(("name", "faulty", "words"), _each(FAULTS))
def test_a_faulty_class_fails(name: str, faulty: type[LocalLLM], words: str) -> None:
    made = subjects.closable() if name == "28_close" else subjects.tiny()
    made.factory = None  # of the class without the fault
    old: Any = made.llm
    options = {"max_tokens": old.max_tokens, "temperature": 0.0}
    if name == "28_close":
        made.llm = faulty(subjects.tiny_folder(), engine_kwargs=subjects.CLOSABLE, **options)
        made.llm.load()
        old.close()
    else:
        made.llm = faulty(engine=subjects.tiny_engine(), tool_parser="hermes", **options)
    try:
        result, why = outcome(name, made)
        print(why[:400])
        assert result == "failed"
        assert words in why
    finally:
        LocalLLM.close(made.llm)


@pytest.mark.parametrize(("name", "faulty", "words"), _each(SCRIPTED_FAULTS))
def test_a_faulty_class_fails_on_a_scripted_engine(
    name: str, faulty: type[LocalLLM], words: str
) -> None:
    made = subjects.scripted()
    made.llm = faulty(engine=made.llm.engine, max_tokens=96, temperature=0.0)
    result, why = outcome(name, made)
    print(why[:400])
    assert result == "failed"
    assert words in why


@pytest.mark.embedding_model
@pytest.mark.parametrize(("faulty", "words"), EMBEDDING_FAULTS)
def test_a_faulty_embedding_model_fails(
    embedder: engine.Engine, faulty: type[Any], words: str
) -> None:
    made = subjects.embedding(embedder, faulty)
    result, why = outcome("26_embeddings", made)
    print(why[:400])
    assert result == "failed"
    assert words in why
