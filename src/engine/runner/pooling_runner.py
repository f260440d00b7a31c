"""`PoolingRunner`: runs one `PoolingBatch` on the device and hands back its vectors.

On a GPU `execute` only launches: the inputs go up in one copy, the vectors come back to pinned
memory, so that the host lays out the next batch meanwhile. Batches are large and no two alike, so
steps run eagerly: some hundred launches for thousands of tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from engine.core.pooling_request import PoolingBatch
from engine.kernels.packed_texts import PackedTexts
from engine.models.pooled_model import PooledModel
from engine.runner.free_cores import ThreadChooser


class PendingVectors:
    """A launched step (see `engine.loop.PendingStep`).

    Args:
        vectors: [B, width] float32 on the host; pinned memory that the device fills where `done` is
            given.
        done: Recorded after the copy; None on a CPU.
        keep: Inputs that must live until the device has read them.
    """

    __slots__ = ("_done", "_keep", "_vectors")

    def __init__(
        self,
        vectors: torch.Tensor,
        done: torch.cuda.Event | None = None,
        keep: torch.Tensor | None = None,
    ) -> None:
        self._vectors = vectors
        self._done = done
        self._keep = keep

    @property
    def is_done(self) -> bool:
        """True once `wait` would not block."""
        return self._done is None or bool(self._done.query())

    def wait(self) -> npt.NDArray[np.float32]:
        """The vectors, when the device has finished the step.

        Raises:
            RuntimeError: The device reported an error (torch's own exception).
        """
        if self._done is not None:
            self._done.synchronize()
        array: npt.NDArray[np.float32] = self._vectors.numpy()
        return array


class PoolingRunner:
    """Runs batches on one device; used by the engine thread alone.

    Args:
        model: With its weights loaded.
        device: The model's.
        num_threads: As in `EngineConfig`.
    """

    def __init__(self, model: PooledModel, device: torch.device, num_threads: int | None) -> None:
        self._model: PooledModel | None = model
        self._device = device
        self.threads = None if device.type == "cuda" else ThreadChooser(num_threads)

    def execute(self, batch: PoolingBatch) -> PendingVectors:
        """Launch one step; on a CPU, run it.

        Raises:
            RuntimeError: torch's own exception; the texts of `batch` must be ended.
        """
        assert self._model is not None, "nothing runs after close"
        if self.threads is not None:
            self.threads.adjust()
        starts = np.zeros(batch.num_texts + 1, dtype=np.int64)
        np.cumsum(batch.lens, out=starts[1:])
        positions = np.arange(batch.num_tokens) - np.repeat(starts[:-1], batch.lens)
        types = positions >= np.repeat(batch.second_starts, batch.lens)
        flat = torch.from_numpy(np.concatenate((batch.token_ids, positions, types, starts)))
        if self._device.type == "cuda":
            flat = flat.pin_memory()
        on_device = flat.to(self._device, non_blocking=True)
        num_tokens = batch.num_tokens
        input_ids, positions_on_device, token_types, starts_on_device = on_device.split(
            (num_tokens, num_tokens, num_tokens, batch.num_texts + 1)
        )
        texts = PackedTexts(
            lens_host=batch.lens.tolist(),
            starts=starts_on_device.to(torch.int32),
            positions=positions_on_device,
            device=self._device,
        )
        vectors = self._model.forward(input_ids, token_types, texts)
        if self._device.type != "cuda":
            return PendingVectors(vectors)
        on_host = torch.empty(vectors.shape, dtype=torch.float32, pin_memory=True)
        on_host.copy_(vectors, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return PendingVectors(on_host, done, flat)

    def free_row(self, row: int) -> None:
        """Nothing is kept of a text."""

    def check_health(self) -> None:
        """Raise torch's error if the device can no longer be used, as after an illegal access."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        """Drop the model; nothing may be called afterwards."""
        self._model = None
