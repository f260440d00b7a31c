"""Checks of how requests run: together, in any loop, given up, batched."""

from __future__ import annotations

import asyncio
import gc
import importlib
import importlib.util
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage

from llm_connectors.testing.llama_index.subject import (
    MAKE,
    MESSAGES,
    Subject,
    run_apart,
    text_of,
    wait_until,
)

_MANY = 32
_MAX_STALL_S = 0.05
_MAX_WALL = 4.0
"""Times as long as one answer that 32 of them may take together."""
_ABORT_S = 1.5
_SETTLE_S = 0.05
"""A request that was just submitted may not be counted yet."""
_NUM_TRIES = 3
"""Other processes can only make a run longer, so the best of three is the class's own."""


def check_12_gathered(subject: Subject) -> None:
    """32 gathered `achat`s are 32 requests of one batch, and the loop stays free."""
    peak, running = subject.probe("peak"), subject.probe("running")
    llm = subject.llm
    most = 0

    async def main() -> tuple[float, float, float]:
        nonlocal most
        await llm.achat(MESSAGES, temperature=0.0)
        started_s = time.perf_counter()
        await llm.achat(MESSAGES, temperature=0.0)
        single_s = time.perf_counter() - started_s
        started_s = time.perf_counter()
        chats = [llm.achat([ChatMessage(content=f"Number {i}.")]) for i in range(_MANY)]
        work = asyncio.ensure_future(asyncio.gather(*chats))
        stall_s = 0.0
        while not work.done():
            before_s = time.perf_counter()
            await asyncio.sleep(0.001)
            stall_s = max(stall_s, time.perf_counter() - before_s)
            most = max(most, running())
        return single_s, time.perf_counter() - started_s, stall_s

    runs = []
    for _ in range(_NUM_TRIES):
        runs.append(asyncio.run(main()))
        assert min(most, peak()) >= _MANY, f"at most {min(most, peak())} requests ran together"
    # A batch may cost more than one answer, but far less than one after the other.
    assert min(wall_s / single_s for single_s, wall_s, _ in runs) < _MAX_WALL
    assert min(stall_s for *_, stall_s in runs) < _MAX_STALL_S


def check_13_any_loop(subject: Subject) -> None:
    """Two loops in two threads, many short-lived loops, nested loops, nest_asyncio, uvloop."""
    llm = subject.llm

    async def main(count: int) -> list[str]:
        chats = [llm.achat(MESSAGES, temperature=0.0, max_tokens=4) for _ in range(count)]
        return [text_of(one) for one in await asyncio.gather(*chats)]

    (wanted,) = asyncio.run(main(1))
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda _: asyncio.run(main(4)), range(2))
    assert {text for texts in found for text in texts} == {wanted}
    for _ in range(50):
        assert asyncio.run(main(1)) == [wanted]

    async def nested() -> list[str]:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(asyncio.run, main(1)).result(30)

    assert asyncio.run(nested()) == [wanted]
    if importlib.util.find_spec("uvloop") is not None:
        uvloop = importlib.import_module("uvloop")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            assert runner.run(main(4)) == [wanted] * 4
            assert runner.run(nested()) == [wanted]
    if subject.factory is not None:
        # Apart, because it patches asyncio for good.
        assert run_apart(_NESTED, *subject.factory.split(":")) == "same"


_NESTED = (
    MAKE
    + """
import asyncio
import nest_asyncio
nest_asyncio.apply()
async def ask():
    return (await llm.achat(messages, temperature=0.0, max_tokens=4)).message.content
async def cell():
    return asyncio.run(ask()), await ask()
first, second = asyncio.run(cell())
whole = llm.chat(messages, temperature=0.0, max_tokens=4).message.content
print("same" if first == second == whole else f"{first!r}, {second!r} and {whole!r}")
"""
)


def check_14_sync_in_a_loop(subject: Subject) -> None:
    """Sync calls inside a running loop do not deadlock."""

    async def main() -> tuple[str, str]:
        whole = subject.llm.chat(MESSAGES, temperature=0.0)
        chunks = list(subject.llm.stream_chat(MESSAGES, temperature=0.0))
        return text_of(whole), text_of(chunks[-1])

    whole, streamed = asyncio.run(asyncio.wait_for(main(), 60))
    assert whole == streamed


def check_15_giving_up(subject: Subject) -> None:
    """A cancelled, timed-out, left or dropped request leaves the engine."""
    running = subject.probe("running")
    llm = subject.llm
    # Long enough not to end by itself while the check waits.
    length = llm.metadata.context_window // 2
    options: dict[str, Any] = {"max_tokens": length, "ignore_eos": True}
    blocks = subject.blocks or (lambda: 0)
    wait_until(lambda: running() == 0, "what ran before this check ends")
    held = blocks()

    async def cancel() -> None:
        task = asyncio.ensure_future(llm.achat(MESSAGES, **options))
        while running() == 0 and not task.done():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def time_out() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(llm.achat(MESSAGES, **options), 0.05)

    async def leave_async() -> None:
        stream = await llm.astream_chat(MESSAGES, **options)
        async for _ in stream:
            break
        await stream.aclose()

    def leave() -> None:
        for _ in llm.stream_chat(MESSAGES, **options):
            break

    def drop() -> None:
        stream = llm.stream_chat(MESSAGES, **options)
        next(stream)
        del stream
        gc.collect()

    ways: dict[str, Any] = {
        "cancel": lambda: asyncio.run(cancel()),
        "wait_for": lambda: asyncio.run(time_out()),
        "async break": lambda: asyncio.run(leave_async()),
        "break": leave,
        "drop": drop,
    }
    for name, way in ways.items():
        way()
        time.sleep(_SETTLE_S)
        wait_until(lambda: running() == 0, f"{name}: the request leaves", _ABORT_S)
        wait_until(lambda: blocks() == held, f"{name}: its KV blocks come back", _ABORT_S)


def check_16_batch_equals_single(subject: Subject) -> None:
    """An answer does not depend on what runs beside it (greedy)."""
    llm = subject.llm
    prompts = [[ChatMessage(content="word " * count)] for count in (1, 3, 9, 20)]
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8}
    single = [text_of(llm.chat(prompt, **options)) for prompt in prompts]

    async def main() -> list[str]:
        chats = [llm.achat(prompt, **options) for prompt in prompts]
        return [text_of(one) for one in await asyncio.gather(*chats)]

    assert asyncio.run(main()) == single, "answers depend on the batch"
