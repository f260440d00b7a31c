"""The host's side at a GPU's pace, without a GPU: a device that only lets time pass.

The engine is whole (scheduler, output, handles, connectors) but for its runner, which answers each
step after about as long as llama-135m takes on an H100. What a case takes over `Engine.generate` is
what the interpreter costs: rendering, callbacks, streams. Each case runs three times, the median
counts; wall seconds.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
from plan import Job, Plan, first_token
from rows import RowFile
from sections.cases import ENGINE_CASE, Cases
from sections.frameworks import timed_run
from text_model import text_model, texts_like
from workloads import SHAPES
from workloads import chat as chat_requests

from engine import Engine
from engine.core.batch import ScheduledBatch, StepOutput
from engine.core.pieces import pieces
from engine.launch_ahead import LaunchAhead

SECTION = "host"
SHAPE = "tiny"
MAX_TOKENS = 200
STEPS_IN_FLIGHT = 32

# Seconds: of any step, per decoding sequence, per token of a prompt. 256 sequences take 2.8 ms.
STEP_S, SEQUENCE_S, PROMPT_TOKEN_S = 0.6e-3, 8.7e-6, 1.4e-6


class PretendedStep:
    """A step that is over at a given time."""

    def __init__(self, over_s: float, output: StepOutput) -> None:
        self._over_s = over_s
        self._output = output

    @property
    def is_done(self) -> bool:
        """True once its time is over."""
        return time.perf_counter() >= self._over_s

    def wait(self) -> StepOutput:
        """The result, when its time is over."""
        left_s = self._over_s - time.perf_counter()
        if left_s > 0.0:  # a sleep of no time gives up the GIL as well
            time.sleep(left_s)
        return self._output


class PretendedDevice:
    """A runner whose device runs steps one after the other and computes nothing."""

    def __init__(self) -> None:
        self._free_s = 0.0

    def execute(self, batch: ScheduledBatch) -> PretendedStep:
        """Queue a step behind those before it."""
        num_sequences = len(batch.rows)
        step_s = STEP_S + SEQUENCE_S * num_sequences
        step_s += PROMPT_TOKEN_S * (batch.num_tokens - num_sequences)
        self._free_s = max(self._free_s, time.perf_counter()) + step_s
        # Words, as ids all over a vocabulary are; its first ones are single bytes.
        ids = [
            np.where(
                batch.is_sampling[one],
                2000 + (batch.rows[one] * 7919 + batch.step_id * 977) % 40000,
                -1,
            )
            for one in pieces(num_sequences)
        ]
        return PretendedStep(self._free_s, StepOutput(np.concatenate(ids)))

    def free_row(self, row: int) -> None:
        """Nothing is kept for a row."""

    def check_health(self) -> None:
        """It cannot break."""


def pretend(engine: Engine) -> None:
    """Put a pretended device in the place of the idle engine's runner."""
    loop: Any = engine._host.loop  # type: ignore[attr-defined]
    loop._runner = PretendedDevice()
    loop._outputs._on_row_freed = loop._runner.free_row
    loop._ahead = LaunchAhead(STEPS_IN_FLIGHT)


def jobs(plan: Plan) -> list[Job]:
    """One job."""
    return [Job(SECTION, "all", {}, ())]


def measure(plan: Plan, rows: RowFile) -> None:
    """Every case against the engine."""
    num_requests, max_tokens = (12, 8) if plan.is_quick else (1000, MAX_TOKENS)
    requests = chat_requests(SHAPES[SHAPE]["vocab_size"], n=num_requests)
    with plan.make_engine(SHAPE, folder=str(text_model(SHAPE, plan.text_model))) as engine:
        first_token(engine)
        pretend(engine)
        cases = Cases(engine, texts_like(requests, engine.tokenizer), max_tokens).all()
        yardsticks: dict[int, float] = {}
        for case, (count, run) in cases.items():
            timed_run(engine, run, count * max_tokens)  # frameworks import on first use
            seconds, caller_cpu_s = _median(engine, run, count * max_tokens)
            if ENGINE_CASE in case:
                yardsticks.setdefault(count, seconds)
            over = seconds / yardsticks.get(count, seconds) - 1
            rows.add(
                SECTION, case, seconds, "s", requests=count, caller_cpu_s=caller_cpu_s, over=over
            )


def _median(engine: Engine, run: Any, num_tokens: int) -> tuple[float, float]:
    runs = [timed_run(engine, run, num_tokens) for _ in range(3)]
    return statistics.median(wall for wall, _ in runs), statistics.median(cpu for _, cpu in runs)
