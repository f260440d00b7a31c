"""Concurrency: several loops and threads, cancellation, early exits, no blocked event loop."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from stalls import least_pause

from llm_connectors import _gathered


def text_of(answer):
    return getattr(answer, "content", answer)


async def until(condition):
    deadline = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.001)


def test_repeated_event_loops(model):
    for _ in range(3):
        assert text_of(asyncio.run(model.ainvoke("ab"))) == "ba"


def test_several_loops_and_threads_at_once(model):
    async def many(tag):
        answers = await asyncio.gather(*(model.ainvoke(f"{tag}{index}") for index in range(20)))
        return [text_of(one) for one in answers]

    def sync_many(tag):
        return [text_of(model.invoke(f"{tag}{index}")) for index in range(20)]

    with ThreadPoolExecutor(8) as pool:
        loops = [pool.submit(asyncio.run, many(tag)) for tag in "abcd"]
        threads = [pool.submit(sync_many, tag) for tag in "efgh"]
        for tag, future in zip("abcdefgh", loops + threads, strict=True):
            assert future.result(30) == [f"{tag}{index}"[::-1] for index in range(20)]


def test_sync_calls_inside_a_running_loop(model):
    """Notebooks and careless handlers do this; it blocks the loop, but must not dead-lock."""

    async def run():
        single = model.invoke("ab")
        many = model.batch(["ab", "cd"], {"max_concurrency": 1})
        return [text_of(one) for one in (single, *many)]

    assert asyncio.run(run()) == ["ba", "ba", "dc"]


@pytest.mark.parametrize("verb", ["ainvoke", "abatch", "astream"])
def test_cancelling_a_task_aborts_its_requests(model, fake_engine, verb):
    fake_engine.gate.clear()

    async def stream():
        async for _chunk in model.astream("ab"):
            pass

    async def run():
        work = {
            "ainvoke": lambda: model.ainvoke("ab"),
            "abatch": lambda: model.abatch(["ab", "cd"]),
            "astream": stream,
        }[verb]()
        task = asyncio.create_task(work)
        await until(lambda: len(fake_engine.requests) == (2 if verb == "abatch" else 1))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: len(fake_engine.aborted) == len(fake_engine.requests))

    asyncio.run(run())


def test_leaving_a_stream_early_aborts_it(model, fake_engine):
    fake_engine.step_s = 0.001
    for _chunk in model.stream("x" * 5000):
        break
    deadline = time.monotonic() + 5
    while len(fake_engine.aborted) < 1:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_leaving_an_async_stream_early_aborts_it(model, fake_engine):
    fake_engine.step_s = 0.001

    async def run():
        stream = model.astream("x" * 5000)
        async for _chunk in stream:
            break
        await stream.aclose()
        await until(lambda: len(fake_engine.aborted) == 1)

    asyncio.run(run())


@pytest.mark.parametrize("verb", ["ainvoke", "astream", "abatch"])
def test_the_loop_is_never_blocked(model, fake_engine, verb):
    fake_engine.step_s = 0.002

    async def stream():
        async for _chunk in model.astream("x" * 100):
            pass

    calls = {
        "ainvoke": lambda: model.ainvoke("x" * 100),
        "astream": stream,
        "abatch": lambda: model.abatch(["x" * 100] * 10),
    }
    # The work takes 0.2 s at least; a blocking wait would show as one gap of that length.
    assert least_pause(calls[verb], 0.15) < 0.15


def test_loading_does_not_block_the_loop(model_class, fake_engine, monkeypatch):
    loaded_in = []

    def slow_load(model, **options):
        loaded_in.append(threading.current_thread())
        time.sleep(0.3)
        return fake_engine

    import engine

    monkeypatch.setattr(engine, "Engine", type("E", (), {"shared": staticmethod(slow_load)}))

    async def run():
        model = model_class(model="slow-model")
        assert text_of(await model.ainvoke("ab")) == "ba"
        model.close()

    assert least_pause(run, 0.2) < 0.2
    assert threading.main_thread() not in loaded_in


def test_long_conversations_are_rendered_in_a_worker_thread(chat, fake_engine, monkeypatch):
    monkeypatch.setattr("llm_connectors._gathered.MAX_INLINE_CHARS", 10)
    asyncio.run(chat.ainvoke("short"))
    assert fake_engine.last_render.thread is threading.main_thread()
    assert asyncio.run(chat.ainvoke("a long conversation")).content == "a long conversation"[::-1]
    assert fake_engine.last_render.thread is not threading.main_thread()


def test_long_prompts_are_encoded_in_a_worker_thread(llm, fake_engine, monkeypatch):
    monkeypatch.setattr("llm_connectors.langchain.llms.MAX_INLINE_CHARS", 10)
    threads = []
    tokenize = fake_engine.tokenize

    def spy(text, **options):
        threads.append(threading.current_thread())
        return tokenize(text, **options)

    monkeypatch.setattr(fake_engine, "tokenize", spy)
    assert asyncio.run(llm.ainvoke("short")) == "trohs"
    assert threads == []
    assert asyncio.run(llm.ainvoke("a longer prompt")).rstrip("\x01") == "tpmorp regnol a"
    assert threads[0] is not threading.main_thread()
    assert _gathered.MAX_INLINE_CHARS > 1000
