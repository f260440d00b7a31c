"""True async, threads, event loops, cancellation, time limits. Fake engine."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index_fake_engine import FakeEngine
from stalls import least_pause

import engine
from llm_connectors.llama_index import LocalLLM

USER = [ChatMessage(content="Count to a hundred.")]
LONG = "word " * 2000
SRC = Path(engine.__file__).parents[1]


def slow_fake() -> FakeEngine:
    """One request runs for two seconds unless aborted."""
    return FakeEngine(answer=lambda _prompt, _params: LONG, step_s=0.001)


def slow_llm(fake: FakeEngine, **options: object) -> LocalLLM:
    return LocalLLM(engine=fake, max_tokens=2000, **options)


def wait_until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.002)


def test_gathered_chats_run_together_and_leave_the_loop_free(
    llm: LocalLLM, fake: FakeEngine
) -> None:
    fake.step_s = 0.01

    async def main() -> None:
        chats = [llm.achat([ChatMessage(content=f"Number {index}")]) for index in range(32)]
        texts = [response.message.content for response in await asyncio.gather(*chats)]
        assert [text.split()[-1] for text in texts] == [f"{index}." for index in range(32)]

    llm.chat(USER)
    assert least_pause(main, 0.05) < 0.05
    assert fake.peak_running >= 32


def test_two_loops_in_two_threads(llm: LocalLLM, fake: FakeEngine) -> None:
    async def main() -> list[str]:
        responses = await asyncio.gather(*(llm.achat(USER) for _ in range(8)))
        return [response.message.content for response in responses]

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: asyncio.run(main()), range(2)))
    assert len(set(results[0] + results[1])) == 1
    assert len(fake.requests) == 16


def test_many_short_lived_loops(llm: LocalLLM) -> None:
    wanted = llm.chat(USER).message.content
    for _ in range(50):
        assert asyncio.run(llm.achat(USER)).message.content == wanted


def test_sync_calls_inside_a_running_loop(llm: LocalLLM) -> None:
    async def main() -> tuple[str, str]:
        chunks = list(llm.stream_chat(USER))
        return llm.chat(USER).message.content, chunks[-1].message.content

    whole, streamed = asyncio.run(asyncio.wait_for(main(), 5))
    assert whole == streamed


def test_nested_loops_as_in_a_notebook() -> None:
    # In a process of its own: nest_asyncio patches asyncio for good.
    code = """
        import asyncio, nest_asyncio
        from llama_index_fake_engine import FakeEngine
        from llm_connectors.llama_index import LocalLLM
        nest_asyncio.apply()
        llm = LocalLLM(engine=FakeEngine())
        async def cell():
            return asyncio.run(llm.acomplete("Hi")).text
        assert asyncio.run(cell()) == llm.complete("Hi").text != ""
        print("same text")
    """
    support = Path(__file__).parents[2] / "support"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (support, SRC)))},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "same text\n", done.stderr


def test_sync_calls_from_many_threads(llm: LocalLLM, fake: FakeEngine) -> None:
    fake.step_s = 0.005
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: llm.chat(USER), range(8)))
    assert fake.peak_running > 1


def test_cancelled_task_aborts() -> None:
    fake = slow_fake()
    llm = slow_llm(fake)

    async def main() -> None:
        task = asyncio.ensure_future(llm.achat(USER))
        while not fake.requests:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    wait_until(lambda: fake.num_aborted == 1)
    fake.close()


def test_wait_for_aborts() -> None:
    fake = slow_fake()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(slow_llm(fake).acomplete("x"), 0.05)

    asyncio.run(main())
    wait_until(lambda: fake.num_aborted == 1)
    fake.close()


@pytest.mark.parametrize("how", ["close", "drop", "drop unstarted", "break"])
def test_leaving_a_stream_early_aborts(how: str) -> None:
    fake = slow_fake()
    stream = slow_llm(fake).stream_chat(USER)
    if how != "drop unstarted":
        next(stream)
    if how == "close":
        stream.close()
    elif how == "break":
        for _ in stream:
            break
    del stream
    gc.collect()
    wait_until(lambda: fake.num_aborted == 1)
    fake.close()


@pytest.mark.parametrize("how", ["aclose", "drop unstarted", "cancel"])
def test_leaving_an_async_stream_early_aborts(how: str) -> None:
    fake = slow_fake()

    async def main() -> None:
        stream = await slow_llm(fake).astream_chat(USER)
        if how == "drop unstarted":
            del stream
            gc.collect()
        elif how == "aclose":
            await anext(stream)
            await stream.aclose()
        else:

            async def drain() -> None:
                async for _ in stream:
                    pass

            task = asyncio.ensure_future(drain())
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    wait_until(lambda: fake.num_aborted == 1)
    fake.close()


@pytest.mark.parametrize(
    "endpoint", ["chat", "achat", "stream_chat", "astream_chat", "complete", "abatch_complete"]
)
def test_time_limit_aborts_with_a_typed_error(endpoint: str) -> None:
    fake = slow_fake()
    llm = slow_llm(fake, timeout=0.05)
    source = USER if endpoint.endswith("chat") else "x"

    async def run_async() -> None:
        result = await getattr(llm, endpoint)([source] if "batch" in endpoint else source)
        if endpoint == "astream_chat":
            async for _ in result:
                pass

    def run() -> None:
        if endpoint.startswith("a"):
            asyncio.run(run_async())
        else:
            list(getattr(llm, endpoint)(source))

    with pytest.raises(engine.RequestTimeoutError, match=r"0\.0"):
        run()
    wait_until(lambda: fake.num_aborted == 1)
    fake.close()


def test_no_timer_is_left_behind(fake: FakeEngine) -> None:
    before = threading.active_count()
    list(LocalLLM(engine=fake, timeout=60).stream_chat(USER))
    wait_until(lambda: threading.active_count() == before)


def test_closed_engine_fails_waiting_and_later_calls() -> None:
    fake = slow_fake()
    llm = slow_llm(fake)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(llm.chat, USER)
        wait_until(lambda: bool(fake.requests))
        fake.close()
        with pytest.raises(engine.EngineClosedError):
            waiting.result(5)
    with pytest.raises(engine.EngineClosedError):
        llm.chat(USER)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_stream_that_failed_is_freed_with_its_engine(is_async: bool) -> None:
    """The error of a request leads, by its traceback, to the stream that raised it."""
    failed = engine_of_a_failed_stream(is_async)
    gc.collect()
    assert failed() is None


def engine_of_a_failed_stream(is_async: bool) -> weakref.ref[FakeEngine]:
    fake = slow_fake()
    llm = slow_llm(fake)

    async def drain_async() -> None:
        async for _ in await llm.astream_chat(USER):
            fake.close()

    def drain() -> None:
        for _ in llm.stream_chat(USER):
            fake.close()

    with pytest.raises(engine.EngineClosedError):
        asyncio.run(drain_async()) if is_async else drain()
    fake._thread.join(5)
    return weakref.ref(fake)


def test_failing_batch_member_aborts_the_others() -> None:
    fake = slow_fake()

    def fail_later(prompt: str, _params: engine.SamplingParams) -> str:
        return "" if "empty" in prompt else LONG

    fake.answer = fail_later
    llm = slow_llm(fake, timeout=0.05)
    with pytest.raises(engine.RequestTimeoutError):
        llm.batch_complete(["empty", "long one", "long two"])
    wait_until(lambda: fake.num_aborted == 2)
    fake.close()
