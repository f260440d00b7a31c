"""Waiting for one request: threads that come early, late, together, and from inside."""

import asyncio
import threading
import time

import pytest
from core_fakes import make_request

from engine.errors import RequestTimeoutError, StepError
from engine.handle import ReaderClock, RequestHandle, wake_loops
from engine.outputs import CompletionOutput, Delta, RequestMetrics, RequestOutput, Usage
from engine.progress import wait_for_all


@pytest.fixture
def aborted():
    return []


@pytest.fixture
def handle(aborted):
    return RequestHandle(make_request(None, [1]), aborted.append, lambda request: None)


def output(text="done"):
    return RequestOutput(
        "r", None, [1], [CompletionOutput(0, text, [2])], Usage(1, 1), RequestMetrics(0.0)
    )


def test_a_result_that_is_there_makes_nobody_wait(handle):
    handle.publish(output=output())
    assert handle.result().outputs[0].text == "done"
    assert handle.wait(0.0)
    assert [delta.text for delta in handle] == ["done"]
    assert handle._condition is None


def test_all_waiting_threads_get_the_result(handle):
    found = []
    threads = [threading.Thread(target=lambda: found.append(handle.result())) for _ in range(5)]
    threads += [threading.Thread(target=lambda: found.append(list(handle))) for _ in range(3)]
    for thread in threads:
        thread.start()
    deadline_s = time.monotonic() + 5.0
    while handle._num_readers < 8 and time.monotonic() < deadline_s:
        time.sleep(0.001)
    handle.publish(deltas=[Delta(0, "do", [2])])
    handle.publish(deltas=[Delta(0, "ne", [3])], output=output())
    for thread in threads:
        thread.join(5.0)
        assert not thread.is_alive()
    texts = ["".join(d.text for d in one) if isinstance(one, list) else "done" for one in found]
    assert texts == ["done"] * 8


def test_time_limits(handle, aborted):
    assert not handle.wait(0.01)
    assert aborted == []
    with pytest.raises(RequestTimeoutError, match=r"0\.01 s"):
        handle.result(timeout=0.01)
    assert aborted == [handle._request]
    handle.publish(output=output())
    assert handle.wait()
    handle.abort()
    assert len(aborted) == 1


def test_a_stream_collected_while_its_handle_is_locked(handle):
    """The garbage collector may end a forgotten stream in the very thread that publishes."""
    stream = iter(handle)

    class Deltas(list):
        def __iter__(self):
            stream.close()
            return super().__iter__()

    reader = threading.Thread(target=next, args=(stream,), daemon=True)
    reader.start()
    deadline_s = time.monotonic() + 5.0
    while handle._num_readers < 1 and time.monotonic() < deadline_s:
        time.sleep(0.001)
    handle.publish(deltas=[Delta(0, "a", [2])])
    reader.join(5.0)
    publisher = threading.Thread(
        target=handle.publish, args=(Deltas([Delta(0, "b", [3])]),), daemon=True
    )
    publisher.start()
    publisher.join(5.0)
    assert not publisher.is_alive()
    assert handle._num_readers == 0


def handles(count, aborted):
    return [
        RequestHandle(make_request(None, [1]), aborted.append, lambda request: None)
        for _ in range(count)
    ]


def in_thread(function):
    """A started thread, and a list that gets what `function` returned or raised."""
    found = []

    def run():
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, found


def test_a_list_is_waited_for_with_one_wake_up(aborted, monkeypatch):
    many = handles(50, aborted)
    for index in (3, 7):
        many[index].publish(output=output(str(index)))  # done before anybody waits
    wake_ups = []
    whole = threading.Event.set
    monkeypatch.setattr(threading.Event, "set", lambda self: (wake_ups.append(1), whole(self))[1])
    thread, found = in_thread(lambda: wait_for_all(many, use_tqdm=False))
    deadline_s = time.monotonic() + 5.0
    while many[-1]._on_end is None and time.monotonic() < deadline_s:
        time.sleep(0.001)
    wake_ups.clear()
    for index in reversed(range(50)):
        many[index].publish(output=output(str(index)))
    thread.join(5.0)
    assert [one.outputs[0].text for one in found[0]] == [str(index) for index in range(50)]
    assert wake_ups == [1]
    assert aborted == []


def test_the_first_error_ends_the_wait_for_a_list(aborted):
    many = handles(3, aborted)
    thread, found = in_thread(lambda: wait_for_all(many, use_tqdm=False))
    many[2].publish(error=StepError("the third failed"))
    thread.join(5.0)
    assert isinstance(found[0], StepError)
    assert aborted == [many[0]._request, many[1]._request]


def test_nothing_to_wait_for():
    assert wait_for_all([], use_tqdm=False) == []


def test_the_end_is_told_once_and_at_once_where_it_is_past(handle):
    told = []
    handle.call_at_end(told.append)
    handle.publish(deltas=[Delta(0, "do", [2])])
    assert told == []
    handle.publish(output=output())
    handle.publish(error=StepError("too late"))
    assert told == [handle]
    handle.call_at_end(told.append)
    assert told == [handle, handle]
    assert not handle.has_failed


@pytest.mark.parametrize("num_loops", [1, 2])
def test_readers_in_loops_are_measured_for_streams_alone(aborted, num_loops):
    """What an awaiting task does with its answer is not the streams' time."""
    clock = ReaderClock()
    streamed, awaited = handles(2 * num_loops, aborted), handles(num_loops, aborted)

    def burn(seconds):
        end_s = time.thread_time() + seconds
        while time.thread_time() < end_s:
            pass

    async def read(handle):
        async for _ in handle:
            burn(0.005)

    async def wait(handle):
        await handle
        burn(0.05)

    def run(place):
        async def all_of_it():
            mine = streamed[2 * place : 2 * place + 2]
            await asyncio.gather(*map(read, mine), wait(awaited[place]))

        asyncio.run(all_of_it())

    threads = [in_thread(lambda place=place: run(place))[0] for place in range(num_loops)]
    deadline_s = time.monotonic() + 5.0
    while not all(one._futures for one in streamed + awaited) and time.monotonic() < deadline_s:
        time.sleep(0.001)
    futures = []
    for one in streamed + awaited:
        futures += one.publish(deltas=[Delta(0, "a", [2])], output=output("a"))
    wake_loops(futures, clock)
    for thread in threads:
        thread.join(10.0)
        assert not thread.is_alive()
    assert clock.read()[1] == 2 * num_loops
    assert 0.01 * num_loops <= clock.read()[0] < 0.04 * num_loops
