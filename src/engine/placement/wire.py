"""What crosses the socket between an engine and its child process, as tuples of plain values.

Tuples, because pickle writes and reads them several times faster than objects. Token ids of prompts
travel as int32 bytes. What the parent has already (the prompt, its ids) never comes back.
"""

from __future__ import annotations

import builtins
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

import engine.errors
from engine.constraints.compiler import ConstraintCompiler
from engine.core.pooling_request import PoolingRequest
from engine.core.request import Request
from engine.errors import EngineError
from engine.outputs import (
    CompletionOutput,
    Delta,
    Logprob,
    PoolingOutput,
    RequestMetrics,
    RequestOutput,
    Usage,
)
from engine.placement.pooling_wire import (
    PoolingRecord,
    decode_pooling_output,
    decode_pooling_request,
    encode_pooling_output,
    encode_pooling_request,
)
from engine.prompts import add_sequences
from engine.sampling_params import SamplingParams


class SubmitRecord(NamedTuple):
    """A request on its way to the child; fields as in `Request`."""

    number: int
    request_id: str
    prompt_ids: bytes
    params: SamplingParams
    stop_token_ids: frozenset[int]
    max_total_tokens: int
    seed: int
    priority: int
    cache_salt: str | None
    bad_words_ids: Sequence[list[int]]
    arrival_s: float


AnyRecord = SubmitRecord | PoolingRecord
AnyOutput = RequestOutput | PoolingOutput


def encode_request(number: int, request: Request | PoolingRequest) -> AnyRecord:
    """The request under the number that both sides know it by."""
    if isinstance(request, PoolingRequest):
        return encode_pooling_request(number, request)
    return SubmitRecord(
        number,
        request.request_id,
        request.prompt_array().tobytes(),
        request.params,
        request.stop_token_ids,
        request.max_total_tokens,
        request.seed,
        request.priority,
        request.cache_salt,
        request.bad_words_ids,
        request.metrics.arrival_s,
    )


def decode_request(record: AnyRecord, compiler: ConstraintCompiler) -> Request | PoolingRequest:
    """The request as it was, but for the prompt's text. The monotonic clock is the machine's.

    Constraints are compiled on either side: their objects cannot travel.
    """
    if isinstance(record, PoolingRecord):
        return decode_pooling_request(record)
    prompt_array = np.frombuffer(record.prompt_ids, np.int32)
    request = Request(
        request_id=record.request_id,
        prompt_token_ids=prompt_array.tolist(),
        params=record.params,
        stop_token_ids=record.stop_token_ids,
        max_total_tokens=record.max_total_tokens,
        seed=record.seed,
        priority=record.priority,
        cache_salt=record.cache_salt,
        bad_words_ids=record.bad_words_ids,
        constraint=compiler.compile(record.params),
        metrics=RequestMetrics(arrival_s=record.arrival_s),
    )
    request.set_prompt_array(prompt_array)
    add_sequences(request)
    return request


# -------------------------------------------------------------------- log probabilities


def _encode_logprobs(positions: Any) -> Any:
    if positions is None:
        return None
    return [
        at
        and [(token_id, one.logprob, one.rank, one.decoded_token) for token_id, one in at.items()]
        for at in positions
    ]


def _decode_logprobs(positions: Any) -> Any:
    if positions is None:
        return None
    return [
        at and {token_id: Logprob(value, rank, text) for token_id, value, rank, text in at}
        for at in positions
    ]


# -------------------------------------------------------------------- deltas and outputs


def encode_deltas(deltas: Sequence[Delta]) -> list[tuple[Any, ...]]:
    """Deltas as tuples, without usage and metrics, which come with the output."""
    return [
        (
            delta.index,
            delta.text,
            delta.token_ids,
            delta.finish_reason,
            delta.stop_reason,
            _encode_logprobs(delta.logprobs),
        )
        for delta in deltas
    ]


def decode_deltas(records: list[tuple[Any, ...]], output: AnyOutput | None) -> list[Delta]:
    """The deltas; the last one of a finished request has its usage and metrics."""
    deltas = [
        Delta(index, text, token_ids, finish_reason, stop_reason, _decode_logprobs(logprobs))
        for index, text, token_ids, finish_reason, stop_reason, logprobs in records
    ]
    if output is not None and deltas:
        deltas[-1].usage = output.usage
        deltas[-1].metrics = output.metrics
    return deltas


def encode_output(output: AnyOutput) -> tuple[Any, ...]:
    """What the child adds to a request."""
    if isinstance(output, PoolingOutput):
        return encode_pooling_output(output)
    usage, metrics = output.usage, output.metrics
    return (
        [
            (
                answer.index,
                answer.text,
                answer.token_ids,
                answer.finish_reason,
                answer.stop_reason,
                _encode_logprobs(answer.logprobs),
                answer.cumulative_logprob,
            )
            for answer in output.outputs
        ],
        (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens),
        (
            metrics.arrival_s,
            metrics.first_scheduled_s,
            metrics.first_token_s,
            metrics.finished_s,
            metrics.num_preemptions,
        ),
        _encode_logprobs(output.prompt_logprobs),
    )


def decode_output(request: Request | PoolingRequest, record: tuple[Any, ...]) -> Any:
    """The output of `request`: a `RequestOutput`, or a `PoolingOutput`."""
    if isinstance(request, PoolingRequest):
        return decode_pooling_output(request, record)
    answers, usage, metrics, prompt_logprobs = record
    request.metrics = RequestMetrics(*metrics)
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        outputs=[
            CompletionOutput(index, text, ids, finish, stop, _decode_logprobs(logprobs), total)
            for index, text, ids, finish, stop, logprobs, total in answers
        ],
        usage=Usage(*usage),
        metrics=request.metrics,
        prompt_logprobs=_decode_logprobs(prompt_logprobs),
    )


# -------------------------------------------------------------------- errors


class ChildTraceback(Exception):
    """Where in the child process an error was raised; its text is the traceback."""

    def __str__(self) -> str:
        return "".join(self.args)


class ErrorRecord(NamedTuple):
    """An exception in plain values.

    Attributes:
        name: Its class, without the module.
        message: Its text.
        trace: The traceback in the child.
        notes: As added with `add_note`.
        cause: Its `__cause__`.
    """

    name: str
    message: str
    trace: str
    notes: list[str]
    cause: Any


def encode_error(error: BaseException) -> ErrorRecord:
    """The error with its causes."""
    trace = "".join(traceback.format_exception(error, chain=False))
    cause = error.__cause__
    return ErrorRecord(
        type(error).__name__,
        str(error),
        trace,
        list(getattr(error, "__notes__", ())),
        None if cause is None else encode_error(cause),
    )


def decode_error(record: Any) -> BaseException:
    """The error again, where its class is one of the engine's or of Python's own.

    Any other class (of torch, of CUDA) is not worth an import here: an `EngineError` that names it
    stands in.
    """
    name, message, trace, notes, cause = record
    error = _same_class(name, message)
    is_stand_in = error is None
    if error is None:
        error = EngineError(f"{name}: {message}")
    for note in notes:
        error.add_note(note)
    if cause is not None:
        error.__cause__ = decode_error(cause)
    elif is_stand_in or not isinstance(error, EngineError):
        error.__cause__ = ChildTraceback(f"\n{trace}")
    return error


def _same_class(name: str, message: str) -> BaseException | None:
    kind = getattr(engine.errors, name, None) or getattr(builtins, name, None)
    if not isinstance(kind, type) or not issubclass(kind, BaseException):
        return None
    try:
        return kind(message)
    except TypeError:  # UnicodeDecodeError and its like want more than a message
        return None
