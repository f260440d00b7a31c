"""Poisson arrivals: how long until the first token, and between tokens, at several rates.

Requests of `chat`'s lengths come at random moments (a fixed seed), whether or not earlier ones are
done, and are streamed in one event loop. The time to the first token counts from the moment a
request was due. The time between tokens is the gap between two pieces of one stream.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

from plan import Job, Plan, Requests, first_token, fixed_length
from rows import RowFile
from sections.table import row_name, run_workload
from workloads import SHAPES
from workloads import chat as chat_requests

from engine import Engine

SECTION = "latency"
PERCENTILES = (50, 95, 99)


def jobs(plan: Plan) -> list[Job]:
    """One job per placement: all rates on one engine."""
    shape = plan.shape_for("llama-8b")
    return [
        Job(
            SECTION,
            row_name(shape, placement, "all"),
            {"shape": shape, "placement": placement},
            tuple(row_name(shape, placement, f"rate-{rate:g}") for rate in plan.rates),
        )
        for placement in plan.placements
    ]


@dataclass
class Times:
    """What was seen of all requests of one rate, in seconds."""

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    num_tokens: int = 0


def percentile(values: list[float], percent: float) -> float:
    """The nearest-rank percentile."""
    ranked = sorted(values)
    place = max(0, -int(-percent * len(ranked) // 100) - 1)
    return ranked[place]


def arrivals(rate: float, duration_s: float, seed: int) -> list[float]:
    """Seconds from the start at which requests are due: exponential gaps of mean 1 / `rate`."""
    rng = random.Random(seed)
    due: list[float] = []
    at_s = rng.expovariate(rate)
    while at_s < duration_s:
        due.append(at_s)
        at_s += rng.expovariate(rate)
    return due or [0.0]


def measure(plan: Plan, rows: RowFile, *, shape: str, placement: str) -> None:
    """All rates, slowest first."""
    vocab = SHAPES[shape]["vocab_size"]
    duration_s = 0.5 if plan.is_quick else plan.latency_s
    with plan.make_engine(shape, placement) as engine:
        first_token(engine)
        # What a server would have met before: the batch sizes on the way up and down.
        run_workload(engine, plan.sized(chat_requests(vocab, n=64, seed=99)))
        for rate in plan.rates:
            name = row_name(shape, placement, f"rate-{rate:g}")
            if rows.has(SECTION, name):
                continue
            due = arrivals(rate, duration_s, seed=int(rate * 1000))
            requests = plan.sized(chat_requests(vocab, n=len(due), seed=7))
            due = due[: len(requests)]
            engine.reset_prefix_cache()
            started_s = time.perf_counter()
            times = asyncio.run(serve(engine, requests, due))
            wall_s = time.perf_counter() - started_s
            figures = {
                f"{label}_p{percent}_ms": 1e3 * percentile(values, percent)
                for label, values in (("ttft", times.first), ("itl", times.gaps))
                if values
                for percent in PERCENTILES
            }
            rows.add(
                SECTION,
                name,
                figures["ttft_p50_ms"],
                "ms",
                shape=shape,
                placement=placement,
                rate=rate,
                requests=len(due),
                arrival_s=duration_s,
                wall_s=wall_s,
                output_tokens_per_s=times.num_tokens / wall_s,
                whole_p50_s=percentile(times.whole, 50),
                whole_p99_s=percentile(times.whole, 99),
                peak_running=engine.stats().peak_running,
                **figures,
            )


async def serve(engine: Engine, requests: Requests, due: list[float]) -> Times:
    """Submit each request when it is due and read its stream to the end."""
    times = Times()
    started_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for request, due_s in zip(requests, due, strict=True):
            group.create_task(_one(engine, request, started_s + due_s, times))
    return times


async def _one(engine: Engine, request: tuple[list[int], int], due_s: float, times: Times) -> None:
    prompt, count = request
    await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
    handle = engine.submit(prompt, fixed_length(count))
    last_s = None
    async for delta in handle:
        now_s = time.perf_counter()
        if not delta.token_ids:
            continue
        if last_s is None:
            times.first.append(now_s - due_s)
        else:
            times.gaps.append(now_s - last_s)
        last_s = now_s
        times.num_tokens += len(delta.token_ids)
    times.whole.append(time.perf_counter() - due_s)
