"""Messages between an engine and its child process: whole, in order, merged, never in the way."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from engine import (
    CompletionOutput,
    ConfigError,
    Delta,
    EngineDeadError,
    EngineError,
    Logprob,
    ModelNotFoundError,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    Usage,
)
from engine.constraints.compiler import ConstraintCompiler
from engine.core.request import Request
from engine.placement.channel import MessageReader, MessageWriter
from engine.placement.outbox import Outbox
from engine.placement.wire import (
    decode_deltas,
    decode_error,
    decode_output,
    decode_request,
    encode_deltas,
    encode_error,
    encode_output,
    encode_request,
)
from engine.prompts import add_sequences

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ends = socket.socketpair()
    yield ends
    for end in ends:
        end.close()


def read_all(sock: socket.socket) -> list[tuple[Any, ...]]:
    reader = MessageReader(sock)
    found = []
    while (messages := reader.read()) is not None:
        found += messages
    return found


# -------------------------------------------------------------------- the stream


def test_messages_of_all_sizes_arrive_whole_and_in_order(pair: Pair) -> None:
    sizes = [0, 1, 100, 1 << 18, (1 << 18) - 40, 3 << 20, 7]

    def write() -> None:
        writer = MessageWriter(pair[0])
        for size in sizes:
            writer.write((size, b"x" * size))
        pair[0].shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=write)
    thread.start()
    found = read_all(pair[1])
    thread.join()
    assert [message[0] for message in found] == sizes
    assert all(message == (size, b"x" * size) for message, size in zip(found, sizes, strict=True))


class Interrupted:
    """A socket that sends a few bytes at a time and is interrupted before the `at`-th piece."""

    def __init__(self, sock: socket.socket, at: int) -> None:
        self.sock, self.at, self.num_calls = sock, at, 0

    def send(self, data: memoryview) -> int:
        self.num_calls += 1
        if self.num_calls == self.at:
            raise KeyboardInterrupt
        return self.sock.send(data[:7])


@pytest.mark.parametrize("at", [1, 2, 4])
def test_an_interrupted_write_leaves_the_stream_whole(pair: Pair, at: int) -> None:
    writer = MessageWriter(Interrupted(pair[0], at))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        writer.write(("first", "message"))
    writer.write(("second",))
    pair[0].close()
    assert read_all(pair[1]) == [("first", "message"), ("second",)]


def test_writing_to_nobody_is_no_error(pair: Pair) -> None:
    pair[1].close()
    writer = MessageWriter(pair[0])
    writer.write(("a",))
    writer.write(("b",))


# -------------------------------------------------------------------- the outbox


def test_one_message_per_flush(pair: Pair) -> None:
    outbox = Outbox(pair[0])
    for number in range(3):
        outbox.reply(number, [Delta(0, "a", [number])], None, None)
    outbox.flush()
    outbox.flush()
    outbox.send("stats", 5)
    pair[0].close()
    replies, stats = read_all(pair[1])
    assert replies[0] == "replies"
    assert [record[0] for record in replies[1]] == [0, 1, 2]
    assert stats == ("stats", 5)


def test_nobody_waits_for_a_parent_that_does_not_read(pair: Pair) -> None:
    """Steps go on; what the socket does not take melts into one reply per request."""
    num_steps, num_requests = 2000, 16
    outbox = Outbox(pair[0])
    for step in range(num_steps):
        for number in range(num_requests):
            outbox.reply(number, [Delta(0, "word ", [step])], None, None)
        outbox.flush()
    reader = threading.Thread(target=lambda: found.extend(read_all(pair[1])))
    found: list[tuple[Any, ...]] = []
    reader.start()
    outbox.finish("ended")
    pair[0].shutdown(socket.SHUT_WR)
    reader.join()
    assert found[-1] == ("ended",)
    # The socket's buffer holds some hundred small messages; the rest came in a few large ones.
    assert len(found) < num_steps / 2
    tokens: dict[int, list[int]] = {number: [] for number in range(num_requests)}
    for _, records in found[:-1]:
        for number, deltas, _, _ in records:
            assert len(deltas) == 1
            tokens[number] += decode_deltas(deltas, None)[0].token_ids
    assert all(ids == list(range(num_steps)) for ids in tokens.values())


# -------------------------------------------------------------------- values


def some_request(**options: Any) -> Request:
    fields: dict[str, Any] = {
        "request_id": "r",
        "prompt": "text",
        "prompt_token_ids": [1, 2, 70_000],
        "params": SamplingParams(n=2, stop=["x"], logit_bias={5: 1.0}),
        "stop_token_ids": frozenset({2}),
        "max_total_tokens": 9,
        "seed": (1 << 64) - 1,
        "priority": -3,
        "cache_salt": "salt",
        "bad_words_ids": [[1], [2, 3]],
        "metrics": RequestMetrics(arrival_s=1.5),
    }
    request = Request(**{**fields, **options})
    add_sequences(request)
    return request


def test_a_request_arrives_as_it_was() -> None:
    sent = some_request()
    found = decode_request(encode_request(7, sent), ConstraintCompiler(None, 8, ()))
    # The prompt's text stays at home: the child never looks at it.
    stays = {"prompt", "sequences", "prompt_logprobs", "_prompt_array"}
    for name in set(Request.__slots__) - stays:
        assert getattr(found, name) == getattr(sent, name), name
    assert [seq.needs_host_sync for seq in found.sequences] == [True, True]
    assert found.prompt is None


def test_an_output_arrives_as_it_was() -> None:
    request = some_request()
    logprobs = [{5: Logprob(-0.5, 1, "a"), 6: Logprob(-1.5, 2, "b")}]
    output = RequestOutput(
        request_id="r",
        prompt="text",
        prompt_token_ids=[1, 2, 70_000],
        outputs=[
            CompletionOutput(0, "a", [5], "stop", "x", logprobs, -0.5),
            CompletionOutput(1, "b", [6], "length"),
        ],
        usage=Usage(3, 2, 1),
        metrics=RequestMetrics(1.5, 2.5, 3.5, 4.5, 6),
        prompt_logprobs=[None, *logprobs],
    )
    found = decode_output(request, encode_output(output))
    assert found == output
    deltas = [Delta(0, "a", [5], None, None, logprobs), Delta(1, "b", [6], "length")]
    arrived = decode_deltas(encode_deltas(deltas), None)
    assert arrived == deltas
    last = decode_deltas(encode_deltas(deltas), found)[-1]
    assert (last.usage, last.metrics) == (output.usage, output.metrics)


class StrangeError(Exception):
    """As a library might raise one that the parent has not imported."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConfigError("a=1 is bad"), ConfigError),
        (ModelNotFoundError("nowhere"), ModelNotFoundError),
        (ZeroDivisionError("planted"), ZeroDivisionError),
        (StrangeError("odd"), EngineError),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), EngineError),
    ],
)
def test_errors_keep_class_message_notes_and_causes(
    error: Exception, kind: type[BaseException]
) -> None:
    error.add_note("a note")
    try:
        raise EngineDeadError("it ended") from error
    except EngineDeadError as raised:
        found = decode_error(encode_error(raised))
    assert type(found) is EngineDeadError
    assert str(found) == "it ended"
    cause = found.__cause__
    assert cause is not None
    assert type(cause) is kind
    assert str(error) in str(cause)
    assert cause.__notes__ == ["a note"]
    if kind is EngineError or not isinstance(error, EngineError):
        assert type(error).__name__ in str(cause.__cause__)
