"""Text in, text out, usage and all: what LangChain and LlamaIndex cost over the engine.

The `chat` workload's prompt lengths as texts, every answer of its mean length. Each case runs
twice, the better run counts; the yardstick, `Engine.generate` on the same texts, runs before and
after. `caller_cpu_s` is the CPU time of the calling thread: what the caller's side costs by itself.
"""

from __future__ import annotations

import time

from plan import Job, Plan, first_token
from rows import RowFile
from sections.cases import ENGINE_CASE, Cases, Run
from sections.table import row_name
from text_model import text_model, texts_like
from workloads import SHAPES, tokens_out
from workloads import chat as chat_requests

from engine import Engine

SECTION = "frameworks"


def jobs(plan: Plan) -> list[Job]:
    """One job per placement, on the shape that the caller's side slows down most."""
    shape = plan.shape_for("llama-135m")
    return [
        Job(
            SECTION,
            row_name(shape, placement, "all"),
            {"shape": shape, "placement": placement},
            (),
        )
        for placement in plan.placements
    ]


def measure(plan: Plan, rows: RowFile, *, shape: str, placement: str) -> None:
    """All cases against the engine."""
    requests = plan.sized(chat_requests(SHAPES[shape]["vocab_size"]))
    max_tokens = tokens_out(requests) // len(requests)
    folder = str(text_model(shape, plan.text_model))
    with plan.make_engine(shape, placement, folder) as engine:
        first_token(engine)
        cases = Cases(engine, texts_like(requests, engine.tokenizer), max_tokens).all()
        yardsticks = {
            count: case for case, (count, _) in reversed(cases.items()) if ENGINE_CASE in case
        }
        timed = {
            case: best_of_two(engine, run, count * max_tokens)
            for case, (count, run) in cases.items()
        }
        for count, case in yardsticks.items():
            again = best_of_two(engine, cases[case][1], count * max_tokens)
            timed[case] = min(timed[case], again)
        for case, (count, _) in cases.items():
            seconds, caller_cpu_s = timed[case]
            rows.add(
                SECTION,
                row_name(shape, placement, case),
                seconds,
                "s",
                shape=shape,
                placement=placement,
                case=case,
                requests=count,
                against=yardsticks[count],
                seconds_of_engine=timed[yardsticks[count]][0],
                caller_cpu_s=caller_cpu_s,
                output_tokens_per_s=count * max_tokens / seconds,
            )


def best_of_two(engine: Engine, run: Run, num_tokens: int) -> tuple[float, float]:
    """(wall seconds, CPU seconds of this thread) of the faster of two runs."""
    return min(timed_run(engine, run, num_tokens) for _ in range(2))


def timed_run(engine: Engine, run: Run, num_tokens: int) -> tuple[float, float]:
    """(wall seconds, CPU seconds of this thread) of one run."""
    engine.reset_prefix_cache()
    cpu_s, started_s = time.thread_time(), time.perf_counter()
    made = run()
    seconds = time.perf_counter() - started_s
    cpu_s = time.thread_time() - cpu_s
    assert made == num_tokens, f"{made} tokens came instead of {num_tokens}"
    return seconds, cpu_s
