"""How cost grows: throughput against running sequences, step time against context.

Throughput: n requests of 64 tokens in and 256 out start together; output tokens over wall seconds,
second run. Step time: each of B sequences has a context of its own, put into the prefix cache
beforehand, so that all of them start in one step and then decode 64 tokens side by side; the step
time is (last token - first token) / 64 of the slowest.
"""

from __future__ import annotations

import random

from plan import Job, Plan, Requests, first_token, fixed_length
from rows import RowFile
from sections.table import row_name, run_workload
from workloads import SHAPES, tokens_out

from engine import Engine

SECTION = "growth"
RUNNING = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
BATCHES = (1, 32)
NUM_STEPS = 64


def jobs(plan: Plan) -> list[Job]:
    """One job per small shape: both sweeps on one engine."""
    shapes = [shape for shape in plan.shapes if shape != "llama-8b"] or list(plan.shapes)
    return [
        Job(
            SECTION,
            row_name(shape, placement, "all"),
            {"shape": shape, "placement": placement},
            (
                *(row_name(shape, placement, f"running-{n}") for n in _running(plan)),
                *(
                    row_name(shape, placement, f"context-{context}x{batch}")
                    for batch, context in _contexts(plan)
                ),
            ),
        )
        for placement in plan.placements
        for shape in shapes
    ]


def _running(plan: Plan) -> tuple[int, ...]:
    return RUNNING[:4] if plan.is_quick else RUNNING


def _contexts(plan: Plan) -> list[tuple[int, int]]:
    contexts = (256, 512) if plan.is_quick else CONTEXTS
    batches = (1, 4) if plan.is_quick else BATCHES
    return [(batch, context) for batch in batches for context in contexts]


def measure(plan: Plan, rows: RowFile, *, shape: str, placement: str) -> None:
    """Both sweeps."""
    vocab = SHAPES[shape]["vocab_size"]
    with plan.make_engine(shape, placement) as engine:
        first_token(engine)
        for count in _running(plan):
            name = row_name(shape, placement, f"running-{count}")
            if rows.has(SECTION, name):
                continue
            requests = random_requests(count, 64, 16 if plan.is_quick else 256, vocab)
            run_workload(engine, requests)
            engine.reset_prefix_cache()
            seconds = run_workload(engine, requests)
            rows.add(
                SECTION,
                name,
                tokens_out(requests) / seconds,
                "tok/s",
                shape=shape,
                placement=placement,
                running=count,
                seconds=seconds,
            )
        for batch, context in _contexts(plan):
            name = row_name(shape, placement, f"context-{context}x{batch}")
            if rows.has(SECTION, name):
                continue
            if not fits(engine, batch, context):
                print(f"{SECTION} {name}: does not fit the KV cache", flush=True)
                continue
            step_ms = decode_step_ms(engine, batch, context, vocab)
            rows.add(
                SECTION,
                name,
                step_ms,
                "ms",
                shape=shape,
                placement=placement,
                batch=batch,
                context=context,
            )


def random_requests(count: int, length: int, new_tokens: int, vocab: int) -> Requests:
    """`count` requests; a longer `length` continues the same prompts."""
    requests = []
    for index in range(count):
        rng = random.Random(index)
        requests.append(([rng.randrange(10, min(vocab, 45000)) for _ in range(length)], new_tokens))
    return requests


def fits(engine: Engine, batch: int, context: int) -> bool:
    """Whether `batch` contexts stay in the KV cache side by side."""
    block_size = engine.resolved_config.block_size
    blocks = batch * -(-(context + NUM_STEPS + 1) // block_size)
    return blocks <= engine.stats().kv_blocks_total


def decode_step_ms(engine: Engine, batch: int, context: int, vocab: int) -> float:
    """Milliseconds per step in which `batch` sequences of `context` tokens decode."""
    prompts = [prompt for prompt, _ in random_requests(batch, context, 0, vocab)]
    # Fills the prefix cache, longer contexts on top of what shorter ones left there.
    engine.generate(prompts, fixed_length(1))
    engine.generate(prompts, fixed_length(NUM_STEPS + 1))
    outputs = engine.generate(prompts, fixed_length(NUM_STEPS + 1))
    spans = []
    for output in outputs:
        first_s, last_s = output.metrics.first_token_s, output.metrics.finished_s
        assert first_s is not None, "a finished request has a first token"
        assert last_s is not None, "a finished request has an end"
        spans.append(last_s - first_s)
    return 1e3 * max(spans) / NUM_STEPS
