"""Ingestion for the section `llama_index`: our class, LlamaIndex's for Hugging Face, the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from plan import Plan, fixed_length
from python_documents import python_documents
from rows import RowFile
from text_model import text_model

from llm_connectors.llama_index import ExtractorGroup, LocalLLM, batched, with_shared_prefix

if TYPE_CHECKING:
    from engine import Engine

SECTION = "llama_index"
MAX_TOKENS = 64
MAX_IN_FLIGHT = 256
SIZES = {"quick": (2, 100), "cpu": (8, 800), "cuda": (100, 800)}
"""Documents, and characters of each that are used."""


def row_names(has_peer: bool) -> tuple[str, ...]:
    """Rows of one run."""
    names = ("ours-stock", "ours-batched", "ours-group", "engine-batched", "engine-group")
    return tuple(f"ingest/{name}" for name in (*names, "HuggingFaceLLM")[: 5 + has_peer])


def has_peer(plan: Plan) -> bool:
    """Whether LlamaIndex's own class runs as well; it needs the demo model's real weights."""
    return plan.device == "cpu" and not plan.is_quick


def keep_prompts(engine: Engine) -> list[list[int]]:
    """A list that takes the token ids of each prompt handed over to `engine` from now on."""
    hand_over, sent = engine._hand_over, []

    def noted(requests: list[Any]) -> Any:
        sent.extend(request.prompt_token_ids for request in requests)
        return hand_over(requests)

    engine._hand_over = noted  # type: ignore[method-assign]
    return sent


def measure(plan: Plan, rows: RowFile) -> None:
    """All ways in one process, with a third of the peer's documents before each of ours."""
    nodes = _documents(plan)
    peer = _peer() if has_peer(plan) else None
    peers: list[Taken] = []
    prompts: dict[str, list[list[int]]] = {}
    with _engine(plan) as engine:
        llm = LocalLLM(engine=engine, max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
        llm.complete("Hi", max_tokens=2)
        sent = keep_prompts(engine)
        # In the order of their peaks, and the bare engine last: its peak is the highest ever.
        for place, how in enumerate(WAYS):
            if peer:
                peers.append(_ingest(_extractors(peer), nodes[place :: len(WAYS)]))
            prompts[how] = _ours(plan, rows, llm, how, nodes, sent)
        for how in ("batched", "group"):
            engine.reset_prefix_cache()
            started_s = time.perf_counter()
            engine.generate(prompts[how], fixed_length(MAX_TOKENS))
            seconds = time.perf_counter() - started_s
            rows.add(SECTION, f"ingest/engine-{how}", seconds, "s", requests=len(prompts[how]))
    if peer:
        wall_s, cpu_s = (sum(parts) for parts in zip(*peers, strict=True))
        rows.add(SECTION, "ingest/HuggingFaceLLM", wall_s, "s", cpu_s=cpu_s, peak_running=1)


def _ours(
    plan: Plan, rows: RowFile, llm: LocalLLM, how: str, nodes: list[Any], sent: list[list[int]]
) -> list[list[int]]:
    """One way's row; the prompts that it sent, taken from `sent`."""
    engine = llm.engine
    engine.reset_prefix_cache()
    sent.clear()
    before = engine.stats()
    taken = _ingest(WAYS[how](llm), nodes)
    after = engine.stats()
    prompts = list(sent)
    assert prompts, "this way has sent nothing"
    if plan.device == "cuda" and how != "stock":  # the first run on a GPU compiles
        engine.reset_prefix_cache()
        taken = min(taken, _ingest(WAYS[how](llm), nodes))
    asked = after.prefix_query_tokens - before.prefix_query_tokens
    rows.add(
        SECTION,
        f"ingest/ours-{how}",
        taken.wall_s,
        "s",
        cpu_s=taken.cpu_s,
        requests=len(prompts),
        documents=len(nodes),
        prompt_tokens=asked,
        peak_running=after.peak_running,
        prefix_hit_share=(after.prefix_hit_tokens - before.prefix_hit_tokens) / asked,
    )
    return prompts


def _documents(plan: Plan) -> list[Any]:
    """One node per document, as a splitter would have made it."""
    from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode

    count, length = SIZES["quick" if plan.is_quick else plan.device]
    return [
        TextNode(
            text=text[:length],
            relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=name)},
        )
        for name, text in python_documents(count).items()
    ]


def _extractors(llm: Any) -> list[Any]:
    from llama_index.core import extractors

    kinds = (
        extractors.TitleExtractor,
        extractors.SummaryExtractor,
        extractors.KeywordExtractor,
        extractors.QuestionsAnsweredExtractor,
    )
    return [kind(llm=llm, show_progress=False) for kind in kinds]


def _group(llm: Any) -> list[Any]:
    parts = with_shared_prefix(batched(_extractors(llm), MAX_IN_FLIGHT))
    return [ExtractorGroup(extractors=parts, show_progress=False)]


WAYS: dict[str, Callable[[Any], list[Any]]] = {
    "stock": _extractors,
    "batched": lambda llm: batched(_extractors(llm), MAX_IN_FLIGHT),
    "group": _group,
}


class Taken(NamedTuple):
    """Wall seconds, and CPU seconds of the process, which other processes disturb less."""

    wall_s: float
    cpu_s: float


def _ingest(parts: list[Any], nodes: list[Any]) -> Taken:
    """What a pipeline over copies of `nodes` takes."""
    from llama_index.core.ingestion import IngestionPipeline

    copies = [node.model_copy(deep=True) for node in nodes]
    started_s, cpu_s = time.perf_counter(), time.process_time()
    found = IngestionPipeline(transformations=parts, disable_cache=True).run(nodes=copies)
    taken = Taken(time.perf_counter() - started_s, time.process_time() - cpu_s)
    assert all("excerpt_keywords" in node.metadata for node in found)
    return taken


def _engine(plan: Plan) -> Engine:
    if not has_peer(plan):
        shape = plan.shape_for("llama-135m")
        return plan.make_engine(shape, folder=str(text_model(shape, plan.text_model)))
    from engine import Engine

    return Engine("smollm2-135m", device=plan.device, max_model_len=2048)


def _peer() -> Any:
    from cpu_peers import DEMO_FILE, demo_folder, load_transformers_model
    from llama_index.llms.huggingface import HuggingFaceLLM
    from transformers import AutoTokenizer

    llm = HuggingFaceLLM(
        model=load_transformers_model(),
        tokenizer=AutoTokenizer.from_pretrained(demo_folder(), gguf_file=DEMO_FILE),
        context_window=2048,
        max_new_tokens=MAX_TOKENS,
        generate_kwargs={"do_sample": False, "min_new_tokens": MAX_TOKENS, "pad_token_id": 0},
    )
    llm.complete("Hi")
    return llm
