"""Checks of how requests run: together, in any loop, given up, copied, closed."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage

from llm_connectors.testing.llama_index.subject import (
    MESSAGES,
    Subject,
    is_swallowed,
    responses,
    text_of,
    wait_until,
)

_MANY = 32
_MAX_STALL_S = 0.05
_ABORT_S = 1.5
_NUM_TRIES = 3
"""Other processes can only make a run longer, so the best of three is the class's own."""


def check_12_gathered(subject: Subject) -> None:
    """32 gathered `achat`s are 32 requests of one batch, and the loop stays free."""
    peak = subject.probe("peak")
    llm = subject.llm

    async def main() -> tuple[float, float, float]:
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
        return single_s, time.perf_counter() - started_s, stall_s

    runs = [asyncio.run(main()) for _ in range(_NUM_TRIES)]
    assert peak() >= _MANY, f"at most {peak()} requests ran together"
    # A batch may cost more than one answer, but far less than one after the other.
    assert min(wall_s / single_s for single_s, wall_s, _ in runs) < _MANY / 4
    assert min(stall_s for *_, stall_s in runs) < _MAX_STALL_S


def check_13_any_loop(subject: Subject) -> None:
    """Two loops in two threads, many short-lived loops, a loop inside a loop's thread."""
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

    async def cancel() -> None:
        task = asyncio.ensure_future(llm.achat(MESSAGES, **options))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def time_out() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(llm.achat(MESSAGES, **options), 0.01)

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
        wait_until(lambda: running() == 0, f"{name}: the request leaves", _ABORT_S)


def check_16_batch_equals_single(subject: Subject) -> None:
    """An answer does not depend on what runs beside it (greedy)."""
    llm = subject.llm
    prompts = [[ChatMessage(content="word " * count)] for count in (1, 3, 9, 20)]
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8}
    single = [text_of(llm.chat(prompt, **options)) for prompt in prompts]

    async def main() -> list[str]:
        chats = [llm.achat(prompt, **options) for prompt in prompts]
        return [text_of(one) for one in await asyncio.gather(*chats)]

    assert asyncio.run(main()) == single


def check_25_copies(subject: Subject) -> None:
    """Copies and pickles work, and share the engine."""
    llm = subject.llm
    wanted = text_of(llm.chat(MESSAGES, temperature=0.0, max_tokens=4))
    copies = {
        "copy": copy.copy(llm),
        "deepcopy": copy.deepcopy(llm),
        "pickle": pickle.loads(pickle.dumps(llm)),
    }
    for name, other in copies.items():
        assert text_of(other.chat(MESSAGES, temperature=0.0, max_tokens=4)) == wanted, name
        if hasattr(llm, "engine"):
            assert other.engine is llm.engine, name


def check_28_close(subject: Subject) -> None:
    """`close` is idempotent, fails what is pending with a typed error, and can be undone."""
    reopen = subject.probe("reopen")
    llm: Any = subject.llm
    stream = llm.stream_chat(MESSAGES, max_tokens=200, ignore_eos=True)
    next(stream)
    llm.close(drain=False)
    llm.close()
    with pytest.raises(Exception, match=r"(?s).+") as caught:
        list(stream)
    assert not is_swallowed(caught.value)
    again = reopen()
    assert responses(again, "chat", max_tokens=2)[-1].raw["usage"]["completion_tokens"] >= 1
    again.close()
