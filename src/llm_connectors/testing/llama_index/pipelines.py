"""Checks inside LlamaIndex's own pipelines: overflow, embeddings, RAG without a network."""

from __future__ import annotations

import asyncio
import functools
import math
import socket
from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core import (
    Document,
    PromptHelper,
    PropertyGraphIndex,
    Settings,
    SummaryIndex,
    VectorStoreIndex,
)
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.evaluation import BatchEvalRunner, FaithfulnessEvaluator
from llama_index.core.extractors import (
    KeywordExtractor,
    QuestionsAnsweredExtractor,
    SummaryExtractor,
    TitleExtractor,
)
from llama_index.core.indices.property_graph import SimpleLLMPathExtractor
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.postprocessor import LLMRerank
from llama_index.core.prompts import PromptTemplate
from llama_index.core.response_synthesizers import ResponseMode, get_response_synthesizer
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from llm_connectors.testing.llama_index.subject import (
    ENDPOINTS,
    Subject,
    is_swallowed,
    responses,
)

SILENT_MODES = (ResponseMode.NO_TEXT, ResponseMode.CONTEXT_ONLY)
"""Response modes that ask no model."""
KEYS = {
    "document_title",
    "excerpt_keywords",
    "questions_this_excerpt_can_answer",
    "section_summary",
}
FACTS = ["Ada wrote the first program.", "Grace wrote the first compiler."]


def _nodes(texts: list[str]) -> list[TextNode]:
    return [TextNode(text=text) for text in texts]


def _embedding() -> MockEmbedding:
    return MockEmbedding(embed_dim=2)


def check_11_overflow(subject: Subject) -> None:
    """A prompt that is too long fails with one typed error on every path, never silently."""
    llm = subject.llm
    admitted = subject.admitted or (lambda: 0)
    before = admitted()
    for endpoint in ENDPOINTS:
        with pytest.raises(Exception, match=r"(?s).+") as caught:
            responses(llm, endpoint, max_tokens=10**9)
        assert not is_swallowed(caught.value), f"{endpoint}: {caught.value!r}"
    wanted = type(caught.value)
    text = "word " * (2 * llm.metadata.context_window)
    # Helpers that believe in more room than there is pack prompts that cannot fit.
    helper = PromptHelper(context_window=10**9, num_output=1, tokenizer=str.split)

    def pipeline() -> None:
        extractor = KeywordExtractor(llm=llm, show_progress=False)
        IngestionPipeline(transformations=[extractor], disable_cache=True).run(nodes=_nodes([text]))

    def synthesize(mode: ResponseMode) -> None:
        get_response_synthesizer(
            llm=llm, response_mode=mode, prompt_helper=helper, use_async=True
        ).synthesize("What?", [NodeWithScore(node=node) for node in _nodes([text, text])])

    def evaluate() -> None:
        FaithfulnessEvaluator(llm=llm).evaluate(query="Who?", response=text, contexts=["Ada."])

    ways: list[Callable[[], Any]] = [
        pipeline,
        evaluate,
        lambda: responses(llm, "chat", [ChatMessage(content=text)]),
        lambda: llm.predict(PromptTemplate("{text}"), text=text),
        *(
            functools.partial(synthesize, mode)
            for mode in ResponseMode
            # Of these, some ask with the question alone, and some cut what is too long.
            if mode not in (*SILENT_MODES, ResponseMode.GENERATION, ResponseMode.SIMPLE_SUMMARIZE)
        ),
    ]

    async def in_a_loop(function: Callable[[], Any]) -> None:
        function()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Settings, "_llm", llm)
        patch.setattr(Settings, "_prompt_helper", helper)
        for way in ways:
            with pytest.raises(wanted):
                way()
            with pytest.raises(wanted):
                asyncio.run(in_a_loop(way))
    assert admitted() == before, "the engine computed something before it refused"


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
    assert asyncio.run(embed.aget_text_embedding_batch([])) == []
    if subject.embedding_prompts is not None:
        for_query, for_text = subject.embedding_prompts
        plain = subject.probe("plain_embedding")
        assert _is_close(query, plain(f"{for_query}a cat")), "the query's prompt is missing"
        assert _is_close(whole[0], plain(f"{for_text}a cat")), "the text's prompt is missing"
    if subject.embedding_steps is not None:
        steps = subject.embedding_steps

        async def gathered() -> list[list[float]]:
            return list(await asyncio.gather(*map(embed.aget_text_embedding, texts * 8)))

        before = steps()
        found = asyncio.run(gathered())
        assert all(_is_close(one, other) for one, other in zip(found, whole * 8, strict=True))
        assert steps() - before <= len(found) // 2, "single texts do not share batches"


def _is_close(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) and math.dist(one, other) < 1e-4


def check_27_rag_offline(subject: Subject) -> None:
    """Index, response modes, extractors, graph, reranker, evaluation: no socket is opened."""
    llm = subject.llm
    splitter = SentenceSplitter(chunk_size=64, chunk_overlap=0, tokenizer=str.split)
    documents = [Document(text=text) for text in FACTS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Settings, "_llm", llm)
        patch.setattr(socket.socket, "connect", _refuse)
        patch.setattr(socket, "getaddrinfo", _refuse)
        for make in (SummaryIndex, VectorStoreIndex):
            index: Any = make.from_documents(
                documents, embed_model=_embedding(), transformations=[splitter]
            )
            for mode in ResponseMode:
                engine = index.as_query_engine(llm=llm, response_mode=mode)
                found = [engine.query("Who?"), asyncio.run(engine.aquery("Who?"))]
                for one in found:
                    assert str(one) != "Empty Response", mode
                    assert len(one.source_nodes) == len(FACTS), mode
        nodes = IngestionPipeline(
            transformations=[
                TitleExtractor(llm=llm, show_progress=False),
                KeywordExtractor(llm=llm, show_progress=False),
                SummaryExtractor(llm=llm, show_progress=False),
                QuestionsAnsweredExtractor(llm=llm, show_progress=False),
            ],
            disable_cache=True,
        ).run(nodes=_nodes(FACTS))
        for one in nodes:
            # An empty summary is left out by LlamaIndex.
            missing = KEYS - set(one.metadata)
            assert missing <= {"section_summary"}, missing
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
