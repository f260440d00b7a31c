"""`LocalRerank`: a document compressor and a cross-encoder over three kinds of models."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core import exceptions as core
from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import ValidationError
from tiny_encoders import write_encoder

import engine
from engine import Engine
from llm_connectors.langchain import ChatLocal, LocalRerank

TEXTS = ["it is a word.", "some other text", "abc 123", "is it?", "nothing"]
DOCUMENTS = [Document(page_content=text, metadata={"n": n}) for n, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder: Path = tmp_path_factory.mktemp("scorer")
    write_encoder(folder, "bert", "ForSequenceClassification", num_labels=1)
    with Engine(str(folder), device="cpu", num_threads=1) as engine:
        yield engine


@pytest.fixture(params=["scores", "generates"])
def eng(request: pytest.FixtureRequest) -> Engine:
    name = "scorer" if request.param == "scores" else "tiny_engine"
    found: Engine = request.getfixturevalue(name)
    return found


async def test_the_best_documents_in_order(eng: Engine) -> None:
    rerank = LocalRerank(engine=eng, top_n=3)
    best = rerank.compress_documents(DOCUMENTS, "what is it?")
    scores = eng.score("what is it?", TEXTS)
    order = np.argsort(-scores, kind="stable")[:3]
    assert [document.metadata["n"] for document in best] == order.tolist()
    for document, place in zip(best, order, strict=True):
        assert document.metadata["relevance_score"] == pytest.approx(float(scores[place]))
    found = await rerank.acompress_documents(DOCUMENTS, "what is it?")
    assert [one.metadata["n"] for one in found] == order.tolist()
    assert all("relevance_score" not in document.metadata for document in DOCUMENTS)


async def test_pairs(eng: Engine) -> None:
    rerank = LocalRerank(engine=eng)
    pairs = [("a", "b"), ("c", "d"), ("a", "d")]
    scores = rerank.score(pairs)
    assert scores == pytest.approx(eng.score(["a", "c", "a"], ["b", "d", "d"]).tolist(), abs=1e-5)
    assert await rerank.ascore(pairs) == pytest.approx(scores, abs=1e-5)
    assert all(isinstance(score, float) for score in scores)
    assert rerank.score([]) == []
    assert list(rerank.compress_documents([], "a")) == []


def test_thresholds(scorer: Engine) -> None:
    scores = sorted(scorer.score("a", TEXTS).tolist())
    middle = (scores[2] + scores[3]) / 2
    kept = LocalRerank(engine=scorer, top_n=None, min_score=middle, score_key="s")
    best = kept.compress_documents(DOCUMENTS, "a")
    assert [document.metadata["s"] for document in best] == pytest.approx(scores[:2:-1])
    assert len(LocalRerank(engine=scorer, top_n=None).compress_documents(DOCUMENTS, "a")) == 5


def test_all_documents_are_one_submission(scorer: Engine) -> None:
    before = scorer.stats().requests_finished
    LocalRerank(engine=scorer).compress_documents(DOCUMENTS * 20, "a")
    assert scorer.stats().requests_finished == before + 1


async def test_concurrent_calls(eng: Engine) -> None:
    rerank = LocalRerank(engine=eng, top_n=1)
    queries = [f"query {n}" for n in range(12)]
    found = await asyncio.gather(
        *(rerank.acompress_documents(DOCUMENTS, query) for query in queries)
    )
    for query, best in zip(queries, found, strict=True):
        assert [one.metadata["n"] for one in best] == [
            one.metadata["n"] for one in rerank.compress_documents(DOCUMENTS, query)
        ]


def test_one_engine_with_the_chat_model(tiny_engine: Engine) -> None:
    chat = ChatLocal(engine=tiny_engine, max_tokens=2)
    rerank = LocalRerank(engine=tiny_engine, instruction="Is it about words?")
    assert chat.invoke("hi").content is not None
    assert len(rerank.compress_documents(DOCUMENTS, "words")) == 3


def test_errors(scorer: Engine, tiny_engine: Engine) -> None:
    with pytest.raises(core.ContextOverflowError):
        LocalRerank(engine=scorer).score([("a", "word " * 500)])
    assert LocalRerank(engine=scorer, on_overflow="truncate").score([("a", "word " * 500)])
    with pytest.raises(core.ModelInvalidRequestError, match="instruction"):
        LocalRerank(engine=scorer, instruction="x").score([("a", "b")])
    with pytest.raises(engine.RequestTimeoutError):
        LocalRerank(engine=tiny_engine, timeout=0.0001).score([("a", "b")] * 50)
    with pytest.raises(ValidationError, match="Did you mean 'top_n'"):
        LocalRerank(model="x", topn=3)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        LocalRerank(model="x", top_n=0)


def test_what_it_is(scorer: Engine) -> None:
    rerank: Any = LocalRerank(engine=scorer)
    assert isinstance(rerank, BaseDocumentCompressor)
    assert isinstance(rerank, BaseCrossEncoder)
    clone = pickle.loads(pickle.dumps(rerank))
    assert clone.model == rerank.model
    assert not clone._lease.is_loaded
