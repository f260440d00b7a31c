"""`LocalEmbeddings`: LangChain's own suites on real weights, and what they do not ask for."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core import exceptions as core
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests
from pydantic import ValidationError
from stalls import least_pause
from tiny_encoders import write_encoder, write_layout

import engine
from engine import Engine
from llm_connectors.langchain import LocalEmbeddings
from llm_connectors.langchain.errors import ContextOverflowError, RequestError

ENGINE_KWARGS = {"device": "cpu", "num_threads": 1}
TEXTS = ["one text", "another, longer text", "one text"]


@pytest.fixture(scope="module")
def one_engine(embedding_model: str) -> Iterator[None]:
    """Keeps the suite's engine loaded from test to test."""
    shared = Engine.shared(embedding_model, **ENGINE_KWARGS)
    yield
    shared.close()


@pytest.mark.embedding_model
class TestStandardUnit(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return LocalEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": "all-minilm-l6-v2", "engine_kwargs": ENGINE_KWARGS}


@pytest.mark.embedding_model
@pytest.mark.usefixtures("one_engine")
class TestStandardIntegration(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return LocalEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": "all-minilm-l6-v2", "engine_kwargs": ENGINE_KWARGS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embedder")
    write_encoder(path)
    write_layout(path, prompts={"query": "q: ", "document": "d: "}, max_seq_length=64)
    return path


@pytest.fixture(scope="module")
def eng(folder: Path) -> Iterator[Engine]:
    with Engine(str(folder), **ENGINE_KWARGS) as engine:
        yield engine


@pytest.fixture
def embeddings(eng: Engine) -> LocalEmbeddings:
    return LocalEmbeddings(engine=eng)


async def test_queries_and_documents_have_their_prompts(
    embeddings: LocalEmbeddings, eng: Engine
) -> None:
    documents = embeddings.embed_documents(TEXTS)
    assert documents == eng.embed(["d: " + text for text in TEXTS], prompt="").tolist()
    assert await embeddings.aembed_documents(TEXTS) == documents
    query = embeddings.embed_query("one text")
    assert query == eng.embed("q: one text", prompt="").tolist()
    assert await embeddings.aembed_query("one text") == query
    assert embeddings.embed_documents([]) == []
    own = LocalEmbeddings(engine=eng, query_prompt="d: ", document_prompt="q: ")
    assert own.embed_query("one text") == documents[0]
    assert own.embed_documents(["one text"]) == [query]


def test_options_reach_the_engine(eng: Engine) -> None:
    raw = LocalEmbeddings(engine=eng, normalize=False, dimensions=8)
    assert raw.embed_query("x") == eng.embed("q: x", normalize=False, dimensions=8).tolist()
    cut = LocalEmbeddings(engine=eng, on_overflow="truncate")
    assert cut.embed_query("x " * 300)


def test_a_list_is_one_submission_and_calls_share_batches(
    embeddings: LocalEmbeddings, eng: Engine
) -> None:
    before = eng.stats().requests_finished
    embeddings.embed_documents([f"text {n}" for n in range(300)])
    assert eng.stats().requests_finished == before + 1

    async def main() -> None:
        await asyncio.gather(*(embeddings.aembed_query(f"text {n}") for n in range(50)))

    steps = eng.stats().steps
    asyncio.run(main())
    assert eng.stats().steps - steps < 40


def test_the_event_loop_goes_on(embeddings: LocalEmbeddings) -> None:
    """Beside a list that takes a second to tokenize and embed."""
    texts = [f"{n} {'word ' * 10}" for n in range(4000)]

    async def embed() -> None:
        assert len(await embeddings.aembed_documents(texts)) == 4000

    assert least_pause(embed, 0.25) < 0.25


class Gate:
    """Holds up whoever calls `function` until it is opened.

    Attributes:
        has_come: Somebody calls.
        has_passed: A call is over.
    """

    def __init__(self, function: Callable[..., Any], *, is_open: bool = False) -> None:
        self._function = function
        self._is_open = threading.Event()
        self.has_come = threading.Event()
        self.has_passed = threading.Event()
        if is_open:
            self.open()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.has_come.set()
        assert self._is_open.wait(60)
        result = self._function(*args, **kwargs)
        self.has_passed.set()
        return result

    def open(self) -> None:
        self._is_open.set()


@pytest.mark.parametrize("when", ["while it is tokenized", "while it runs"])
async def test_cancelling_drops_what_has_not_run(
    embeddings: LocalEmbeddings, eng: Engine, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    # What earlier tests gave up on the module's engine is over once this has an answer.
    await embeddings.aembed_query("before them")
    loop: Any = eng._host.loop  # type: ignore[attr-defined]
    submission = Gate(eng.submit_embed, is_open=when == "while it runs")
    step = Gate(loop._runner.execute)
    abort = Gate(loop.post_abort, is_open=True)
    monkeypatch.setattr(eng, "submit_embed", submission)
    monkeypatch.setattr(loop._runner, "execute", step)
    monkeypatch.setattr(loop, "post_abort", abort)
    before = eng.stats()
    texts = [f"{n} {'word ' * 10}" for n in range(6000)]
    task = asyncio.create_task(embeddings.aembed_documents(texts))
    came = step if when == "while it runs" else submission
    assert await asyncio.to_thread(came.has_come.wait, 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    submission.open()
    assert await asyncio.to_thread(abort.has_passed.wait, 60)
    step.open()
    await embeddings.aembed_query("behind them")
    stats = eng.stats()
    assert stats.requests_aborted == before.requests_aborted + 1
    assert (stats.waiting, stats.running) == (0, 0)
    # All 6000 texts take hundreds of steps.
    assert stats.steps - before.steps < 10


def test_errors_are_langchains_too(eng: Engine, embeddings: LocalEmbeddings) -> None:
    with pytest.raises(ContextOverflowError) as caught:
        embeddings.embed_documents(["x " * 300])
    assert isinstance(caught.value, core.ContextOverflowError)
    assert isinstance(caught.value, engine.ContextOverflowError)
    with pytest.raises(RequestError):
        embeddings.embed_documents([3])  # type: ignore[list-item]
    with pytest.raises(engine.RequestTimeoutError) as late:
        LocalEmbeddings(engine=eng, timeout=0.001).embed_documents(
            [f"{n} word" for n in range(3000)]
        )
    assert isinstance(late.value, core.ModelTimeoutError)


async def test_timeout_of_async_calls(eng: Engine) -> None:
    texts = [f"{n} word" for n in range(3000)]
    with pytest.raises(engine.RequestTimeoutError):
        await LocalEmbeddings(engine=eng, timeout=0.001).aembed_documents(texts)


def test_a_model_that_generates_says_what_to_do(tiny_engine: Engine) -> None:
    with pytest.raises(RequestError, match="load it with task='embed'"):
        LocalEmbeddings(engine=tiny_engine).embed_query("x")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mode": "x"}, "Did you mean 'model'"),
        ({}, "No model given"),
        ({"model": "x", "on_overflow": "cut"}, "on_overflow='cut'"),
        ({"model": "x", "dimensions": 0}, "dimensions"),
        ({"model": "x", "engine_kwargs": {"dtyp": "x"}}, "Did you mean 'dtype'"),
    ],
)
def test_bad_options(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        LocalEmbeddings(**options)


def test_sharing_copies_and_pickles(folder: Path) -> None:
    first = LocalEmbeddings(model=str(folder), engine_kwargs=ENGINE_KWARGS)
    assert not first._lease.is_loaded
    first.load()
    second = LocalEmbeddings(model_name=str(folder), engine_kwargs=ENGINE_KWARGS)
    clones = [second, copy.deepcopy(first), pickle.loads(pickle.dumps(first))]
    vector = first.embed_query("x")
    for clone in clones:
        assert clone.embed_query("x") == vector
        assert clone._engine() is first._engine()
    shared = first._engine()
    for one in (first, *clones):
        one.close()
    assert shared.is_closed
    assert first.embed_query("x") == vector
    first.close()


def test_a_vector_store(embeddings: LocalEmbeddings) -> None:
    store = InMemoryVectorStore(embeddings)
    texts = [f"a text on the letter {letter}" for letter in "abcdefghijklmnopq"]
    store.add_texts(texts)
    [(best, score)] = store.similarity_search_with_score("the letter g", k=1)
    vectors = np.array(embeddings.embed_documents(texts))
    nearest = int(np.argmax(vectors @ np.array(embeddings.embed_query("the letter g"))))
    assert best.page_content == texts[nearest]
    assert score <= 1.0001
