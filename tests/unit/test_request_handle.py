"""Waiting for one request: threads that come early, late, together, and from inside."""

import threading
import time

import pytest
from core_fakes import make_request

from engine.errors import RequestTimeoutError
from engine.handle import RequestHandle
from engine.outputs import CompletionOutput, Delta, RequestMetrics, RequestOutput, Usage


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
