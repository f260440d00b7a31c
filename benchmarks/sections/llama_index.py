"""LlamaIndex pipelines: `LocalLLM` beside LlamaIndex's own class for Hugging Face models.

Documents are docstrings of Python's standard library (`python_documents`). On a CPU both classes
run the demo model: ours from its GGUF file, theirs with the same weights in bfloat16.

* ingest/*: an `IngestionPipeline` with title, summary, keyword and question extractors over 8
  documents cut at 800 characters, 24 tokens an answer, caches cold. "stock" has LlamaIndex's
  extractors with their defaults, "batched" goes through `batched`, "group" is one `ExtractorGroup`
  with shared prefixes. Rows have requests, peak batch and the share of prompt tokens found in the
  prefix cache.
* achat/256, aquery/64: gathered calls with the engine's peak in flight.
* overhead/*: CPU microseconds of the calling thread per call, on a model so small that only the
  Python around it counts; "engine" is the same without a
  framework, "undecorated" our class without LlamaIndex's events around it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from plan import Job, Plan, first_token, fixed_length
from python_documents import python_documents
from rows import RowFile
from text_model import text_model

if TYPE_CHECKING:
    from engine import Engine

SECTION = "llama_index"
SHAPE = "tiny"
MAX_TOKENS = 24
OVERHEADS = ("engine", "undecorated", "chat", "achat")
OURS = ("stock", "batched", "group")


def jobs(plan: Plan) -> list[Job]:
    """Their class, ours, and the gathered calls; each in a process of its own."""
    found = [
        Job(
            SECTION,
            "ingest/ours",
            {"part": "ours"},
            tuple(f"ingest/ours-{how}" for how in OURS),
        ),
        Job(
            SECTION,
            "calls",
            {"part": "calls"},
            (
                "achat/256",
                "aquery/64",
                "overhead/engine",
                "overhead/decorator",
                "overhead/chat",
                "overhead/achat",
            ),
        ),
    ]
    if plan.device == "cpu" and not plan.is_quick:
        found.append(Job(SECTION, "ingest/theirs", {"part": "theirs"}, ("ingest/HuggingFaceLLM",)))
    return found


def measure(plan: Plan, rows: RowFile, *, part: str) -> None:
    """One job's rows."""
    {"ours": _ours, "theirs": _theirs, "calls": _calls}[part](plan, rows)


# ---------------------------------------------------------------- ingestion


def _documents(plan: Plan) -> list[Any]:
    from llama_index.core.schema import TextNode

    count, length = (2, 100) if plan.is_quick else (8, 800)
    return [TextNode(text=text[:length]) for text in python_documents(count).values()]


def _extractors(llm: Any) -> list[Any]:
    from llama_index.core import extractors

    kinds = (
        extractors.TitleExtractor,
        extractors.SummaryExtractor,
        extractors.KeywordExtractor,
        extractors.QuestionsAnsweredExtractor,
    )
    return [kind(llm=llm, show_progress=False) for kind in kinds]


def _ingest(plan: Plan, parts: list[Any]) -> float:
    from llama_index.core.ingestion import IngestionPipeline

    nodes = _documents(plan)
    started_s = time.perf_counter()
    found = IngestionPipeline(transformations=parts, disable_cache=True).run(nodes=nodes)
    seconds = time.perf_counter() - started_s
    assert all("excerpt_keywords" in node.metadata for node in found)
    return seconds


def _engine(plan: Plan) -> Engine:
    if plan.is_quick:
        return plan.make_engine(SHAPE, folder=str(text_model(SHAPE, plan.text_model)))
    from engine import Engine

    return Engine("smollm2-135m", device=plan.device, max_model_len=2048)


