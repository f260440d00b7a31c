"""200 real documents through real engines, offline: a random Llama's words, MiniLM's vectors.

The documents are docstrings of Python's standard library, under the PSF licence. Titles and answers
of a random model mean nothing, but its tokens, batches, caches and limits are real; what is found
by the vectors means something.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import llama_index.core
import pytest
from llama_index.core import (
    Document,
    PropertyGraphIndex,
    Settings,
    StorageContext,
    VectorStoreIndex,
)
from llama_index.core import extractors as core
from llama_index.core.evaluation import BatchEvalRunner, FaithfulnessEvaluator
from llama_index.core.indices.property_graph import SimpleLLMPathExtractor
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.query_engine import SubQuestionQueryEngine
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.schema import BaseNode, MetadataMode, TextNode
from llama_index.core.tools import QueryEngineTool
from python_documents import python_documents
from tiny_checkpoints import write_tiny_llama

from engine import Engine
from llm_connectors.llama_index import (
    ExtractorGroup,
    LocalEmbedding,
    LocalLLM,
    LocalRerank,
    batched,
    configure_settings,
    offline_sentence_splitter,
    query_many,
    retrieve_many,
    with_shared_prefix,
)

NUM_DOCUMENTS = 200
LENGTH = 300
KEYS = {
    "document_title",
    "section_summary",
    "excerpt_keywords",
    "questions_this_excerpt_can_answer",
}
pytestmark = [
    pytest.mark.embedding_model,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # LlamaIndex's own
    pytest.mark.filterwarnings("ignore:Payload indexes:UserWarning"),  # Qdrant's, on a disk
]


@pytest.fixture(scope="module", autouse=True)
def no_network() -> Iterator[None]:
    def refuse(*args: Any, **_: Any) -> None:
        pytest.fail(f"network access: {args}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket.socket, "connect_ex", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        yield


@pytest.fixture(scope="module")
def embed(embedding_model: str) -> Iterator[LocalEmbedding]:
    with Engine(embedding_model, device="cpu", num_threads=1) as engine:
        yield LocalEmbedding(engine=engine, on_overflow="truncate")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory, embed: LocalEmbedding) -> Iterator[LocalLLM]:
    folder = write_tiny_llama(tmp_path_factory.mktemp("long"), max_position_embeddings=8192)
    saved, tokenizer = dict(vars(Settings)), llama_index.core.global_tokenizer
    with Engine(str(folder), device="cpu", num_threads=1, max_num_seqs=256) as engine:
        made = LocalLLM(engine=engine, max_tokens=8, temperature=0.0, ignore_eos=True)
        configure_settings(made, embed)
        yield made
        assert engine.stats().kv_blocks_used == 0
    vars(Settings).update(saved)
    llama_index.core.global_tokenizer = tokenizer


@pytest.fixture(scope="module")
def nodes(llm: LocalLLM, embed: LocalEmbedding) -> list[BaseNode]:
    """All documents, with what four extractors made of them, and their vectors."""
    asyncio.set_event_loop(None)  # see the fixture `no_current_loop`, which comes later
    documents = [
        Document(text=text[:LENGTH], metadata={"module": name}, doc_id=name)
        for name, text in python_documents(NUM_DOCUMENTS).items()
    ]
    kinds = (
        core.TitleExtractor,
        core.SummaryExtractor,
        core.KeywordExtractor,
        core.QuestionsAnsweredExtractor,
    )
    extractors = [kind(llm=llm, show_progress=False) for kind in kinds]
    group = ExtractorGroup(
        extractors=with_shared_prefix(batched(extractors, 128)), show_progress=False
    )
    splitter = offline_sentence_splitter(llm, chunk_size=1024)
    found = IngestionPipeline(transformations=[splitter, group]).run(documents=documents)
    for node in found:
        # A random model's words would only blur the vectors.
        node.excluded_embed_metadata_keys = [*KEYS, "module"]
    return list(embed(found))


@pytest.fixture(scope="module")
def store_path(nodes: list[BaseNode], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Qdrant store on disk that holds them."""
    client = pytest.importorskip("qdrant_client")
    stores = pytest.importorskip("llama_index.vector_stores.qdrant")
    path = str(tmp_path_factory.mktemp("qdrant"))
    local = client.QdrantClient(path=path)
    context = StorageContext.from_defaults(vector_store=stores.QdrantVectorStore("p", local))
    VectorStoreIndex(nodes=nodes, storage_context=context)
    local.close()
    return path


@pytest.fixture
def index(store_path: str) -> Iterator[VectorStoreIndex]:
    """The store opened again, for sync code. Embedded, Qdrant opens a folder once."""
    from llama_index.vector_stores.qdrant import QdrantVectorStore
    from qdrant_client import QdrantClient

    client = QdrantClient(path=store_path)
    yield VectorStoreIndex.from_vector_store(QdrantVectorStore("p", client))
    client.close()


@pytest.fixture
def async_index(store_path: str) -> Iterator[VectorStoreIndex]:
    """The same for async code, which `query_many` and `retrieve_many` are."""
    from llama_index.vector_stores.qdrant import QdrantVectorStore
    from qdrant_client import AsyncQdrantClient

    client = AsyncQdrantClient(path=store_path)
    yield VectorStoreIndex.from_vector_store(QdrantVectorStore("p", aclient=client))
    asyncio.run(client.close())


