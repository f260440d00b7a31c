"""Handles and engines from beginning to end: waiting, streaming, aborting, failing, closing."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stalls import least_pause

from engine import (
    ConfigError,
    Delta,
    Engine,
    EngineClosedError,
    EngineDeadError,
    EngineStats,
    RequestHandle,
    RequestTimeoutError,
    SamplingParams,
    StepError,
)

PLACEMENTS = ["thread", "process"]
LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
SHORT = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        if condition():
            return True
        time.sleep(0.005)
    return condition()


def no_blocks_held(engine: Engine) -> bool:
    stats = engine.stats()
    return stats.kv_blocks_used == 0 and stats.running == 0 and stats.waiting == 0


@pytest.fixture(params=PLACEMENTS)
def either(
    request: pytest.FixtureRequest,
    engine_in: Callable[[str], Engine],
) -> Iterator[Engine]:
    """An engine in a thread, fresh, or in a process, the module's; every KV block free after."""
    if request.param == "thread":
        engine = request.getfixturevalue("tiny_engine")
    else:
        engine = engine_in("process")
    yield engine
    assert eventually(lambda: no_blocks_held(engine))


@pytest.fixture
def before(either: Engine) -> EngineStats:
    """The counts that a test starts with."""
    return either.stats()


@pytest.fixture(params=PLACEMENTS)
def make_engine(request: pytest.FixtureRequest, tiny_llama: Path) -> Callable[..., Engine]:
    """Makes engines that the test closes."""

    def make(**options: Any) -> Engine:
        return Engine(
            str(tiny_llama), device="cpu", num_threads=1, placement=request.param, **options
        )

    return make


