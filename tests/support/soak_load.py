"""Random load on an engine: callers of all kinds at once, for the soak tests."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter

import pytest

from engine import CapacityError, ContextOverflowError, Engine, RequestTimeoutError, SamplingParams


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


def random_prompt(rng: random.Random, vocab_size: int) -> list[int]:
    shared = list(range(100, 100 + rng.choice([0, 64, 200])))
    return shared + [rng.randrange(10, vocab_size) for _ in range(rng.randint(1, 120))]


class Load:
    """Callers of all kinds on one engine; counts how their requests ended."""

    def __init__(self, engine: Engine, end_s: float) -> None:
        self.engine, self.end_s = engine, end_s
        self.endings: Counter[str] = Counter()
        self.errors: list[BaseException] = []

    def prompt(self, rng: random.Random) -> list[int]:
        return random_prompt(rng, self.engine.vocab_size)

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
            [self.prompt(rng) for _ in range(3)], [random_params(rng) for _ in range(3)]
        )
        if rng.random() < 0.3:
            rng.choice(handles).abort()
        for handle in handles:
            for answer in handle.result(timeout=120).outputs:
                self.endings[str(answer.finish_reason)] += 1

    def stream(self, rng: random.Random) -> None:
        handle = self.engine.submit(self.prompt(rng), random_params(rng))
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
        handle = self.engine.submit(self.prompt(rng), SamplingParams(max_tokens=150))
        with pytest.raises(RequestTimeoutError):
            handle.result(timeout=0.001)
        self.endings["timeout"] += 1
        time.sleep(0.05)

    async def async_caller(self, rng: random.Random) -> None:
        while not self.is_over():
            tasks = [
                asyncio.ensure_future(self.engine.submit(self.prompt(rng), random_params(rng)))
                for _ in range(4)
            ]
            await asyncio.sleep(rng.random() * 0.2)
            rng.choice(tasks).cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for result in results:
                self.endings["cancelled" if isinstance(result, BaseException) else "awaited"] += 1


KINDS = ("wait", "wait", "stream", "stream", "async", "misuse")


def run_load(engine: Engine, seconds: float) -> Load:
    """A thread for each of `KINDS`, until the time is up."""
    load = Load(engine, time.monotonic() + seconds)
    threads = [
        threading.Thread(target=load.run, args=(seed, kind)) for seed, kind in enumerate(KINDS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return load


def check_all_came_back(engine: Engine, load: Load) -> None:
    """Every request ended as it should and nothing is held."""
    assert not load.errors, load.errors
    end_s = time.monotonic() + 20
    while engine.stats().running + engine.stats().waiting and time.monotonic() < end_s:
        time.sleep(0.05)
    stats = engine.stats()
    assert stats.kv_blocks_used == 0
    assert stats.running == stats.waiting == 0
    assert stats.requests_failed == 0
    assert stats.preemptions > 0
    assert load.endings["length"] > 0
    assert load.endings["left"] > 0
    assert load.endings["cancelled"] > 0
