"""Random load on the demo model until the time is up: every block comes back, memory stays flat.

`SOAK_SECONDS` sets the time; the default is short. The ten-minute run is `make soak`.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from engine import CapacityError, ContextOverflowError, Engine, RequestTimeoutError, SamplingParams

pytestmark = [pytest.mark.demo_model, pytest.mark.slow]

SOAK_S = float(os.environ.get("SOAK_SECONDS", "45"))
# Allocators and the libraries' caches fill in the first minute, by 20 to 35 MiB; from there on
# resident memory stayed within 6 MiB for the rest of four minutes, in both processes together.
WARM_UP_S = max(40.0, SOAK_S / 4)


def resident_bytes(engine: Engine) -> int:
    """Memory of this process, and of the engine's own where it has one."""
    pids = [os.getpid()]
    if engine.config.placement == "process":
        pids.append(engine._host._child.pid)  # type: ignore[attr-defined]
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE")


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.7, 1.2]),
        top_p=rng.choice([1.0, 0.9]),
        top_k=rng.choice([0, 40]),
        max_tokens=rng.randint(1, 60),
        n=rng.choice([1, 1, 1, 3]),
        stop=rng.choice([None, None, [" the", "."]]),
        logprobs=rng.choice([None, None, None, 2]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
        bad_words=rng.choice([None, None, None, ["very well"]]),
        ignore_eos=rng.random() < 0.5,
    )


def random_prompt(rng: random.Random) -> list[int]:
    shared = list(range(100, 100 + rng.choice([0, 64, 200])))
    return shared + [rng.randrange(10, 45000) for _ in range(rng.randint(1, 120))]


class Load:
    """Callers of all kinds on one engine; counts how their requests ended."""

    def __init__(self, engine: Engine, end_s: float) -> None:
        self.engine, self.end_s = engine, end_s
        self.endings: Counter[str] = Counter()
        self.errors: list[BaseException] = []

    def is_over(self) -> bool:
        return time.monotonic() > self.end_s

    def run(self, seed: int, kind: str) -> None:
        rng = random.Random(seed)
        try:
            if kind == "async":
                asyncio.run(self.async_caller(rng))
            while not self.is_over():
                getattr(self, kind)(rng)
        except BaseException as error:
            self.errors.append(error)

    def wait(self, rng: random.Random) -> None:
        handles = self.engine.submit_many(
            [random_prompt(rng) for _ in range(3)], [random_params(rng) for _ in range(3)]
        )
        if rng.random() < 0.3:
            rng.choice(handles).abort()
        for handle in handles:
            for answer in handle.result(timeout=120).outputs:
                self.endings[str(answer.finish_reason)] += 1

    def stream(self, rng: random.Random) -> None:
        handle = self.engine.submit(random_prompt(rng), random_params(rng))
        leave_after = rng.choice([None, 1, 5])
        for count, _delta in enumerate(handle):
            if leave_after is not None and count >= leave_after:
                self.endings["left"] += 1
                break
        else:
            self.endings["streamed"] += 1

    def misuse(self, rng: random.Random) -> None:
        with pytest.raises((ContextOverflowError, CapacityError)):
            self.engine.submit([5] * 3000)
        handle = self.engine.submit(random_prompt(rng), SamplingParams(max_tokens=200))
        with pytest.raises(RequestTimeoutError):
            handle.result(timeout=0.001)
        self.endings["timeout"] += 1
        time.sleep(0.05)

    async def async_caller(self, rng: random.Random) -> None:
        while not self.is_over():
            tasks = [
                asyncio.ensure_future(self.engine.submit(random_prompt(rng), random_params(rng)))
                for _ in range(4)
            ]
            await asyncio.sleep(rng.random() * 0.2)
            rng.choice(tasks).cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for result in results:
                self.endings["cancelled" if isinstance(result, BaseException) else "awaited"] += 1


@pytest.mark.timeout(SOAK_S + 240)
@pytest.mark.parametrize("placement", ["thread", "process"])
def test_soak(demo_model: str, placement: str) -> None:
    sizes = {"num_kv_blocks": 40, "block_size": 16, "max_num_seqs": 12}
    engine = Engine(demo_model, device="cpu", placement=placement, **sizes)
    kinds = ["wait", "wait", "stream", "stream", "async", "misuse"]

    def run_for(seconds: float) -> Load:
        load = Load(engine, time.monotonic() + seconds)
        threads = [
            threading.Thread(target=load.run, args=(seed, kind)) for seed, kind in enumerate(kinds)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return load

    assert not run_for(WARM_UP_S).errors
    gc.collect()
    before_bytes = resident_bytes(engine)
    load = run_for(SOAK_S)
    gc.collect()
    grown_mib = (resident_bytes(engine) - before_bytes) / 2**20
    assert not load.errors
    end_s = time.monotonic() + 20
    while engine.stats().running + engine.stats().waiting and time.monotonic() < end_s:
        time.sleep(0.05)
    stats = engine.stats()
    print(f"\nendings {dict(load.endings)}, grown by {grown_mib:.1f} MiB\n{stats}")
    assert stats.kv_blocks_used == 0
    assert stats.running == stats.waiting == 0
    assert stats.requests_failed == 0
    assert stats.preemptions > 0
    assert load.endings["stop"] > 0
    assert load.endings["length"] > 0
    assert load.endings["left"] > 0
    assert load.endings["cancelled"] > 0
    assert grown_mib < 48
    engine.close()
