"""What holding answers to JSON schemas costs: 64 requests at once, with and without their schemas.

Four schemas in turn, answers drawn at temperature 1. The yardstick is the same prompts without a
schema, each with as many tokens as its JSON had. On a GPU draws are not the same in every batch, so
that answers differ a little from run to run: what is compared is the time per token made. "single
tokens" is the constrained run without jumps over forced tokens and without guesses (a stop token
that never comes rules both out): the price of the masks alone. "others" are 64 free requests beside
64 more, free ones or constrained ones; their time is counted until the last of them ends. Every
case runs three times, in turn; the run with the median time per token counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from plan import Job, Plan, first_token
from rows import RowFile
from sections.table import row_name
from text_model import text_model, texts_like

from engine import Engine, SamplingParams

SECTION = "constrained"
NUM_REQUESTS = 64
PROMPT_TOKENS = 128
OTHERS_TOKENS = 256
MAX_TOKENS = 600
NUM_RUNS = 3
CASES = ("free", "constrained", "single tokens", "others beside free", "others beside constrained")


class Run(NamedTuple):
    """One run of a case.

    Attributes:
        seconds: Wall time.
        num_tokens: Of the requests whose time it is.
        num_steps: Steps of everything.
    """

    seconds: float
    num_tokens: int
    num_steps: int

    @property
    def seconds_per_token(self) -> float:
        """What is compared."""
        return self.seconds / self.num_tokens


def jobs(plan: Plan) -> list[Job]:
    """One job per shape and placement; the largest shape hides what the others show."""
    return [
        Job(
            SECTION,
            row_name(shape, placement, "all"),
            {"shape": shape, "placement": placement},
            tuple(row_name(shape, placement, case) for case in CASES),
        )
        for placement in plan.placements
        for shape in plan.shapes
        if shape != "llama-8b"
    ]


def schema(kind: int, *, is_short: bool = False) -> dict[str, Any]:
    """What is asked of a text about people, in one of four forms; the title alone if short."""
    person = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 5, "maxLength": 30},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "role": {"enum": ["author", "editor", "witness", "somebody else"]},
        },
        "required": ["name", "age", "role"],
        "additionalProperties": False,
    }
    properties: dict[str, Any] = {
        "title": {"type": "string", "minLength": 10, "maxLength": 60},
        "people": {"type": "array", "items": person, "minItems": 2, "maxItems": 4},
        "sentiment": {"enum": ["positive", "neutral", "negative"]},
        "summary": {"type": "string", "minLength": 200, "maxLength": 400},
        "confidence": {"type": "integer", "minimum": 0, "maximum": 100},
    }
    properties[f"remark_{kind}"] = {"type": "string", "minLength": 20 * kind, "maxLength": 100}
    if is_short:
        properties = {"title": properties["title"]}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def measure(plan: Plan, rows: RowFile, *, shape: str, placement: str) -> None:
    """All cases on one engine."""
    num_requests = 2 if plan.is_quick else NUM_REQUESTS
    num_runs = 1 if plan.is_quick else NUM_RUNS
    others_tokens = 8 if plan.is_quick else OTHERS_TOKENS
    folder = str(text_model(shape, plan.text_model))
    with plan.make_engine(shape, placement, folder) as engine:
        first_token(engine)
        texts = texts_like([([0] * PROMPT_TOKENS, 0)] * 2 * num_requests, engine.tokenizer)
        prompts, other_prompts = texts[:num_requests], texts[num_requests:]
        held = [
            SamplingParams(
                json_schema=schema(index % 4, is_short=plan.is_quick),
                max_tokens=MAX_TOKENS,
                seed=index,
                ignore_eos=True,
            )
            for index in range(num_requests)
        ]
        started_s = time.perf_counter()
        made = engine.generate(prompts, held)
        first_s = time.perf_counter() - started_s
        counts = [output.usage.completion_tokens for output in made]
        free = [
            SamplingParams(max_tokens=count, seed=index, ignore_eos=True)
            for index, count in enumerate(counts)
        ]
        never = max(engine.tokenizer.special_token_ids)
        stepped = [params.replace(stop_token_ids=[never]) for params in held]
        others = [
            SamplingParams(max_tokens=others_tokens, seed=index, ignore_eos=True)
            for index in range(num_requests)
        ]

        def run_others(params: list[SamplingParams]) -> Run:
            return timed_others(engine, other_prompts, others, prompts, params)

        cases: dict[str, Callable[[], Run]] = {
            "free": lambda: timed(engine, prompts, free),
            "constrained": lambda: timed(engine, prompts, held),
            "single tokens": lambda: timed(engine, prompts, stepped),
            "others beside free": lambda: run_others(free),
            "others beside constrained": lambda: run_others(held),
        }
        runs: dict[str, list[Run]] = {case: [] for case in cases}
        for call in () if plan.is_quick else cases.values():
            call()  # captures, compiles
        for _ in range(num_runs):
            for case, call in cases.items():
                runs[case].append(call())
        medians = {
            case: sorted(taken, key=lambda run: run.seconds_per_token)[len(taken) // 2]
            for case, taken in runs.items()
        }
        for case in CASES:
            against = medians["others beside free" if case.startswith("others") else "free"]
            median = medians[case]
            rows.add(
                SECTION,
                row_name(shape, placement, case),
                median.seconds,
                "s",
                shape=shape,
                placement=placement,
                case=case,
                requests=num_requests,
                output_tokens=median.num_tokens,
                output_tokens_per_s=1 / median.seconds_per_token,
                steps=median.num_steps,
                over_free=median.seconds_per_token / against.seconds_per_token - 1,
                first_s=first_s if case == "constrained" else None,
            )


def timed(engine: Engine, prompts: list[str], params: list[SamplingParams]) -> Run:
    """All requests together."""
    engine.reset_prefix_cache()
    steps, started_s = engine.stats().steps, time.perf_counter()
    outputs = engine.generate(prompts, params)
    seconds = time.perf_counter() - started_s
    made = sum(output.usage.completion_tokens for output in outputs)
    return Run(seconds, made, engine.stats().steps - steps)


def timed_others(
    engine: Engine,
    other_prompts: list[str],
    others: list[SamplingParams],
    prompts: list[str],
    params: list[SamplingParams],
) -> Run:
    """Until the last of `others` ends; their tokens."""
    engine.reset_prefix_cache()
    steps, started_s = engine.stats().steps, time.perf_counter()
    handles = engine.submit_many([*other_prompts, *prompts], [*others, *params])
    made = sum(handle.result().usage.completion_tokens for handle in handles[: len(others)])
    seconds = time.perf_counter() - started_s
    for handle in handles[len(others) :]:
        handle.result()
    return Run(seconds, made, engine.stats().steps - steps)
