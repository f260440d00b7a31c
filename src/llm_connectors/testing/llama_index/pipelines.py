"""Checks inside LlamaIndex's own pipelines: overflow, embeddings, RAG without a network."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core import Document, PropertyGraphIndex, SummaryIndex, VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.evaluation import BatchEvalRunner, FaithfulnessEvaluator
from llama_index.core.extractors import KeywordExtractor, SummaryExtractor
from llama_index.core.indices.property_graph import SimpleLLMPathExtractor
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.postprocessor import LLMRerank
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from llm_connectors.testing.llama_index.subject import (
    ENDPOINTS,
    Subject,
    is_swallowed,
    responses,
)

MODES = ("compact", "refine", "tree_summarize", "accumulate", "simple_summarize")
FACTS = ["Ada wrote the first program.", "Grace wrote the first compiler."]


def _nodes(texts: list[str]) -> list[TextNode]:
    return [TextNode(text=text) for text in texts]


def _embedding() -> MockEmbedding:
    return MockEmbedding(embed_dim=2)


def check_11_overflow(subject: Subject) -> None:
    """A prompt that is too long fails with one typed error on every path, never silently."""
    llm = subject.llm
    for endpoint in ENDPOINTS:
        with pytest.raises(Exception, match=r"(?s).+") as caught:
            responses(llm, endpoint, max_tokens=10**9)
        assert not is_swallowed(caught.value), f"{endpoint}: {caught.value!r}"
    wanted = type(caught.value)
    long = _nodes(["word " * (2 * llm.metadata.context_window)])

    async def in_a_loop(function: Callable[[], Any]) -> None:
        function()

    def pipeline() -> None:
        extractor = KeywordExtractor(llm=llm, show_progress=False)
        IngestionPipeline(transformations=[extractor], disable_cache=True).run(nodes=long)

    def chat() -> None:
        responses(llm, "chat", [ChatMessage(content=long[0].text)])

    def predict() -> None:
        llm.predict(PromptTemplate("{text}"), text=long[0].text)

    for way in (pipeline, chat, predict):
        with pytest.raises(wanted):
            way()
        with pytest.raises(wanted):
            asyncio.run(in_a_loop(way))


def check_26_embeddings(subject: Subject) -> None:
    """Order and batch do not matter, async equals sync, an empty list is no request."""
    embed = subject.probe("embedding")
    texts = ["a cat", "a dog sleeps in the sun today", "rain", ""]
    whole = embed.get_text_embedding_batch(texts)
    assert len(whole) == len(texts)
    for text, vector in zip(texts, whole, strict=True):
        assert _is_close(embed.get_text_embedding(text), vector), text
    assert all(
        _is_close(one, other)
        for one, other in zip(embed.get_text_embedding_batch(texts[::-1]), whole[::-1], strict=True)
    )
    again = asyncio.run(embed.aget_text_embedding_batch(texts))
    assert all(_is_close(one, other) for one, other in zip(again, whole, strict=True))
    query = embed.get_query_embedding("a cat")
    assert _is_close(asyncio.run(embed.aget_query_embedding("a cat")), query)
    assert embed.get_text_embedding_batch([]) == []


def _is_close(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) and math.dist(one, other) < 1e-4


def check_27_rag_offline(subject: Subject) -> None:
    """Index, response modes, extractors, graph, reranker, evaluation: no socket is opened."""
    llm = subject.llm
    splitter = SentenceSplitter(chunk_size=64, chunk_overlap=0, tokenizer=str.split)
    documents = [Document(text=text) for text in FACTS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _refuse)
        patch.setattr(socket, "getaddrinfo", _refuse)
        for make in (SummaryIndex, VectorStoreIndex):
            index: Any = make.from_documents(
                documents, embed_model=_embedding(), transformations=[splitter]
            )
            for mode in MODES:
                engine = index.as_query_engine(llm=llm, response_mode=mode)
                assert str(engine.query("Who?")) != "Empty Response", mode
                assert str(asyncio.run(engine.aquery("Who?"))) != "Empty Response", mode
        found = IngestionPipeline(
            transformations=[
                KeywordExtractor(llm=llm, show_progress=False),
                SummaryExtractor(llm=llm, show_progress=False),
            ],
            disable_cache=True,
        ).run(nodes=_nodes(FACTS))
        assert all({"excerpt_keywords", "section_summary"} <= set(one.metadata) for one in found)
        PropertyGraphIndex.from_documents(
            documents,
            llm=llm,
            kg_extractors=[SimpleLLMPathExtractor(llm=llm)],
            embed_kg_nodes=False,
            transformations=[splitter],
        )
        scored = [NodeWithScore(node=node) for node in _nodes(FACTS)]
        LLMRerank(llm=llm).postprocess_nodes(scored, QueryBundle("Who?"))
        with pytest.warns(DeprecationWarning, match="asyncio_module"):
            runner = BatchEvalRunner({"faithful": FaithfulnessEvaluator(llm=llm)}, workers=2)
        results = asyncio.run(
            runner.aevaluate_response_strs(
                queries=["Who?"], response_strs=["Ada."], contexts_list=[FACTS]
            )
        )
        assert len(results["faithful"]) == 1


def _refuse(*_args: object, **_kwargs: object) -> None:
    pytest.fail("a socket was opened")
