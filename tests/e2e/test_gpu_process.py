"""An engine on a GPU in a child process: its memory comes back, however it ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine import Engine, EngineDeadError, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
KV_CACHE_BYTES = 2 << 30


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def close(engine: Engine) -> None:
    engine.close()


def close_now(engine: Engine) -> None:
    engine.submit_many([[5, 6 + index] for index in range(64)], LONG)
    engine.close(drain=False)


def kill(engine: Engine) -> None:
    handles = engine.submit_many([[5, 6 + index] for index in range(64)], LONG)
    os.kill(engine._host._child.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    for handle in handles:
        with pytest.raises(EngineDeadError, match="signal 9"):
            handle.result(timeout=20)


@pytest.mark.parametrize("end", [close, close_now, kill])
def test_all_memory_comes_back(tiny_llama: Path, end: Callable[[Engine], None]) -> None:
    """The CUDA context too, which a thread of this process would leave behind."""
    before = used_bytes()
    engine = Engine(
        str(tiny_llama),
        device="cuda",
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        placement="process",
    )
    assert len(engine.generate([5, 6], LONG).outputs[0].token_ids) == 400
    assert used_bytes() - before > KV_CACHE_BYTES
    end(engine)
    assert eventually(lambda: used_bytes() - before < 16 << 20), (used_bytes() - before) >> 20


def test_orders_reach_a_busy_child(tiny_llama: Path) -> None:
    """Its engine thread keeps the GIL while it launches ahead; aborts and questions get through."""
    with Engine(
        str(tiny_llama), device="cuda", kv_cache_memory_bytes=KV_CACHE_BYTES, placement="process"
    ) as engine:
        engine.generate([5, 6], LONG)
        handles = engine.submit_many([[5, 6 + index] for index in range(64)], LONG)
        assert eventually(lambda: engine.stats().running == 64)
        started_s = time.monotonic()
        for handle in handles:
            handle.abort()
        reasons = {handle.result(timeout=10).outputs[0].finish_reason for handle in handles}
        assert time.monotonic() - started_s < 0.5
        assert "abort" in reasons
        assert engine.stats().kv_blocks_used == 0
