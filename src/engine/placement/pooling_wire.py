"""Texts to embed or score, and their vectors, on the socket to the child process: plain bytes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from engine.core.pooling_request import PoolingRequest
from engine.outputs import PoolingOutput, RequestMetrics, Usage


class PoolingRecord(NamedTuple):
    """A request on its way to the child; fields as in `PoolingRequest`, arrays as int32 bytes."""

    number: int
    request_id: str
    token_ids: bytes
    lens: bytes
    second_starts: bytes | None
    arrival_s: float


def encode_pooling_request(number: int, request: PoolingRequest) -> PoolingRecord:
    """The request under the number that both sides know it by."""
    second_starts = request.second_starts
    return PoolingRecord(
        number,
        request.request_id,
        request.token_ids.tobytes(),
        request.lens.tobytes(),
        None if second_starts is None else second_starts.tobytes(),
        request.metrics.arrival_s,
    )


def decode_pooling_request(record: PoolingRecord) -> PoolingRequest:
    """The request as it was."""
    second_starts = record.second_starts
    return PoolingRequest(
        token_ids=np.frombuffer(record.token_ids, np.int32),
        lens=np.frombuffer(record.lens, np.int32),
        second_starts=None if second_starts is None else np.frombuffer(second_starts, np.int32),
        request_id=record.request_id,
        metrics=RequestMetrics(arrival_s=record.arrival_s),
    )


def encode_pooling_output(output: PoolingOutput) -> tuple[Any, ...]:
    """What the child adds to a request."""
    metrics = output.metrics
    return (
        output.vectors.shape[1],
        output.vectors.tobytes(),
        (metrics.arrival_s, metrics.first_scheduled_s, metrics.first_token_s, metrics.finished_s),
    )


def decode_pooling_output(request: PoolingRequest, record: tuple[Any, ...]) -> PoolingOutput:
    """The output of `request`."""
    width, vectors, metrics = record
    request.metrics = RequestMetrics(*metrics)
    return PoolingOutput(
        # Owned and writable, as without a process between.
        vectors=np.frombuffer(vectors, np.float32).reshape(-1, width).copy(),
        usage=Usage(prompt_tokens=request.num_tokens, completion_tokens=0),
        metrics=request.metrics,
    )
