"""Components made to fill a batch: `batched`, the twins, shared prefixes. Fake and tiny engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from llama_index.core import extractors as core_extractors
from llama_index.core import postprocessor as core_postprocessor
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.evaluation import BatchEvalRunner, RelevancyEvaluator
from llama_index.core.extractors import (
    BaseExtractor,
    KeywordExtractor,
    QuestionsAnsweredExtractor,
    SummaryExtractor,
)
from llama_index.core.indices.property_graph import (
    DynamicLLMPathExtractor,
    SchemaLLMPathExtractor,
    SimpleLLMPathExtractor,
)
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index_fake_engine import FakeEngine
from python_documents import python_documents
from tiny_checkpoints import write_tiny_llama

from engine import Engine
from llm_connectors.llama_index import (
    ExtractorGroup,
    LLMRerank,
    LocalLLM,
    RequestError,
    TitleExtractor,
    batched,
    with_shared_prefix,
)

QUIET: dict[str, Any] = {"show_progress": False}


def nodes_of(num_documents: int, num_nodes: int) -> list[TextNode]:
    """Nodes that know their documents."""
    return [
        TextNode(text=f"Node {part} of document {number}.", relationships=_source(number))
        for number in range(num_documents)
        for part in range(num_nodes)
    ]


def _source(number: int) -> Any:
    from llama_index.core.schema import NodeRelationship, RelatedNodeInfo

    return {NodeRelationship.SOURCE: RelatedNodeInfo(node_id=f"doc-{number}")}


# ---- twins


def test_title_extractor_asks_for_everything_at_once(llm: LocalLLM, fake: FakeEngine) -> None:
    fake.step_s = 0.01
    nodes = nodes_of(8, 6)
    theirs = core_extractors.TitleExtractor(llm=llm, nodes=4, num_workers=32, **QUIET)
    expected = asyncio.run(theirs.aextract(nodes))
    assert fake.peak_running <= 4
    num_requests = len(fake.requests)
    assert asyncio.run(TitleExtractor(llm, nodes=4, **QUIET).aextract(nodes)) == expected
    assert len(fake.requests) == 2 * num_requests == 2 * 8 * 5
    assert fake.peak_running >= 32


def test_title_extractor_holds_to_its_limit(llm: LocalLLM, fake: FakeEngine) -> None:
    fake.step_s = 0.005
    extractor = TitleExtractor(llm, num_workers=3, **QUIET)
    asyncio.run(extractor.aextract(nodes_of(6, 3)))
    assert fake.peak_running == 3
    assert extractor.class_name() == core_extractors.TitleExtractor.class_name()
    assert type(extractor).from_dict(extractor.to_dict()).num_workers == 3


@pytest.mark.parametrize("is_async", [False, True])
def test_rerank_judges_its_batches_at_once(is_async: bool) -> None:
    def answer(prompt: str, _params: Any) -> str:
        # Number 0 and number 99 are no documents; number 2 comes twice.
        return "Doc: 2, Relevance: 7\nDoc: 0, Relevance: 9\nDoc: 99, Relevance: 9\nDoc: 2, Rel: 1"

    fake = FakeEngine(answer=answer, step_s=0.01)
    llm = LocalLLM(engine=fake)
    nodes = [NodeWithScore(node=TextNode(text=f"Text {number}")) for number in range(32)]
    rerank = LLMRerank(llm=llm, choice_batch_size=4, top_n=50)
    query = QueryBundle("Which?")
    if is_async:
        ranked = asyncio.run(rerank.apostprocess_nodes(nodes, query))
    else:
        ranked = rerank.postprocess_nodes(nodes, query)
    assert fake.peak_running == 8
    assert [node.node.text for node in ranked] == [f"Text {4 * place + 1}" for place in range(8)]
    assert {node.score for node in ranked} == {7.0}
    assert rerank.postprocess_nodes([], query) == []
    with pytest.raises(RequestError, match="query"):
        rerank.postprocess_nodes(nodes)
    fake.close()


# ---- batched


@pytest.mark.parametrize(
    "make",
    [
        lambda llm: KeywordExtractor(llm=llm, **QUIET),
        lambda llm: SummaryExtractor(llm=llm, **QUIET),
        lambda llm: QuestionsAnsweredExtractor(llm=llm, **QUIET),
        lambda llm: core_extractors.TitleExtractor(llm=llm, **QUIET),
        lambda llm: SimpleLLMPathExtractor(llm=llm),
        lambda llm: DynamicLLMPathExtractor(llm=llm),
    ],
)
def test_batched_fills_the_batch(
    llm: LocalLLM, fake: FakeEngine, make: Callable[[Any], Any]
) -> None:
    fake.step_s = 0.01
    original = make(llm)
    component = batched(original, 24)
    assert original.num_workers == 4
    assert component.num_workers == 24
    asyncio.run(component.acall(nodes_of(24, 1)))
    assert fake.peak_running == 24
    assert isinstance(component, type(original))


def test_batched_takes_pipelines_lists_and_runners(llm: LocalLLM) -> None:
    splitter, embedding = SentenceSplitter(), MockEmbedding(embed_dim=2)
    title = core_extractors.TitleExtractor(llm=llm)
    pipeline = IngestionPipeline(transformations=[splitter, title, embedding])
    parts = batched(pipeline, 7).transformations
    assert [type(part) for part in parts] == [SentenceSplitter, TitleExtractor, MockEmbedding]
    assert parts[1].num_workers == 7
    assert pipeline.transformations[1] is title
    group = batched(ExtractorGroup(extractors=[title, KeywordExtractor(llm=llm)]), 5)
    assert [one.num_workers for one in group.extractors] == [5, 5]
    rerank = batched([core_postprocessor.LLMRerank(llm=llm, top_n=3)], 9)[0]
    assert isinstance(rerank, LLMRerank)
    assert (rerank.num_workers, rerank.top_n) == (9, 3)
    schema = batched(SchemaLLMPathExtractor(llm=llm, kg_schema_cls=None), 6)
    assert schema.num_workers == 6


@pytest.mark.filterwarnings("ignore:asyncio_module:DeprecationWarning")  # LlamaIndex's own
def test_batched_eval_runner(llm: LocalLLM, fake: FakeEngine) -> None:
    fake.step_s = 0.01
    original = BatchEvalRunner({"relevancy": RelevancyEvaluator(llm=llm)})
    runner = batched(original, 12)
    results = asyncio.run(
        runner.aevaluate_response_strs(
            queries=["Who?"] * 12,
            response_strs=["Ada."] * 12,
            contexts_list=[["Ada wrote."]] * 12,
        )
    )
    assert len(results["relevancy"]) == 12
    assert fake.peak_running == 12
    assert original.workers == 2


@pytest.mark.parametrize("n", [0, -1, 2.5, True, "8"])
def test_batched_refuses_numbers_that_are_none(llm: LocalLLM, n: Any) -> None:
    with pytest.raises(RequestError, match="n="):
        batched(KeywordExtractor(llm=llm), n)


def test_what_cannot_be_batched_is_named(llm: LocalLLM) -> None:
    with pytest.raises(RequestError, match="SentenceSplitter"):
        batched(SentenceSplitter())
    with pytest.raises(RequestError, match="aquery_many"):
        batched(llm)
    with pytest.raises(RequestError, match="SentenceSplitter"):
        with_shared_prefix(SentenceSplitter())


@pytest.mark.filterwarnings("ignore:coroutine.*was never awaited")  # of the original
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_path_extractors_work_inside_a_loop(llm: LocalLLM) -> None:
    async def cell() -> Any:
        with pytest.raises(RuntimeError, match="running event loop"):
            SimpleLLMPathExtractor(llm=llm)(nodes_of(1, 1))
        return batched(SimpleLLMPathExtractor(llm=llm))(nodes_of(3, 1))

    assert len(asyncio.run(cell())) == 3


# ---- groups and shared prefixes


def four_extractors(llm: LocalLLM) -> list[BaseExtractor]:
    return batched(
        [
            core_extractors.TitleExtractor(llm=llm, **QUIET),
            SummaryExtractor(llm=llm, **QUIET),
            KeywordExtractor(llm=llm, **QUIET),
            QuestionsAnsweredExtractor(llm=llm, **QUIET),
        ]
    )


def test_a_group_runs_its_extractors_together(llm: LocalLLM, fake: FakeEngine) -> None:
    fake.step_s = 0.02
    nodes = nodes_of(6, 1)
    group = ExtractorGroup(extractors=four_extractors(llm), **QUIET)
    found = IngestionPipeline(transformations=[group]).run(nodes=nodes)
    assert fake.peak_running == 24
    assert all(
        set(node.metadata)
        == {
            "document_title",
            "section_summary",
            "excerpt_keywords",
            "questions_this_excerpt_can_answer",
        }
        for node in found
    )
    assert asyncio.run(group.aextract([])) == []


def test_a_failing_member_cancels_the_group(llm: LocalLLM, fake: FakeEngine) -> None:
    class Broken(KeywordExtractor):
        async def aextract(self, nodes: Any) -> Any:
            await asyncio.sleep(0.02)
            raise RequestError("broken")

    fake.answer = lambda _prompt, _params: "word " * 60
    fake.step_s = 0.01
    group = ExtractorGroup(extractors=[SummaryExtractor(llm=llm, **QUIET), Broken(llm=llm)])

    async def main() -> None:
        with pytest.raises(RequestError, match="broken"):
            await IngestionPipeline(transformations=[group]).arun(nodes=nodes_of(3, 1))
        assert len(fake.requests) == 3
        # The loop goes on, so nobody else cancels them.
        deadline = time.monotonic() + 0.4
        while fake.num_aborted < 3:
            assert time.monotonic() < deadline, "the others were not aborted"
            await asyncio.sleep(0.005)

    asyncio.run(main())


def test_shared_prefix_keeps_what_the_user_set(llm: LocalLLM) -> None:
    from llama_index.core.schema import MetadataMode

    mine = KeywordExtractor(llm=llm, prompt_template="Mine: {context_str} {keywords}")
    mine.metadata_mode = MetadataMode.EMBED
    changed = with_shared_prefix(mine)
    assert changed.prompt_template == mine.prompt_template
    assert changed.metadata_mode == MetadataMode.EMBED
    title = TitleExtractor(llm)
    assert with_shared_prefix(title).node_template != title.node_template
    assert isinstance(with_shared_prefix(title), TitleExtractor)


@pytest.fixture(scope="module")
def long_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A tiny Llama with room for a document and its metadata."""
    folder = write_tiny_llama(tmp_path_factory.mktemp("long"), max_position_embeddings=2048)
    with Engine(str(folder), device="cpu", num_threads=1, max_num_seqs=64) as engine:
        yield engine
        assert engine.stats().kv_blocks_used == 0


@pytest.mark.parametrize("together", [False, True])
def test_shared_prefix_is_found_in_the_cache(long_engine: Engine, together: bool) -> None:
    """On real documents: the share of prompt tokens that the engine need not compute."""
    llm = LocalLLM(engine=long_engine, max_tokens=2, temperature=0.0)
    texts = [text[:160] for text in python_documents(8).values()]

    def hit_rate(extractors: list[BaseExtractor]) -> float:
        long_engine.reset_prefix_cache()
        before = long_engine.stats()
        parts = [ExtractorGroup(extractors=extractors, **QUIET)] if together else extractors
        IngestionPipeline(transformations=parts).run(nodes=[TextNode(text=text) for text in texts])
        after = long_engine.stats()
        asked = after.prefix_query_tokens - before.prefix_query_tokens
        return (after.prefix_hit_tokens - before.prefix_hit_tokens) / asked

    stock = hit_rate(four_extractors(llm))
    shared = hit_rate(with_shared_prefix(four_extractors(llm)))
    print(f"prefix hits: {stock:.0%} with LlamaIndex's templates, {shared:.0%} with ours")
    assert stock < 0.25
    assert shared > 0.4
