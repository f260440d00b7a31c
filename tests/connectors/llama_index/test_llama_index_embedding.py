"""`LocalEmbedding` and `LocalRerank` in LlamaIndex: contract, batching, copies, pipelines."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core import Document, PromptTemplate, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
from llama_index.core.callbacks.schema import CBEventType
from llama_index.core.embeddings.loading import load_embed_model
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from tiny_encoders import write_encoder, write_layout

import engine
from engine import Engine
from llm_connectors.langchain import LocalEmbeddings
from llm_connectors.llama_index import (
    ConfigError,
    ContextOverflowError,
    ForeignProcessError,
    LocalEmbedding,
    LocalLLM,
    LocalRerank,
    RequestError,
    aretrieve_many,
    retrieve_many,
)
from llm_connectors.llama_index.pickling import unpickled

TEXTS = [f"a text on the letter {letter}" for letter in "abcdefghijklmnopq"]
ENGINE_KWARGS = {"device": "cpu", "num_threads": 1}


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


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("scorer")
    write_encoder(folder, "bert", "ForSequenceClassification", num_labels=1)
    with Engine(str(folder), **ENGINE_KWARGS) as engine:
        yield engine


@pytest.fixture
def embed(eng: Engine) -> LocalEmbedding:
    return LocalEmbedding(engine=eng)


# -------------------------------------------------------------------- embeddings


async def test_all_endpoints_agree(embed: LocalEmbedding, eng: Engine) -> None:
    expected = eng.embed(["d: " + text for text in TEXTS], prompt="").tolist()
    assert embed.get_text_embedding_batch(TEXTS) == expected
    assert await embed.aget_text_embedding_batch(TEXTS) == expected
    assert embed.get_text_embedding(TEXTS[3]) == expected[3]
    assert await embed.aget_text_embedding(TEXTS[3]) == expected[3]
    query = eng.embed("q: where", prompt="").tolist()
    assert embed.get_query_embedding("where") == query
    assert await embed.aget_query_embedding("where") == query
    assert embed.get_text_embedding_batch([]) == []
    agg = embed.get_agg_embedding_from_queries(["where", "when"])
    assert np.allclose(agg, eng.embed(["q: where", "q: when"], prompt="").mean(0), atol=1e-6)


def test_default_batch_is_large(embed: LocalEmbedding, eng: Engine) -> None:
    assert embed.embed_batch_size == 512
    before = eng.stats().requests_finished
    embed.get_text_embedding_batch([f"text {n}" for n in range(1000)])
    assert eng.stats().requests_finished == before + 2


async def test_gathered_calls_share_batches(embed: LocalEmbedding, eng: Engine) -> None:
    steps = eng.stats().steps
    found = await asyncio.gather(*(embed.aget_text_embedding(text) for text in TEXTS * 3))
    assert found == embed.get_text_embedding_batch(TEXTS) * 3
    assert eng.stats().steps - steps < len(TEXTS) * 3


def test_an_index_retrieves_the_nearest(embed: LocalEmbedding) -> None:
    index = VectorStoreIndex.from_documents(
        [Document(text=text) for text in TEXTS], embed_model=embed
    )
    [best] = index.as_retriever(similarity_top_k=1).retrieve("the letter g")
    vectors = np.array(embed.get_text_embedding_batch(TEXTS))
    nearest = int(np.argmax(vectors @ np.array(embed.get_query_embedding("the letter g"))))
    assert best.node.get_content() == TEXTS[nearest]


def test_many_retrievals_share_batches(embed: LocalEmbedding, eng: Engine) -> None:
    documents = [Document(text=text) for text in TEXTS]
    retriever = VectorStoreIndex.from_documents(documents, embed_model=embed).as_retriever(
        similarity_top_k=2
    )
    expected = [[one.node_id for one in retriever.retrieve(text)] for text in TEXTS]
    steps = eng.stats().steps
    found = retrieve_many(retriever, TEXTS)
    assert [[one.node_id for one in nodes] for nodes in found] == expected
    assert eng.stats().steps - steps < len(TEXTS)

    async def in_a_loop() -> Any:
        return await aretrieve_many(retriever, TEXTS[:3], concurrency=1)

    assert [[one.node_id for one in nodes] for nodes in asyncio.run(in_a_loop())] == expected[:3]
    with pytest.raises(RequestError, match="concurrency"):
        retrieve_many(retriever, TEXTS, concurrency=0)


async def test_in_a_pipeline(embed: LocalEmbedding) -> None:
    pipeline = IngestionPipeline(transformations=[embed])
    documents = [Document(text=text) for text in TEXTS]
    nodes = await pipeline.arun(documents=documents)
    assert [node.embedding for node in nodes] == embed.get_text_embedding_batch(TEXTS)
    assert all(node.embedding for node in pipeline.run(documents=documents))


def test_events_come_once(eng: Engine) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    embed = LocalEmbedding(engine=eng, callback_manager=CallbackManager([debug]))
    embed.get_text_embedding_batch(TEXTS)
    assert len(debug.get_event_pairs(CBEventType.EMBEDDING)) == 1


@pytest.mark.parametrize("call", ["get_text_embedding", "aget_text_embedding"])
def test_overflow_is_typed_and_no_value_error(embed: LocalEmbedding, call: str) -> None:
    """LlamaIndex turns a `ValueError` into an empty answer."""

    def run() -> Any:
        result = getattr(embed, call)("x " * 100)
        return asyncio.run(result) if asyncio.iscoroutine(result) else result

    with pytest.raises(ContextOverflowError) as caught:
        run()
    assert not isinstance(caught.value, ValueError)


def test_truncation_and_timeout(eng: Engine) -> None:
    assert LocalEmbedding(engine=eng, on_overflow="truncate").get_text_embedding("x " * 100)
    late = LocalEmbedding(engine=eng, timeout=0.001)
    texts = [f"{n} word" for n in range(500)]
    with pytest.raises(engine.RequestTimeoutError):
        late.get_text_embedding_batch(texts)
    with pytest.raises(engine.RequestTimeoutError):
        asyncio.run(late.aget_text_embedding_batch(texts))


def test_closing_while_a_pipeline_runs(folder: Path) -> None:
    with Engine(str(folder), **ENGINE_KWARGS) as own:
        pipeline = IngestionPipeline(transformations=[LocalEmbedding(engine=own)])
        documents = [Document(text=f"{n} {'word ' * 8}") for n in range(1500)]

        async def main() -> None:
            running = asyncio.create_task(pipeline.arun(documents=documents))
            while not own.stats().steps:
                await asyncio.sleep(0.001)
            await asyncio.to_thread(own.close, drain=False)
            with pytest.raises(engine.EngineClosedError):
                await running

        asyncio.run(main())


def test_copies_dictionaries_and_pickles_share_the_engine(embed: LocalEmbedding) -> None:
    expected = embed.get_query_embedding("x")
    for clone in (
        copy.copy(embed),
        copy.deepcopy(embed),
        pickle.loads(pickle.dumps(embed)),
        LocalEmbedding.from_dict(embed.to_dict()),
        load_embed_model(embed.to_dict()),
    ):
        assert isinstance(clone, LocalEmbedding)
        assert clone.engine is embed.engine
        assert clone.get_query_embedding("x") == expected
    foreign: Any = unpickled(LocalEmbedding, dict(embed.__dict__), 1)
    with pytest.raises(ForeignProcessError, match="This LocalEmbedding"):
        foreign.get_query_embedding("x")


def test_both_frameworks_share_one_engine(folder: Path) -> None:
    with LocalEmbedding(str(folder), engine_kwargs=ENGINE_KWARGS) as embed:
        other = LocalEmbeddings(model=str(folder), engine_kwargs=ENGINE_KWARGS)
        assert other.embed_query("x") == embed.get_query_embedding("x")
        assert other._engine() is embed.engine
        other.close()


@pytest.mark.parametrize("made", [LocalEmbedding, LocalRerank])
def test_bad_options(made: Any) -> None:
    with pytest.raises(RequestError, match="Did you mean 'timeout'"):
        made("x", timout=3)
    with pytest.raises(RequestError, match="on_overflow='cut'"):
        made("x", on_overflow="cut")
    with pytest.raises(ConfigError, match="No model given"):
        made()
    with pytest.raises(ConfigError, match="Did you mean 'dtype'"):
        made("x", engine_kwargs={"dtyp": "x"})


# -------------------------------------------------------------------- reranking


def nodes() -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(text=text), score=0.5) for text in TEXTS]


@pytest.mark.parametrize("kind", ["scorer", "eng", "tiny_engine"])
async def test_the_best_nodes_in_order(kind: str, request: pytest.FixtureRequest) -> None:
    ranker: Engine = request.getfixturevalue(kind)
    rerank = LocalRerank(engine=ranker, top_n=4)
    given = nodes()
    best = rerank.postprocess_nodes(given, query_str="the letter g")
    scores = ranker.score("the letter g", TEXTS)
    order = np.argsort(-scores, kind="stable")[:4]
    assert [one.node.get_content() for one in best] == [TEXTS[place] for place in order]
    assert [one.score for one in best] == pytest.approx(scores[order].tolist(), abs=1e-5)
    assert all(one.score == 0.5 for one in given)
    found = await rerank.apostprocess_nodes(given, QueryBundle("the letter g"))
    assert [one.node.get_content() for one in found] == [TEXTS[place] for place in order]


def test_judging_runs_in_one_batch(tiny_llama: Path) -> None:
    with Engine(str(tiny_llama), **ENGINE_KWARGS, max_num_seqs=64) as ranker:
        LocalRerank(engine=ranker).postprocess_nodes(nodes(), query_str="g")
        assert ranker.stats().peak_running > len(TEXTS)


def test_nothing_to_rank_and_no_query(scorer: Engine) -> None:
    rerank = LocalRerank(engine=scorer)
    assert rerank.postprocess_nodes([], query_str="a") == []
    with pytest.raises(RequestError, match="ranked for a query"):
        rerank.postprocess_nodes(nodes())


def test_threshold_and_events(scorer: Engine) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    scores = sorted(scorer.score("a", TEXTS).tolist())
    rerank = LocalRerank(
        engine=scorer,
        top_n=20,
        min_score=(scores[-3] + scores[-4]) / 2,
        callback_manager=CallbackManager([debug]),
    )
    assert len(rerank.postprocess_nodes(nodes(), query_str="a")) == 3
    assert len(debug.get_event_pairs(CBEventType.RERANKING)) == 1


def test_rerank_errors_copies_and_pickles(scorer: Engine) -> None:
    rerank = LocalRerank(engine=scorer)
    long = [NodeWithScore(node=TextNode(text="word " * 300))]
    with pytest.raises(ContextOverflowError) as caught:
        rerank.postprocess_nodes(long, query_str="a")
    assert not isinstance(caught.value, ValueError)
    clone = pickle.loads(pickle.dumps(LocalRerank(engine=scorer, on_overflow="truncate")))
    assert clone.engine is scorer
    assert clone.postprocess_nodes(long, query_str="a")[0].score is not None
    assert copy.deepcopy(rerank).engine is scorer


def test_in_a_query_engine(eng: Engine, tiny_llama: Path) -> None:
    with LocalLLM(str(tiny_llama), engine_kwargs=ENGINE_KWARGS, max_tokens=4) as llm:
        index = VectorStoreIndex.from_documents(
            [Document(text=text) for text in TEXTS[:4]], embed_model=LocalEmbedding(engine=eng)
        )
        rerank = LocalRerank(str(tiny_llama), engine_kwargs=ENGINE_KWARGS, top_n=2)
        answer = index.as_query_engine(
            llm=llm,
            similarity_top_k=3,
            node_postprocessors=[rerank],
            response_mode="simple_summarize",
            text_qa_template=PromptTemplate("{context_str} {query_str}"),
        ).query("g?")
        assert len(answer.source_nodes) == 2
        assert rerank.engine is llm.engine
        rerank.close()