def _ours(plan: Plan, rows: RowFile) -> None:
    from llm_connectors.llama_index import (
        ExtractorGroup,
        LocalLLM,
        batched,
        with_shared_prefix,
    )

    ways: dict[str, Callable[[Any], list[Any]]] = {
        "stock": _extractors,
        "batched": lambda llm: batched(_extractors(llm)),
        "group": lambda llm: [
            ExtractorGroup(
                extractors=with_shared_prefix(batched(_extractors(llm))), show_progress=False
            )
        ],
    }
    for how, make in ways.items():
        with _engine(plan) as engine:
            llm = LocalLLM(engine=engine, max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
            llm.complete("Hi", max_tokens=2)
            engine.reset_prefix_cache()
            before = engine.stats()
            seconds = _ingest(plan, make(llm))
            after = engine.stats()
        asked = after.prefix_query_tokens - before.prefix_query_tokens
        rows.add(
            SECTION,
            f"ingest/ours-{how}",
            seconds,
            "s",
            requests=after.requests_finished - before.requests_finished,
            peak_running=after.peak_running,
            prompt_tokens=asked,
            prefix_hit_share=(after.prefix_hit_tokens - before.prefix_hit_tokens) / asked,
        )


def _theirs(plan: Plan, rows: RowFile) -> None:
    from cpu_peers import DEMO_FILE, demo_folder, load_transformers_model
    from llama_index.llms.huggingface import HuggingFaceLLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_folder(), gguf_file=DEMO_FILE)
    llm = HuggingFaceLLM(
        model=load_transformers_model(),
        tokenizer=tokenizer,
        context_window=2048,
        max_new_tokens=MAX_TOKENS,
        generate_kwargs={"do_sample": False, "min_new_tokens": MAX_TOKENS, "pad_token_id": 0},
    )
    llm.complete("Hi")
    seconds = _ingest(plan, _extractors(llm))
    rows.add(SECTION, "ingest/HuggingFaceLLM", seconds, "s", peak_running=1)


# ---------------------------------------------------------------- calls


def _calls(plan: Plan, rows: RowFile) -> None:
    from llama_index.core.base.llms.types import ChatMessage

    from llm_connectors.llama_index import LocalLLM, query_many

    many, queries, repeats = (16, 4, 20) if plan.is_quick else (256, 64, 500)
    options: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
    with plan.make_engine(SHAPE, folder=str(text_model(SHAPE, plan.text_model))) as engine:
        first_token(engine)
        llm = LocalLLM(engine=engine, max_tokens=32, **options)
        chats = [[ChatMessage(content=f"What is number {i}?")] for i in range(many)]

        async def gather(count: int) -> None:
            await asyncio.gather(*(llm.achat(chat) for chat in chats[:count]))

        asyncio.run(gather(2))
        seconds = min(_timed(lambda: asyncio.run(gather(many))) for _ in range(3))
        rows.add(
            SECTION, "achat/256", seconds, "s", calls=many, peak_running=engine.stats().peak_running
        )
    with plan.make_engine(SHAPE, folder=str(text_model(SHAPE, plan.text_model))) as engine:
        llm = LocalLLM(engine=engine, max_tokens=256, **options)
        query_engine = _query_engine(llm)
        texts = [f"What is module {i}?" for i in range(queries)]
        seconds = _timed(lambda: query_many(query_engine, texts))
        rows.add(
            SECTION,
            "aquery/64",
            seconds,
            "s",
            calls=queries,
            peak_running=engine.stats().peak_running,
        )
        llm = LocalLLM(engine=engine, max_tokens=1, **options)
        _overhead(rows, llm, chats[0], repeats)


def _query_engine(llm: Any) -> Any:
    from llama_index.core import SummaryIndex
    from llama_index.core.embeddings import MockEmbedding
    from llama_index.core.schema import TextNode

    from llm_connectors.llama_index import configure_settings

    configure_settings(llm, MockEmbedding(embed_dim=2))
    return SummaryIndex(nodes=[TextNode(text="A module.")]).as_query_engine(llm=llm)


def _overhead(rows: RowFile, llm: Any, chat: list[Any], repeats: int) -> None:
    """CPU time of the caller's thread per call; waiting for the engine is none."""

    async def achats() -> None:
        for _ in range(repeats):
            await llm.achat(chat)

    def chats() -> None:
        for _ in range(repeats):
            llm.chat(chat)

    dicts = [{"role": "user", "content": chat[0].content}]

    def bare() -> None:
        for _ in range(repeats):
            llm.engine.submit(llm.engine.apply_chat_template(dicts), fixed_length(1)).result()

    def undecorated() -> None:
        for _ in range(repeats):
            llm._submit_chat(llm.engine, chat, {}).wait().as_chat()

    ways: dict[str, Callable[[], None]] = {
        "engine": bare,
        "undecorated": undecorated,
        "chat": chats,
        "achat": lambda: asyncio.run(achats()),
    }
    for name, run in ways.items():
        run()
        cpu_s = min(_cpu_s(run) for _ in range(3))
        rows.add(SECTION, f"overhead/{name}", 1e6 * cpu_s / repeats, "µs/call", calls=repeats)


def _cpu_s(run: Callable[[], None]) -> float:
    started_s = time.thread_time()
    run()
    return time.thread_time() - started_s


def _timed(run: Callable[[], Any]) -> float:
    started_s = time.perf_counter()
    run()
    return time.perf_counter() - started_s