def texts(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


# -------------------------------------------------------------------- streams


def test_a_stream_is_the_answer_in_pieces(either: Engine) -> None:
    whole = either.generate("in the", LONG).outputs[0]
    deltas = list(either.submit("in the", LONG))
    assert texts(deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == "length"
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.completion_tokens == 400
    assert len(deltas) > 10


def test_a_stream_started_late_catches_up(either: Engine) -> None:
    handle = either.submit("in the", SHORT)
    output = handle.result()
    deltas = list(handle)
    assert texts(deltas) == output.outputs[0].text
    assert deltas[-1].usage == output.usage
    already = either.stats().output_tokens
    running = either.submit("in the", LONG)
    assert eventually(lambda: either.stats().output_tokens > already + 20)
    deltas = list(running)
    assert len(deltas[0].token_ids) > 1
    assert texts(deltas) == running.result().outputs[0].text


def test_two_readers_of_one_stream_see_everything(either: Engine) -> None:
    handle = either.submit("in the", LONG)
    found: list[list[Delta]] = [[], []]

    def read(index: int) -> None:
        found[index] += handle

    threads = [threading.Thread(target=read, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    expected = handle.result().outputs[0].text
    assert texts(found[0]) == texts(found[1]) == expected


def test_deltas_of_n_answers_carry_their_index(either: Engine) -> None:
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=12, n=3, ignore_eos=True)
    handle = either.submit("in the", params)
    deltas = list(handle)
    for answer in handle.result().outputs:
        mine = [delta for delta in deltas if delta.index == answer.index]
        assert texts(mine) == answer.text
        assert mine[-1].finish_reason == "length"
    assert [delta.usage is not None for delta in deltas].count(True) == 1
    assert deltas[-1].usage is not None


def test_leaving_a_stream_early_aborts(either: Engine, before: EngineStats) -> None:
    for delta in either.submit("in the", LONG):
        assert delta.token_ids
        break
    gc.collect()
    assert eventually(lambda: no_blocks_held(either))
    assert either.stats().requests_aborted == before.requests_aborted + 1


# -------------------------------------------------------------------- abort and time-outs


def test_abort_gives_what_was_generated(either: Engine, before: EngineStats) -> None:
    handle = either.submit("in the", LONG)
    assert eventually(lambda: either.stats().output_tokens > before.output_tokens + 5)
    handle.abort()
    handle.abort()
    output = handle.result(timeout=10)
    assert output.outputs[0].finish_reason == "abort"
    assert 0 < len(output.outputs[0].token_ids) < 400
    assert no_blocks_held(either)
    handle.abort()


def test_abort_of_a_waiting_request(make_engine: Callable[..., Engine]) -> None:
    with make_engine(max_num_seqs=1) as engine:
        first = engine.submit("in the", LONG)
        waiting = engine.submit("and the", SHORT)
        waiting.abort()
        assert waiting.result(timeout=10).outputs[0].finish_reason == "abort"
        assert waiting.result().outputs[0].token_ids == []
        first.abort()


def test_result_timeout_aborts(either: Engine) -> None:
    handle = either.submit("in the", LONG)
    with pytest.raises(RequestTimeoutError, match=r"not finished after 0\.01 s") as caught:
        handle.result(timeout=0.01)
    assert isinstance(caught.value, TimeoutError)
    assert eventually(lambda: no_blocks_held(either))


# -------------------------------------------------------------------- asyncio


def test_await_and_gather(either: Engine, before: EngineStats) -> None:
    async def main() -> list[Any]:
        # One hand-over, so that all run at once however slowly this thread gets to submit.
        handles = either.submit_many([f"in the {index}" for index in range(16)], SHORT)
        return await asyncio.gather(*handles)

    outputs = asyncio.run(main())
    assert [len(output.outputs[0].token_ids) for output in outputs] == [5] * 16
    # One batch: a step for each token. Two halves, one after the other, would take ten. A step is
    # counted after its results are out: the last one a little later, an earlier test's one here.
    assert eventually(lambda: either.stats().steps - before.steps >= 5)
    assert either.stats().steps - before.steps <= 6


def test_async_stream_equals_sync_stream(either: Engine) -> None:
    async def main() -> str:
        return texts([delta async for delta in either.submit("in the", LONG)])

    assert asyncio.run(main()) == either.generate("in the", LONG).outputs[0].text


def test_cancelling_the_awaiting_task_aborts(either: Engine, before: EngineStats) -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(either.submit("in the", LONG), 0.02)
        handle = either.submit("in the", LONG)
        task = asyncio.ensure_future(handle)
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert eventually(lambda: no_blocks_held(either))
    assert either.stats().requests_aborted == before.requests_aborted + 2


def test_leaving_an_async_stream_aborts(either: Engine) -> None:
    async def main() -> None:
        async for delta in either.submit("in the", LONG):
            assert delta.token_ids
            break

    asyncio.run(main())
    assert eventually(lambda: no_blocks_held(either))


def test_one_handle_in_several_loops_and_threads(either: Engine) -> None:
    handle = either.submit("in the", LONG)
    results: list[str] = []

    async def wait() -> None:
        results.append((await handle).outputs[0].text)

    async def stream() -> None:
        results.append(texts([delta async for delta in handle]))

    threads = [
        threading.Thread(target=lambda: asyncio.run(wait())),
        threading.Thread(target=lambda: asyncio.run(stream())),
        threading.Thread(target=lambda: results.append(handle.result().outputs[0].text)),
        threading.Thread(target=lambda: results.append(texts(list(handle)))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(results) == 4
    assert len(set(results)) == 1


def test_fifty_event_loops_one_after_the_other(either: Engine) -> None:
    async def ask() -> int:
        return len((await either.submit("in", SHORT)).outputs[0].token_ids)

    assert [asyncio.run(ask()) for _ in range(50)] == [5] * 50


def test_the_event_loop_is_never_blocked(either: Engine) -> None:
    async def main() -> None:
        await asyncio.gather(*(either.submit("in", LONG) for _ in range(8)))

    assert least_pause(main, 0.25) < 0.25


# -------------------------------------------------------------------- lists


def test_keyboard_interrupt_in_a_batch_leaves_the_engine_usable(
    either: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = RequestHandle.result
    calls = iter(range(100))

    def interrupted(self: RequestHandle, timeout: float | None = None) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return original(self, timeout)

    monkeypatch.setattr(RequestHandle, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        either.generate(["in", "the", "and"], LONG)
    monkeypatch.undo()
    assert eventually(lambda: no_blocks_held(either))
    assert len(either.generate("in", SHORT).outputs[0].token_ids) == 5


def test_list_in_list_out(either: Engine) -> None:
    one = either.generate("in the", SHORT)
    many = either.generate(["in the"], SHORT)
    assert one.outputs[0].token_ids == many[0].outputs[0].token_ids
    assert either.generate([], SHORT) == []
    per_prompt = [SHORT, SHORT.replace(max_tokens=2)]
    outputs = either.generate(["in", [5, 6]], per_prompt, use_tqdm=True)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [5, 2]
    assert [output.prompt for output in outputs] == ["in", None]
    chats = either.chat([[{"role": "user", "content": "in"}]] * 2, SHORT)
    single = either.chat([{"role": "user", "content": "in"}], SHORT)
    assert chats[1].outputs[0].token_ids == single.outputs[0].token_ids


# -------------------------------------------------------------------- failures


class FailingOnce:
    """Wraps a runner's `execute`: one call raises, the others go through."""

    def __init__(self, execute: Any, error: Exception) -> None:
        self.execute, self.error, self.is_armed = execute, error, False

    def __call__(self, batch: Any) -> Any:
        if self.is_armed:
            self.is_armed = False
            raise self.error
        return self.execute(batch)


def break_runner(engine: Engine, error: Exception) -> FailingOnce:
    parts = engine._host.parts
    assert parts is not None
    failing = FailingOnce(parts.runner.execute, error)
    parts.runner.execute = failing  # type: ignore[method-assign]
    return failing


def test_a_failed_step_ends_its_requests_and_nothing_else(tiny_engine: Engine) -> None:
    expected = tiny_engine.generate("in the", SHORT).outputs[0].token_ids
    failing = break_runner(tiny_engine, MemoryError("out of memory, says the test"))
    handles = tiny_engine.submit_many(["in the", "and"], LONG)
    assert eventually(lambda: tiny_engine.stats().output_tokens > 20)
    failing.is_armed = True
    for handle in handles:
        with pytest.raises(StepError, match="out of memory, says the test") as caught:
            handle.result(timeout=10)
        assert isinstance(caught.value.__cause__, MemoryError)
    assert no_blocks_held(tiny_engine)
    assert tiny_engine.generate("in the", SHORT).outputs[0].token_ids == expected
    assert tiny_engine.stats().requests_failed == 2


def test_a_dead_loop_tells_every_caller(tiny_llama: Path) -> None:
    engine = Engine(str(tiny_llama), device="cpu", num_threads=1)
    assert engine._host.parts is not None
    scheduler = engine._host.parts.scheduler
    waiting = engine.submit("in the", LONG)
    stream = iter(engine.submit("in the", LONG))
    next(stream)

    def broken() -> None:
        raise ZeroDivisionError("planted")

    scheduler.schedule = broken  # type: ignore[assignment, method-assign]
    for read in (lambda: waiting.result(timeout=10), lambda: list(stream)):
        with pytest.raises(EngineDeadError, match="ZeroDivisionError: planted") as caught:
            read()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(EngineDeadError):
        engine.submit("in the", SHORT)
    assert engine.is_closed
    engine.close()


# -------------------------------------------------------------------- closing


def test_close_drains_by_default(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    handle = engine.submit("in the", LONG)
    engine.close()
    assert len(handle.result(timeout=1).outputs[0].token_ids) == 400
    with pytest.raises(EngineClosedError, match="closed"):
        engine.submit("in", SHORT)
    engine.close()


@pytest.mark.parametrize("options", [{"drain": False}, {"drain": True, "timeout": 0.01}])
def test_close_without_draining(
    make_engine: Callable[..., Engine], options: dict[str, Any]
) -> None:
    engine = make_engine()
    handles = engine.submit_many(["in", "the"] * 4, LONG)
    engine.close(**options)
    for handle in handles:
        with pytest.raises(EngineClosedError):
            handle.result(timeout=10)


def test_leaving_the_with_block_by_an_error_does_not_wait(
    make_engine: Callable[..., Engine],
) -> None:
    handles = []

    def fail_inside() -> None:
        with make_engine() as engine:
            handles.append(engine.submit("in the", LONG))
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    with pytest.raises(EngineClosedError):
        handles[0].result(timeout=10)


def test_a_handle_keeps_its_engine_alive(make_engine: Callable[..., Engine]) -> None:
    handle = make_engine().submit("in the", LONG)
    gc.collect()
    assert len(handle.result(timeout=20).outputs[0].token_ids) == 400


def test_an_engine_nobody_holds_ends_its_thread(tiny_llama: Path) -> None:
    def engine_threads() -> set[int | None]:
        name = f"engine-{tiny_llama}"
        return {thread.ident for thread in threading.enumerate() if thread.name == name}

    before = engine_threads()
    engine = Engine(str(tiny_llama), device="cpu", num_threads=1)
    (mine,) = engine_threads() - before
    engine.generate("in", SHORT)
    del engine
    gc.collect()
    assert eventually(lambda: mine not in engine_threads())


def test_an_idle_engine_uses_no_cpu(tiny_engine: Engine) -> None:
    tiny_engine.generate("in", SHORT)
    time.sleep(0.05)
    before_s = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before_s < 0.05


_FORK = """
import os, sys
from engine import Engine, EngineClosedError, SamplingParams
engine = Engine(sys.argv[1], device="cpu", num_threads=1, placement=sys.argv[2])
params = SamplingParams(max_tokens=4, ignore_eos=True)
engine.generate("in", params)
pid = os.fork()
if pid == 0:
    try:
        engine.submit("in", params)
    except EngineClosedError as error:
        code = 0 if "forked" in str(error) and engine.is_closed else 2
    engine.close()
    sys.exit(code)
_, status = os.waitpid(pid, 0)
assert len(engine.generate("in", params).outputs[0].token_ids) == 4
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_forked_child_is_told_that_its_engine_is_elsewhere(
    tiny_llama: Path, placement: str
) -> None:
    options = ["-W", "ignore::DeprecationWarning", "-c"]
    done = subprocess.run(
        [sys.executable, *options, _FORK, str(tiny_llama), placement],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


# -------------------------------------------------------------------- sharing


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_shared_engines_are_one_and_counted(tiny_llama: Path, placement: str) -> None:
    options: dict[str, Any] = {"device": "cpu", "num_threads": 1, "placement": placement}
    found: list[Engine] = []
    threads = [
        threading.Thread(target=lambda: found.append(Engine.shared(str(tiny_llama), **options)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(engine is found[0] for engine in found)
    for _ in range(3):
        found[0].close()
    assert len(found[0].generate("in", SHORT).outputs[0].token_ids) == 5
    with pytest.raises(ConfigError, match=r"max_num_seqs: loaded with 256, asked for 8"):
        Engine.shared(str(tiny_llama), max_num_seqs=8, **options)
    other = {**options, "placement": PLACEMENTS[1 - PLACEMENTS.index(placement)]}
    with pytest.raises(ConfigError, match=f"placement: loaded with '{placement}', asked for"):
        Engine.shared(str(tiny_llama), **other)
    found[0].close()
    assert found[0].is_closed
    again = Engine.shared(str(tiny_llama), max_num_seqs=8, **options)
    assert again is not found[0]
    again.close()


# -------------------------------------------------------------------- interpreter exit

_EXIT = """
import sys, threading
from engine import Engine, SamplingParams
engine = Engine(sys.argv[1], device="cpu", num_threads=1, placement=sys.argv[2])
params = SamplingParams(max_tokens=400, ignore_eos=True)
handles = [engine.submit("in the", params) for _ in range(4)]
stream = iter(engine.submit("in the", params))
next(stream)
{ending}
"""


@pytest.mark.parametrize(
    ("ending", "code"),
    [("", 0), ("sys.exit(3)", 3), ("raise KeyError('planted')", 1)],
)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_interpreter_exit_with_requests_in_flight(
    tiny_llama: Path, ending: str, code: int, placement: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _EXIT.format(ending=ending), str(tiny_llama), placement],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code
    errors = done.stderr.replace("KeyError: 'planted'", "")
    assert "Fatal" not in errors
    assert "EngineClosedError" not in errors
    assert ("Traceback" in errors) == (code == 1)
