"""How an engine's thread begins and how an engine ends: what it sets, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from engine.build import device_context, return_stream
from engine.config import ResolvedConfig
from engine.model_text import ModelText
from engine.runner.free_cores import ThreadChooser


class LoopRunner(Protocol):
    """What beginning and end need of a runner."""

    threads: ThreadChooser | None

    def close(self) -> None:
        """Drop everything on the device."""


class LoopParts(Protocol):
    """What an engine loop works with: `EngineParts` or `PoolingParts`."""

    @property
    def resolved(self) -> ResolvedConfig:
        """What the options came to."""

    @property
    def text(self) -> ModelText:
        """The model's text side."""

    @property
    def runner(self) -> LoopRunner:
        """Runs steps."""

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """The engine's own; None on a CPU."""

    def release_model(self) -> None:
        """Drop the weights."""


def thread_setup(parts: LoopParts) -> Callable[[Callable[[], None]], None]:
    """What the engine thread sets for itself alone before it runs the loop.

    Returns:
        A function that takes the loop's body and runs it inside. It keeps no reference to `parts`,
        so that a forgotten engine can be collected while its thread waits.
    """
    device, stream = parts.resolved.device, parts.stream
    threads = parts.runner.threads

    def run_inside(body: Callable[[], None]) -> None:
        if threads is not None:
            threads.start()
        with device_context(device, stream), torch.inference_mode():
            body()

    return run_inside


def free_parts(parts: LoopParts) -> None:
    """Drop weights, KV cache and graphs, and give the GPU's memory back to the driver."""
    parts.runner.close()
    parts.release_model()
    device = parts.resolved.device
    if parts.stream is not None:
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return_stream(device, parts.stream)