def test_ingestion_filled_the_batch_and_shared_prefixes(
    llm: LocalLLM, nodes: list[BaseNode]
) -> None:
    assert {node.ref_doc_id for node in nodes} == set(python_documents(NUM_DOCUMENTS))
    assert all(set(node.metadata) >= KEYS for node in nodes)
    stats = llm.engine.stats()
    print(f"{stats.requests_finished} requests, peak {stats.peak_running}")
    print(f"prefix hits {stats.prefix_hit_rate:.0%} of {stats.prefix_query_tokens} tokens")
    assert stats.requests_finished >= 5 * NUM_DOCUMENTS
    assert stats.peak_running >= 64
    assert stats.prefix_hit_rate > 0.4


def test_documents_are_found_by_what_they_say(
    index: VectorStoreIndex, nodes: list[BaseNode]
) -> None:
    """The first sentences of a module's documentation find the module."""
    asked = [node for node in nodes[::2] if len(node.get_content(MetadataMode.NONE)) > 200]
    texts = [node.get_content(MetadataMode.NONE)[:160] for node in asked]
    retriever = index.as_retriever(similarity_top_k=3)
    hits = [
        node.metadata["module"] in {one.metadata["module"] for one in retriever.retrieve(text)}
        for node, text in zip(asked, texts, strict=True)
    ]
    print(f"{sum(hits)} of {len(hits)} found among three")
    assert len(hits) >= 30
    assert sum(hits) >= 0.9 * len(hits)
    best = index.as_query_engine(similarity_top_k=1, response_mode="no_text")
    answer = best.query("Which module prints calendars of a month?")
    assert "calendar" in answer.source_nodes[0].metadata["module"]


def test_many_queries_over_the_store(
    async_index: VectorStoreIndex, llm: LocalLLM, embed: LocalEmbedding
) -> None:
    queries = [f"Which module is about {word}?" for word in ("calendars", "colours", "mail")]
    found = retrieve_many(async_index.as_retriever(similarity_top_k=2), queries * 8)
    assert [len(nodes) for nodes in found] == [2] * 24
    rerank = LocalRerank(engine=embed.engine, top_n=2, on_overflow="truncate")
    query_engine = async_index.as_query_engine(similarity_top_k=5, node_postprocessors=[rerank])
    for answer in query_many(query_engine, queries * 8):
        assert len(answer.source_nodes) == 2
        assert str(answer) != "Empty Response"


def test_streams_and_chats_over_the_store(index: VectorStoreIndex) -> None:
    stream = index.as_query_engine(streaming=True, response_mode="tree_summarize")
    assert "".join(stream.query("What is abc?").response_gen)
    memory = ChatMemoryBuffer.from_defaults(token_limit=1000)
    chat = index.as_chat_engine(chat_mode="condense_plus_context", memory=memory)
    assert str(chat.chat("What is abc?"))
    assert "".join(chat.stream_chat("And cmd?").response_gen)


# ---- components that read free text, with answers that are held to what they can read


def test_a_graph_of_all_documents(llm: LocalLLM, nodes: list[BaseNode]) -> None:
    held = llm.with_options(
        regex=r"\([a-z]{3,8}, [a-z]{3,8}, [a-z]{3,8}\)", max_tokens=60, ignore_eos=False
    )
    extractor = SimpleLLMPathExtractor(llm=held, max_paths_per_chunk=1)
    graph = PropertyGraphIndex(
        nodes=[TextNode(text=node.get_content(MetadataMode.NONE)) for node in nodes],
        llm=held,
        kg_extractors=batched([extractor], 64),
        embed_kg_nodes=False,
    )
    # Equal triples are one relation.
    assert 1 <= len(graph.property_graph_store.graph.relations) <= len(nodes)


def test_sub_questions_and_evaluations(index: VectorStoreIndex, llm: LocalLLM) -> None:
    question = {
        "type": "object",
        "properties": {
            "sub_question": {"type": "string", "minLength": 3, "maxLength": 12},
            "tool_name": {"const": "python"},
        },
        "required": ["sub_question", "tool_name"],
    }
    schema = {"type": "array", "items": question, "minItems": 2, "maxItems": 2}
    generator = LLMQuestionGenerator.from_defaults(
        llm=llm.with_options(json_schema=schema, max_tokens=250, ignore_eos=False)
    )
    tool = QueryEngineTool.from_defaults(index.as_query_engine(), name="python", description="d")
    engine = SubQuestionQueryEngine.from_defaults(
        [tool], question_gen=generator, llm=llm, use_async=False, verbose=False
    )
    answer = engine.query("What are ast and abc?")
    assert str(answer) != "Empty Response"
    assert sum("Sub question" in one.node.get_content() for one in answer.source_nodes) == 2

    judge = FaithfulnessEvaluator(llm=llm.with_options(choice=["YES", "NO"], max_tokens=4))
    runner = batched(BatchEvalRunner({"faithful": judge}), 32)
    results = asyncio.run(
        runner.aevaluate_response_strs(
            queries=["What?"] * 32,
            response_strs=["A module."] * 32,
            contexts_list=[[one.node.get_content()] for one in answer.source_nodes[:1]] * 32,
        )
    )
    assert {one.feedback for one in results["faithful"]} <= {"YES", "NO"}
    assert len(results["faithful"]) == 32
