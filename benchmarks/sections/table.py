"""The five workloads on the model shapes, and the start: the figures other engines are known by.

One process per shape, so that memory is clean. Each workload runs twice in it: first with whatever
is compiled or captured on the way, then warm. The prefix cache is emptied before each run. Wall
seconds from handing all requests over to the last output.
"""

from __future__ import annotations

import time

from environment import gpu_used_gib
from plan import Job, Plan, Requests, first_token, fixed_length, host_ms_per_step
from rows import RowFile
from workloads import SHAPES, WORKLOADS, tokens_in, tokens_out

from engine import Engine

SECTION = "table"
RUNS = ("first", "second")

# Cheap ones first: what a time budget cuts off is then the least. `llama-8b` needs 20 s for the
# last two, twice.
ORDER = ("single", "rag", "longprompt", "chat", "mixed")


def jobs(plan: Plan) -> list[Job]:
    """One job per shape and placement."""
    return [
        Job(
            SECTION,
            row_name(shape, placement, "all"),
            {"shape": shape, "placement": placement},
            tuple(
                row_name(shape, placement, "start")
                if workload == "start"
                else row_name(shape, placement, f"{workload}/{run}")
                for workload in ("start", *plan.workloads)
                for run in RUNS
            ),
        )
        for placement in plan.placements
        for shape in plan.shapes
    ]


def row_name(shape: str, placement: str, what: str) -> str:
    """Rows of another than the default placement say so."""
    return f"{shape}/{what}" if placement == "default" else f"{shape}@{placement}/{what}"


def measure(plan: Plan, rows: RowFile, *, shape: str, placement: str) -> None:
    """Start, then all workloads of the plan."""
    details = {"shape": shape, "placement": placement}
    started_s = time.perf_counter()
    with plan.make_engine(shape, placement) as engine:
        first_token(engine)
        start_s = time.perf_counter() - started_s
        rows.add(
            SECTION,
            row_name(shape, placement, "start"),
            start_s,
            "s",
            workload="start",
            run="first",
            engine_start_s=engine.stats().start_s,
            kv_blocks=engine.stats().kv_blocks_total,
            block_size=engine.resolved_config.block_size,
            gpu_used_gib=gpu_used_gib(),
            **details,
        )
        for workload in sorted(plan.workloads, key=ORDER.index):
            requests = plan.sized(WORKLOADS[workload](SHAPES[shape]["vocab_size"]))
            for run in RUNS:
                name = row_name(shape, placement, f"{workload}/{run}")
                if rows.has(SECTION, name) and run == "second":
                    continue
                engine.reset_prefix_cache()
                before = engine.stats()
                seconds = run_workload(engine, requests)
                after = engine.stats()
                steps, host_ms = host_ms_per_step(before, after)
                rows.add(
                    SECTION,
                    name,
                    seconds,
                    "s",
                    workload=workload,
                    run=run,
                    prompt_tokens=tokens_in(requests),
                    output_tokens=tokens_out(requests),
                    output_tokens_per_s=tokens_out(requests) / seconds,
                    steps=steps,
                    host_ms_per_step=host_ms,
                    preemptions=after.preemptions - before.preemptions,
                    kv_blocks=after.kv_blocks_total,
                    gpu_used_gib=gpu_used_gib(),
                    **details,
                )


def run_workload(engine: Engine, requests: Requests) -> float:
    """Seconds for all requests together."""
    prompts = [prompt for prompt, _ in requests]
    params = [fixed_length(count) for _, count in requests]
    started_s = time.perf_counter()
    outputs = engine.generate(prompts, params)
    seconds = time.perf_counter() - started_s
    made = sum(output.usage.completion_tokens for output in outputs)
    assert made == tokens_out(requests), f"{made} tokens came instead of {tokens_out(requests)}"
    return seconds
