"""Steady-state decoding costs no Python per sequence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
from core_fakes import make_request

from engine.core.scheduler import Scheduler


def _lines_executed(call: Callable[[], object]) -> int:
    """Lines of the package run by `call`: a loop over sequences shows, whatever it does."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        # The garbage collector may call into others (hypothesis times it) at any moment.
        if not frame.f_globals["__name__"].startswith("engine."):
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def _cost_of_a_step(num_seqs: int) -> tuple[int, int]:
    scheduler = Scheduler(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=1024,
        max_model_len=256,
        block_size=64,
        num_blocks=num_seqs * 4 + 1,
        enable_prefix_caching=True,
    )
    for number in range(num_seqs):
        request = make_request(scheduler, [number + 1, 2, 3], max_tokens=100)
        scheduler.add(request.sequences[0])
    batches = [scheduler.schedule(), scheduler.schedule()]
    token_ids = np.full(num_seqs, 9)

    def schedule() -> None:
        batches.append(scheduler.schedule())

    def complete() -> None:
        scheduler.complete(batches.pop(0), token_ids)

    complete()
    costs = _lines_executed(schedule), _lines_executed(complete)
    assert batches[-1].num_seqs == num_seqs
    return costs


def test_the_number_of_python_lines_does_not_depend_on_the_number_of_sequences() -> None:
    assert _cost_of_a_step(4) == _cost_of_a_step(256)
