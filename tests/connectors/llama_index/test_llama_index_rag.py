"""RAG pipelines over LocalLLM, offline: every response mode, overflow, settings. Fake engine."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import llama_index.core
import pytest
from llama_index.core import Document, Settings, SummaryIndex, VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.evaluation import FaithfulnessEvaluator
from llama_index.core.extractors import KeywordExtractor, SummaryExtractor
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import TextNode
from llama_index_fake_engine import FakeEngine
from packaging.version import Version
from pydantic import BaseModel

import engine
from llm_connectors.llama_index import (
    ConfigError,
    ContextOverflowError,
    LocalLLM,
    aquery_many,
    configure_settings,
    offline_sentence_splitter,
    query_many,
)
from llm_connectors.llama_index.settings import split_sentences

STREAMS = Version("0.14.25")
FACTS = [
    "Ada Lovelace wrote the first program. It computed Bernoulli numbers.",
    "The Analytical Engine was designed by Charles Babbage. It was never finished.",
    "Grace Hopper wrote the first compiler. She was a rear admiral!",
]
DOCUMENTS = [Document(text=text, metadata={"number": index}) for index, text in enumerate(FACTS)]
MODES = ("compact", "refine", "tree_summarize", "accumulate", "simple_summarize")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **_: Any) -> None:
        pytest.fail(f"network access: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(autouse=True)
def clean_settings() -> Iterator[None]:
    saved, tokenizer = dict(vars(Settings)), llama_index.core.global_tokenizer
    for name in saved:
        setattr(Settings, name, None)
    llama_index.core.global_tokenizer = None
    yield
    vars(Settings).update(saved)
    llama_index.core.global_tokenizer = tokenizer


def plain_memory() -> ChatMemoryBuffer:
    """The default memory keeps an SQLite connection that nobody closes."""
    return ChatMemoryBuffer.from_defaults(token_limit=3000)


@pytest.fixture
def configured(llm: LocalLLM) -> LocalLLM:
    configure_settings(llm, MockEmbedding(embed_dim=4))
    return llm


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("index_class", [SummaryIndex, VectorStoreIndex])
@pytest.mark.parametrize("is_async", [False, True])
def test_response_modes(
    configured: LocalLLM, fake: FakeEngine, mode: str, index_class: Any, is_async: bool
) -> None:
    options = {"similarity_top_k": 3} if index_class is VectorStoreIndex else {}
    engine_ = index_class.from_documents(DOCUMENTS).as_query_engine(response_mode=mode, **options)
    question = "Who wrote the first compiler?"
    response = asyncio.run(engine_.aquery(question)) if is_async else engine_.query(question)
    assert "Seen" in str(response)
    assert "Empty Response" not in str(response)
    prompts = [fake.detokenize(request.prompt_ids) for request in fake.requests]
    assert any("Grace Hopper" in prompt for prompt in prompts)
    assert all("first compiler?" in prompt for prompt in prompts)


@pytest.mark.parametrize("mode", ["compact", "refine", "tree_summarize", "simple_summarize"])
def test_streaming_responses(configured: LocalLLM, fake: FakeEngine, mode: str) -> None:
    fake.step_s = 0.01
    engine_ = SummaryIndex.from_documents(DOCUMENTS).as_query_engine(
        response_mode=mode, streaming=True
    )
    pieces = list(engine_.query("Who?").response_gen)
    # LlamaIndex itself collects the pieces of these modes before 0.14.25.
    is_collected = mode in ("compact", "refine") and Version(version("llama-index-core")) < STREAMS
    assert len(pieces) == 1 if is_collected else len(pieces) > 1
    assert "".join(pieces).startswith("Seen")


@pytest.mark.parametrize("chat_mode", ["simple", "context", "condense_plus_context"])
def test_chat_engines(configured: LocalLLM, fake: FakeEngine, chat_mode: str) -> None:
    chat_engine = VectorStoreIndex.from_documents(DOCUMENTS).as_chat_engine(
        chat_mode=chat_mode, memory=plain_memory()
    )
    assert "Seen" in str(chat_engine.chat("Who was Ada?"))
    assert "Seen" in str(asyncio.run(chat_engine.achat("And Grace?")))
    assert "".join(chat_engine.stream_chat("And Babbage?").response_gen).startswith("Seen")
    assert "Who was Ada?" in fake.detokenize(fake.requests[-1].prompt_ids)


def test_queries_run_side_by_side(configured: LocalLLM, fake: FakeEngine) -> None:
    fake.step_s = 0.01
    query_engine = SummaryIndex.from_documents(DOCUMENTS).as_query_engine()
    queries = [f"Question {index}?" for index in range(12)]
    responses = query_many(query_engine, queries, concurrency=8)
    assert len(responses) == 12
    assert 2 <= fake.peak_running <= 8
    again = asyncio.run(aquery_many(query_engine, queries))
    assert [str(response) for response in again] == [str(response) for response in responses]

    async def from_a_loop() -> int:
        return len(query_many(query_engine, queries[:2]))

    assert asyncio.run(from_a_loop()) == 2


def test_extractors_in_a_pipeline(configured: LocalLLM, fake: FakeEngine) -> None:
    pipeline = IngestionPipeline(
        transformations=[
            offline_sentence_splitter(configured),
            KeywordExtractor(llm=configured, num_workers=16),
            SummaryExtractor(llm=configured, num_workers=16),
        ]
    )
    nodes = pipeline.run(documents=DOCUMENTS)
    assert all("Seen" in node.metadata["excerpt_keywords"] for node in nodes)
    assert len(fake.requests) == 6


# ---- overflow: a typed error on every path, never an empty answer


def overflowing() -> tuple[FakeEngine, LocalLLM]:
    fake = FakeEngine(max_model_len=2000)
    return fake, LocalLLM(engine=fake, max_tokens=1990)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_async", [False, True])
def test_overflow_in_response_modes(mode: str, is_async: bool) -> None:
    fake, llm = overflowing()
    # Wrong numbers on purpose: helpers that believe them pack prompts that cannot fit.
    configure_settings(LocalLLM(engine=fake, max_tokens=16), MockEmbedding(embed_dim=4))
    query_engine = SummaryIndex.from_documents(DOCUMENTS).as_query_engine(
        response_mode=mode, llm=llm, use_async=True
    )

    def run() -> None:
        if is_async:
            asyncio.run(query_engine.aquery("Who?"))
        else:
            query_engine.query("Who?")

    with pytest.raises(ContextOverflowError, match="2000"):
        run()
    assert fake.requests == []
    fake.close()


def test_overflow_in_evaluators_and_pipelines() -> None:
    fake, llm = overflowing()
    configure_settings(LocalLLM(engine=fake, max_tokens=16), MockEmbedding(embed_dim=4))
    evaluator = FaithfulnessEvaluator(llm=llm)
    pipeline = IngestionPipeline(transformations=[KeywordExtractor(llm=llm)])
    nodes = [TextNode(text=fact) for fact in FACTS]

    def evaluate() -> None:
        evaluator.evaluate(query="Who?", response="Ada.", contexts=FACTS)

    async def inside_a_loop(function: Any) -> None:
        function()

    for function in (evaluate, lambda: pipeline.run(nodes=nodes)):
        with pytest.raises(ContextOverflowError):
            function()
        with pytest.raises(ContextOverflowError):
            asyncio.run(inside_a_loop(function))
    with pytest.raises(ContextOverflowError):
        asyncio.run(pipeline.arun(nodes=nodes))
    assert fake.requests == []
    fake.close()


# ---- settings


def test_configured_prompts_fit_the_model() -> None:
    """Packing with the stock tokenizer and window would overflow here; ours must not."""
    fake = FakeEngine(max_model_len=1000)
    configure_settings(
        LocalLLM(engine=fake, max_tokens=50, system_prompt="Be brief."), MockEmbedding(embed_dim=4)
    )
    long = [Document(text="Antidisestablishmentarianism is long. " * 200)]
    for mode in ("compact", "tree_summarize", "refine"):
        SummaryIndex.from_documents(long).as_query_engine(response_mode=mode).query("What?")
    longest = max(len(request.prompt_ids) for request in fake.requests)
    assert 700 < longest <= 950
    fake.close()


def test_num_output_becomes_max_tokens(llm: LocalLLM, fake: FakeEngine) -> None:
    configure_settings(llm, MockEmbedding(embed_dim=4), num_output=7)
    assert Settings.llm.max_tokens == 7
    assert Settings.num_output == Settings.chat_num_output == 7
    assert llm.max_tokens == 64
    assert Settings.context_window < fake.max_model_len
    assert Settings.tokenizer("a b") == fake.tokenize("a b", add_special_tokens=False)


def test_no_embedding_model_means_a_warning_not_openai(llm: LocalLLM) -> None:
    with pytest.warns(UserWarning, match="MockEmbedding"):
        configure_settings(llm)
    assert isinstance(Settings.embed_model, MockEmbedding)


def test_an_embedding_model_set_before_is_kept(llm: LocalLLM) -> None:
    class Mine(MockEmbedding):
        pass

    mine = Mine(embed_dim=3)
    Settings.embed_model = mine
    with pytest.warns(UserWarning, match="MockEmbedding"):
        configure_settings(llm)
    assert Settings.embed_model is mine


def test_no_room_for_a_prompt(llm: LocalLLM) -> None:
    with pytest.raises(ConfigError, match="4096"):
        configure_settings(llm, num_output=4090)


def test_settings_refuse_what_is_no_model(llm: LocalLLM) -> None:
    wrong: Any = "smollm2-135m"
    with pytest.raises(ConfigError, match="str, not a LocalLLM"):
        configure_settings(wrong)
    with pytest.raises(ConfigError, match="embed is a FakeEngine"):
        configure_settings(llm, llm.engine)
    assert Settings._llm is None


def test_splitter_needs_no_nltk(llm: LocalLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_index.core.utils import globals_helper

    monkeypatch.setattr(type(globals_helper), "punkt_tokenizer", property(lambda _: 1 / 0))
    monkeypatch.setattr("llama_index.core.node_parser.text.sentence.get_tokenizer", None)
    splitter = offline_sentence_splitter(llm, chunk_size=20, chunk_overlap=0)
    chunks = splitter.split_text(" ".join(FACTS))
    assert len(chunks) > 1
    assert all(len(llm.token_fn(chunk)) <= 20 for chunk in chunks)
    assert all(chunk.rstrip()[-1] in ".!" for chunk in chunks)
    assert offline_sentence_splitter(llm).chunk_size == 1024
    assert isinstance(splitter, SentenceSplitter)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One. ", "Two! ", "Three? ", "Four"]),
        ("Version 1.5 is e.g. fine. It is", ["Version 1.5 is e.g. fine. ", "It is"]),
        ('He said "Stop." Then left.', ['He said "Stop." ', "Then left."]),
        ("你好。再见！", ["你好。", "再见！"]),
        ("Title\n\nText", ["Title\n\n", "Text"]),
        ("", []),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences
    assert "".join(sentences) == text


# ---- answers as objects, errors


def test_structured_predict_parses_text() -> None:
    class City(BaseModel):
        name: str

    fake = FakeEngine(answer=lambda _prompt, _params: 'Here: {"name": "Paris"}')
    llm = LocalLLM(engine=fake, system_prompt="Be brief.", structured_mode="text")
    template = PromptTemplate("The capital of {country}.")
    assert llm.structured_predict(City, template, country="France").name == "Paris"
    city = asyncio.run(llm.astructured_predict(City, template, country="France"))
    assert city.name == "Paris"
    prompts = {fake.detokenize(request.prompt_ids) for request in fake.requests}
    assert len(prompts) == 1
    assert "Be brief." in prompts.pop()
    fake.close()


def test_engine_errors_are_no_empty_answers(fake: FakeEngine) -> None:
    llm = LocalLLM(engine=fake)
    configure_settings(llm, MockEmbedding(embed_dim=4))
    query_engine = SummaryIndex.from_documents(DOCUMENTS).as_query_engine()
    fake.close()
    with pytest.raises(engine.EngineClosedError):
        query_engine.query("Who?")
    with pytest.raises(engine.EngineClosedError):
        llm.chat([ChatMessage(content="Hi")])
