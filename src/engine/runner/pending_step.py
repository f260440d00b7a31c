"""`PendingStep`: a launched step, and what it will bring to the host."""

from __future__ import annotations

import time

import numpy as np
import torch

from engine.core.batch import StepOutput, TokenLogprobArrays
from engine.core.pieces import pieces
from engine.runner.step_slots import StepTicket

_POLL_S = 50e-6
_ASK_DEVICE_AFTER_S = 0.5


class PendingStep:
    """A launched step whose result may not be there yet.

    Args:
        token_ids: [R] int64 of the sampling sequences, on the host: pinned memory that the device
            fills where `done` is given.
        is_sampling: [B] bool.
        done: Recorded after the last copy; None on a CPU.
        logprobs: By row, for sampled tokens.
        prompt_logprobs: By row, for prompt tokens.
    """

    __slots__ = ("_done", "_is_sampling", "_logprobs", "_prompt_logprobs", "_token_ids")

    def __init__(
        self,
        token_ids: torch.Tensor,
        is_sampling: np.ndarray,
        done: torch.cuda.Event | None,
        logprobs: dict[int, DeviceLogprobs],
        prompt_logprobs: dict[int, DeviceLogprobs],
    ) -> None:
        self._token_ids = token_ids
        self._is_sampling = is_sampling
        self._done = done
        self._logprobs = logprobs
        self._prompt_logprobs = prompt_logprobs

    @property
    def is_done(self) -> bool:
        """True once `wait` would not block."""
        return self._done is None or bool(self._done.query())

    def wait(self) -> StepOutput:
        """The result, when the device has finished the step.

        Raises:
            RuntimeError: The device reported an error of this step (torch's own exception).
        """
        if self._done is not None:
            self._done.synchronize()
        token_ids = np.full(len(self._is_sampling), -1, dtype=np.int64)
        token_ids[self._is_sampling] = self._token_ids.numpy()
        return StepOutput(
            token_ids=token_ids,
            logprobs={row: values.to_host() for row, values in self._logprobs.items()},
            prompt_logprobs={
                row: values.to_host() for row, values in self._prompt_logprobs.items()
            },
        )


class CapturedPendingStep:
    """A captured step, whose results arrive in pinned memory without an event.

    Args:
        ticket: Where they arrive.
        is_sampling: [B] bool.
        stream: Asked for the device's errors when nothing arrives for long.
        logprobs: By row, for sampled tokens.
    """

    __slots__ = ("_is_sampling", "_logprobs", "_stream", "_ticket")

    def __init__(
        self,
        ticket: StepTicket,
        is_sampling: np.ndarray,
        stream: torch.cuda.Stream,
        logprobs: dict[int, DeviceLogprobs],
    ) -> None:
        self._ticket = ticket
        self._is_sampling = is_sampling
        self._stream = stream
        self._logprobs = logprobs

    @property
    def is_done(self) -> bool:
        """True once `wait` would not block. Costs microseconds and keeps the GIL."""
        return self._ticket.is_done(len(self._is_sampling))

    def wait(self) -> StepOutput:
        """The result, when the device has finished the step.

        Raises:
            RuntimeError: The device reported an error (torch's own exception).
        """
        started_s = time.monotonic()
        while not self.is_done:
            if time.monotonic() - started_s > _ASK_DEVICE_AFTER_S:
                # True and still nothing there: the step was never run.
                if self._stream.query() and not self.is_done:
                    msg = "the device is idle, but a launched step has brought no result"
                    raise RuntimeError(msg)
                started_s = time.monotonic()
            time.sleep(_POLL_S)
        token_ids = self._ticket.token_ids(len(self._is_sampling))
        for piece in pieces(len(token_ids)):
            token_ids[piece][~self._is_sampling[piece]] = -1
        return StepOutput(
            token_ids=token_ids,
            logprobs={row: values.to_host() for row, values in self._logprobs.items()},
        )


class DeviceLogprobs:
    """`TokenLogprobArrays` still on the device: [R, K+1] int64, [R, K+1] float32, [R] int64."""

    __slots__ = ("_ids", "_logprobs", "_ranks")

    def __init__(self, ids: torch.Tensor, logprobs: torch.Tensor, ranks: torch.Tensor) -> None:
        self._ids = ids
        self._logprobs = logprobs
        self._ranks = ranks

    def to_host(self) -> TokenLogprobArrays:
        """Copy to the host; waits for the device."""
        return TokenLogprobArrays(
            token_ids=self._ids.cpu().numpy(),
            logprobs=self._logprobs.cpu().numpy(),
            ranks=self._ranks.cpu().numpy(),
        )
