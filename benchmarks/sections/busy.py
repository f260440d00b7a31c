"""`chat` while the application's own Python threads spin: what the GIL costs, on both sides.

A spinner counts in a pure-Python loop, the worst neighbour an in-process engine can have. Kept
throughput is that of `chat` with spinners over that without; a spinner keeps what it counts per
second during `chat` over what it counts beside an idle engine.
"""

from __future__ import annotations

import threading
import time

from plan import Job, Plan, first_token, host_ms_per_step
from rows import RowFile
from sections.table import row_name, run_workload
from workloads import SHAPES, tokens_out
from workloads import chat as chat_requests

SECTION = "busy"
SPINNERS = (0, 1, 4)


def jobs(plan: Plan) -> list[Job]:
    """One job per placement, on the shape that the host slows down most."""
    shape = plan.shape_for("llama-135m")
    return [
        Job(
            SECTION,
            row_name(shape, placement, "all"),
            {"shape": shape, "placement": placement},
            tuple(row_name(shape, placement, f"spinners-{count}") for count in SPINNERS),
        )
        for placement in plan.placements
    ]


class Spinners:
    """Threads that count as fast as they can, inside a `with` block."""

    def __init__(self, count: int) -> None:
        self._counts = [0] * count
        self._is_over = False
        self._threads = [
            threading.Thread(target=self._spin, args=(place,), daemon=True)
            for place in range(count)
        ]

    def __enter__(self) -> Spinners:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        for thread in self._threads:
            thread.join()

    @property
    def total(self) -> int:
        """Rounds of all threads so far."""
        return sum(self._counts)

    def _spin(self, place: int) -> None:
        while not self._is_over:
            total = 0
            for number in range(1000):
                total += number
            self._counts[place] += 1


def measure(plan: Plan, rows: RowFile, *, shape: str, placement: str) -> None:
    """`chat` beside 0, 1 and 4 spinners. The quiet run comes first and is the yardstick."""
    requests = plan.sized(chat_requests(SHAPES[shape]["vocab_size"]))
    if plan.is_quick:  # each token waits for every spinner
        requests = [(prompt, 3) for prompt, _ in requests[:2]]
    idle_s = 0.1 if plan.is_quick else 1.0
    quiet_s = 0.0
    with plan.make_engine(shape, placement) as engine:
        first_token(engine)
        run_workload(engine, requests)  # captures and compiles
        for count in SPINNERS:
            with Spinners(count) as spinners:
                alone = spinners.total
                time.sleep(idle_s)
                alone_per_s = (spinners.total - alone) / idle_s
                engine.reset_prefix_cache()
                before, counted = engine.stats(), spinners.total
                seconds = run_workload(engine, requests)
                beside_per_s = (spinners.total - counted) / seconds
                steps, host_ms = host_ms_per_step(before, engine.stats())
            quiet_s = quiet_s or seconds
            rows.add(
                SECTION,
                row_name(shape, placement, f"spinners-{count}"),
                seconds,
                "s",
                shape=shape,
                placement=placement,
                workload="chat",
                spinners=count,
                output_tokens_per_s=tokens_out(requests) / seconds,
                kept_share=quiet_s / seconds,
                spinner_kept_share=beside_per_s / alone_per_s if count else None,
                steps=steps,
                host_ms_per_step=host_ms,
            )
