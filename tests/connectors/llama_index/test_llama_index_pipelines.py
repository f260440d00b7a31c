"""Whole pipelines over 200 real documents, offline: ingestion, indices, stores, bad input."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_index.core
import pytest
from llama_index.core import (
    Document,
    PropertyGraphIndex,
    Settings,
    StorageContext,
    SummaryIndex,
    VectorStoreIndex,
    load_index_from_storage,
)
from llama_index.core import extractors as core
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.evaluation import BatchEvalRunner, FaithfulnessEvaluator
from llama_index.core.indices.property_graph import SimpleLLMPathExtractor
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.query_engine import SubQuestionQueryEngine
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.schema import BaseNode
from llama_index.core.tools import QueryEngineTool
from llama_index_fake_engine import FakeEngine
from pydantic import PrivateAttr
from python_documents import python_documents

from engine import EngineClosedError
from llm_connectors.llama_index import (
    ConfigError,
    ContextOverflowError,
    ExtractorGroup,
    LocalLLM,
    aquery_many,
    batched,
    configure_settings,
    offline_sentence_splitter,
    with_shared_prefix,
)

NUM_DOCUMENTS = 200
QUIET: dict[str, Any] = {"show_progress": False}
ASKS_NOBODY = (ResponseMode.NO_TEXT, ResponseMode.CONTEXT_ONLY)
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # LlamaIndex's own
    pytest.mark.filterwarnings("ignore:Payload indexes:UserWarning"),  # Qdrant's, on a disk
]


class WordEmbedding(MockEmbedding):
    """Counts of words in 64 buckets: enough to find a text by its words."""

    _num_calls: int = PrivateAttr(default=0)

    def _get_vector(self) -> list[float]:
        raise AssertionError("every text has a vector of its own")

    def _embed(self, text: str) -> list[float]:
        vector = [0.01] * self.embed_dim
        for word in text.lower().split():
            vector[sum(map(ord, word)) % self.embed_dim] += 1.0
        return vector

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._embed(text)

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._embed(query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return self._embed(text)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._embed(query)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **_: Any) -> None:
        pytest.fail(f"network access: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    saved, tokenizer = dict(vars(Settings)), llama_index.core.global_tokenizer
    yield
    vars(Settings).update(saved)
    llama_index.core.global_tokenizer = tokenizer


@pytest.fixture
def fake() -> Iterator[FakeEngine]:
    engine = FakeEngine(max_model_len=4096)
    yield engine
    engine.close()


@pytest.fixture
def llm(fake: FakeEngine) -> LocalLLM:
    made = LocalLLM(engine=fake, max_tokens=64)
    configure_settings(made, WordEmbedding(embed_dim=64))
    return made


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    found = python_documents(NUM_DOCUMENTS)
    assert len(found) == NUM_DOCUMENTS
    return [
        Document(text=text, metadata={"module": name, "licence": "PSF-2.0"}, doc_id=name)
        for name, text in found.items()
    ]


def four_extractors(llm: LocalLLM) -> list[Any]:
    return [
        core.TitleExtractor(llm=llm, **QUIET),
        core.SummaryExtractor(llm=llm, **QUIET),
        core.KeywordExtractor(llm=llm, **QUIET),
        core.QuestionsAnsweredExtractor(llm=llm, **QUIET),
    ]


@pytest.mark.parametrize("together", [False, True])
def test_ingestion_fills_the_batch(
    llm: LocalLLM, fake: FakeEngine, documents: list[Document], together: bool
) -> None:
    fake.step_s = 0.03
    parts: list[Any] = batched(four_extractors(llm), 64)
    if together:
        parts = [ExtractorGroup(extractors=with_shared_prefix(parts), **QUIET)]
    splitter = offline_sentence_splitter(llm, chunk_size=512)
    pipeline = IngestionPipeline(transformations=[splitter, *parts, Settings.embed_model])
    nodes = pipeline.run(documents=documents)
    assert len(nodes) >= NUM_DOCUMENTS
    assert {node.ref_doc_id for node in nodes} == {document.doc_id for document in documents}
    keys = {
        "document_title",
        "section_summary",
        "excerpt_keywords",
        "questions_this_excerpt_can_answer",
    }
    assert all(keys <= set(node.metadata) and node.embedding for node in nodes)
    assert fake.peak_running >= (200 if together else 60)
    # A second run of the same is answered by LlamaIndex's cache, which knows the model by name.
    num_requests = len(fake.requests)
    pipeline.run(documents=documents)
    assert len(fake.requests) == num_requests


@pytest.fixture
def index(llm: LocalLLM, documents: list[Document]) -> VectorStoreIndex:
    return VectorStoreIndex.from_documents(documents[:40])


@pytest.mark.parametrize("mode", ResponseMode)
def test_all_response_modes(index: VectorStoreIndex, fake: FakeEngine, mode: str) -> None:
    engine = index.as_query_engine(response_mode=mode, similarity_top_k=3)
    response = engine.query("abstract base classes")
    assert len(response.source_nodes) == 3
    again = asyncio.run(engine.aquery("abstract base classes"))
    if mode not in ASKS_NOBODY:
        assert "Seen" in str(response)
        assert str(again) == str(response)


def test_chat_engines_and_streams(index: VectorStoreIndex) -> None:
    for mode in ("context", "condense_question", "condense_plus_context", "simple"):
        memory = ChatMemoryBuffer.from_defaults(token_limit=1000)
        chat = index.as_chat_engine(chat_mode=mode, memory=memory)
        assert "Seen" in str(chat.chat("What is ast?"))
        assert "Seen" in "".join(chat.stream_chat("And abc?").response_gen)

        async def stream(chat: Any = chat) -> str:
            response = await chat.astream_chat("And argparse?")
            return "".join([token async for token in response.async_response_gen()])

        assert "Seen" in asyncio.run(stream())


def test_graph_from_documents(llm: LocalLLM, fake: FakeEngine, documents: list[Document]) -> None:
    fake.answer = lambda _prompt, _params: "(ast, parses, code)\n(code, is, text)"
    fake.step_s = 0.005
    graph = PropertyGraphIndex.from_documents(
        documents,
        kg_extractors=batched([SimpleLLMPathExtractor(llm=llm)], 48),
        embed_kg_nodes=False,
    )
    triplets = graph.property_graph_store.get_triplets(entity_names=["Ast", "ast"])
    assert {triplet[1].label.lower() for triplet in triplets} == {"parses"}
    assert fake.peak_running >= 40


def test_sub_questions(llm: LocalLLM, fake: FakeEngine, index: VectorStoreIndex) -> None:
    questions = '[{"sub_question": "What is %s?", "tool_name": "python"}]'
    several = "[" + ", ".join((questions % name)[1:-1] for name in ("ast", "abc", "cmd")) + "]"
    fake.answer = lambda prompt, _params: (
        f"```json\n{several}\n```" if "sub_question" in prompt else "It is a module."
    )
    tool = QueryEngineTool.from_defaults(index.as_query_engine(), name="python", description="d")
    engine = SubQuestionQueryEngine.from_defaults(
        [tool],
        question_gen=LLMQuestionGenerator.from_defaults(llm=llm),
        llm=llm,
        verbose=False,
    )
    fake.step_s = 0.02
    response = engine.query("What are ast, abc and cmd?")
    assert str(response) == "It is a module."
    assert len(fake.requests) == 5
    assert fake.peak_running == 3


def test_answers_that_core_gathers_are_one_batch(
    llm: LocalLLM, fake: FakeEngine, documents: list[Document]
) -> None:
    """Accumulation and the leaves of a tree, in sync code too."""
    fake.answer = lambda _prompt, _params: "word " * 30
    fake.step_s = 0.02
    index = SummaryIndex.from_documents([Document(text=one.text[:400]) for one in documents[:40]])
    engine = index.as_query_engine(response_mode="accumulate", use_async=True)
    assert str(engine.query("What?")).count("Response ") == 40
    assert fake.peak_running == 40
    fake.peak_running = 0
    long = SummaryIndex.from_documents(documents[:80])
    tree = long.as_query_engine(response_mode="tree_summarize")
    num_requests = len(fake.requests)
    asyncio.run(tree.aquery("What?"))
    assert 4 <= fake.peak_running == len(fake.requests) - num_requests - 1


def test_many_evaluations(llm: LocalLLM, fake: FakeEngine, documents: list[Document]) -> None:
    fake.step_s = 0.03
    runner = batched(BatchEvalRunner({"faithful": FaithfulnessEvaluator(llm=llm)}), 32)
    results = asyncio.run(
        runner.aevaluate_response_strs(
            queries=["What?"] * 32,
            response_strs=["A module."] * 32,
            contexts_list=[[one.text[:500]] for one in documents[:32]],
        )
    )
    assert len(results["faithful"]) == 32
    assert fake.peak_running >= 30


def test_64_queries_are_64_requests(index: VectorStoreIndex, fake: FakeEngine) -> None:
    fake.answer = lambda _prompt, _params: "word " * 60
    fake.step_s = 0.02
    queries = [f"What is module {number}?" for number in range(64)]
    answers = asyncio.run(aquery_many(index.as_query_engine(), queries))
    assert len(answers) == 64
    assert fake.peak_running == 64


# ---- a persistent vector store


@pytest.fixture
def qdrant(tmp_path: Path) -> Any:
    client = pytest.importorskip("qdrant_client")
    module = pytest.importorskip("llama_index.vector_stores.qdrant")

    def open_store() -> tuple[Any, Any]:
        local = client.QdrantClient(path=str(tmp_path / "qdrant"))
        return local, module.QdrantVectorStore("python", client=local)

    return open_store


def test_a_store_on_disk(llm: LocalLLM, documents: list[Document], qdrant: Any) -> None:
    client, store = qdrant()
    context = StorageContext.from_defaults(vector_store=store)
    VectorStoreIndex.from_documents(documents[:60], storage_context=context)
    client.close()
    client, store = qdrant()
    index = VectorStoreIndex.from_vector_store(store)
    response = index.as_query_engine(similarity_top_k=4).query(documents[7].text)
    assert "Seen" in str(response)
    found = {node.metadata["module"] for node in response.source_nodes}
    assert documents[7].doc_id in found
    client.close()


def test_vectors_of_another_length_than_the_store(
    llm: LocalLLM, documents: list[Document], qdrant: Any
) -> None:
    client, store = qdrant()
    context = StorageContext.from_defaults(vector_store=store)
    VectorStoreIndex.from_documents(documents[:3], storage_context=context)
    other = VectorStoreIndex.from_vector_store(store, embed_model=WordEmbedding(embed_dim=32))
    with pytest.raises(ValueError, match=r"32|64"):
        other.as_query_engine().query("What?")
    client.close()


def test_vectors_of_another_length_than_the_index(
    llm: LocalLLM, index: VectorStoreIndex, tmp_path: Path
) -> None:
    """An index in memory, and one that was written to a folder and read again."""
    index.storage_context.persist(str(tmp_path))
    loaded = load_index_from_storage(
        StorageContext.from_defaults(persist_dir=str(tmp_path)),
        embed_model=WordEmbedding(embed_dim=32),
    )
    with pytest.raises(ValueError, match=r"32|64"):
        loaded.as_query_engine().query("What?")
    with pytest.raises(ValueError, match=r"32|64"):
        asyncio.run(loaded.as_query_engine().aquery("What?"))


# ---- bad input


def test_documents_of_no_and_of_a_million_characters(llm: LocalLLM, fake: FakeEngine) -> None:
    texts = ["", " \n", "A sentence of words. " * 50_000, "x" * 200_000]
    parts: list[Any] = [offline_sentence_splitter(llm), *batched(four_extractors(llm), 64)]
    nodes = IngestionPipeline(transformations=parts).run(
        documents=[Document(text=text) for text in texts]
    )
    assert sum(len(node.get_content()) for node in nodes) >= 1_000_000
    longest = max(len(request.prompt_ids) for request in fake.requests)
    assert longest < fake.max_model_len
    answers = asyncio.run(
        aquery_many(VectorStoreIndex(nodes=nodes[:50]).as_query_engine(), ["What?", "?"])
    )
    assert all("Seen" in str(answer) for answer in answers)


def test_a_window_smaller_than_the_prompt_template(fake: FakeEngine) -> None:
    small = FakeEngine(max_model_len=24)
    with pytest.raises(ConfigError, match="24"):
        configure_settings(LocalLLM(engine=small, max_tokens=16), MockEmbedding(embed_dim=2))
    configure_settings(LocalLLM(engine=fake, max_tokens=16), MockEmbedding(embed_dim=2))
    tight = LocalLLM(engine=small, max_tokens=8)
    index = VectorStoreIndex.from_documents([Document(text="Some text.")])
    # The question by itself fits.
    for mode in set(ResponseMode) - {*ASKS_NOBODY, ResponseMode.GENERATION}:
        engine = index.as_query_engine(llm=tight, response_mode=mode)
        with pytest.raises(ContextOverflowError, match="24"):
            engine.query("What?")
        with pytest.raises(ContextOverflowError, match="24"):
            asyncio.run(engine.aquery("What?"))
    assert small.requests == []
    small.close()


def test_closing_the_engine_while_a_pipeline_runs(
    llm: LocalLLM, fake: FakeEngine, documents: list[Document]
) -> None:
    fake.answer = lambda _prompt, _params: "word " * 60
    fake.step_s = 0.02
    timer = threading.Timer(0.3, fake.close)
    pipeline = IngestionPipeline(transformations=batched(four_extractors(llm)))
    nodes: list[BaseNode] = offline_sentence_splitter(llm)(documents[:80])
    timer.start()
    with pytest.raises(EngineClosedError):
        pipeline.run(nodes=nodes)
    timer.join()
