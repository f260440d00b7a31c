"""`LoopHost`: an engine loop as a thread of this process; `LocalHost`: one that generates."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol, cast

from engine.build import build_parts, kv_bytes_per_token
from engine.config import EngineConfig, ResolvedConfig
from engine.core.capacity import CapacityLimits
from engine.core.output import OutputProcessor
from engine.core.scheduler_stats import SchedulerStats
from engine.ending import LoopParts, free_parts, thread_setup
from engine.handle import ReaderClock, RequestSink, Wakeups, wake_loops
from engine.loop import EngineLoop
from engine.model_text import ModelText
from engine.placement.host import HostFacts
from engine.stats import Counters, EngineStats
from engine.task import task_of

if TYPE_CHECKING:
    from engine.core.request import Request
    from engine.placement.host import AnyRequest


class CountingScheduler(Protocol):
    """A scheduler that can be asked for its counts by any thread."""

    def stats(self) -> SchedulerStats:
        """A snapshot."""


class LoopHost:
    """Owns a running loop and its parts; see `EngineHost`.

    Args:
        loop: Made, not started.
        parts: What it works with.
        scheduler: Of these parts.
        facts: For the engine's face.
        counters: The loop's.
        weight_bytes: Size of the weights.
        kv_cache_bytes: Size of the KV cache.

    Attributes:
        parts: None once they are freed.
        loop: The loop, for those who wait for its end.
    """

    def __init__(
        self,
        *,
        loop: EngineLoop,
        parts: LoopParts,
        scheduler: CountingScheduler,
        facts: HostFacts,
        counters: Counters,
        weight_bytes: int,
        kv_cache_bytes: int,
    ) -> None:
        self.parts: LoopParts | None = parts
        self.loop = loop
        self._resolved = parts.resolved
        self._text = parts.text
        self._scheduler = scheduler
        self._facts = facts
        self._counters = counters
        self._weight_bytes = weight_bytes
        self._kv_cache_bytes = kv_cache_bytes
        self._stop_lock = threading.Lock()
        loop.start(thread_setup(parts))

    @property
    def text(self) -> ModelText:
        """See `EngineHost`."""
        return self._text

    @property
    def facts(self) -> HostFacts:
        """See `EngineHost`."""
        return self._facts

    @property
    def resolved_config(self) -> ResolvedConfig:
        """See `EngineHost`."""
        return self._resolved

    @property
    def is_alive(self) -> bool:
        """See `EngineHost`."""
        return self.loop.is_alive

    def post_submit(self, pairs: Sequence[tuple[AnyRequest, RequestSink]]) -> None:
        """See `EngineHost`."""
        self.loop.post_submit(cast("Sequence[tuple[Request, RequestSink]]", pairs))

    def post_abort(self, request: AnyRequest) -> None:
        """See `EngineHost`."""
        self.loop.post_abort(cast("Request", request))

    def post_stream(self, request: AnyRequest) -> None:
        """See `EngineHost`."""
        self.loop.post_stream(cast("Request", request))

    def post_reset_prefix_cache(self) -> None:
        """See `EngineHost`."""
        self.loop.post_reset_prefix_cache()

    def stats(self) -> EngineStats:
        """See `EngineHost`; costs microseconds."""
        return self._counters.snapshot(
            self._scheduler.stats(),
            weight_bytes=self._weight_bytes,
            kv_cache_bytes=self._kv_cache_bytes,
            start_s=self._facts.start_s,
        )

    def stop(self, *, drain: bool, timeout: float | None) -> bool:
        """See `EngineHost`."""
        has_ended = self.loop.stop(drain=drain, timeout=timeout)
        with self._stop_lock:
            if has_ended and self.parts is not None:
                free_parts(self.parts)
                self.parts = None
        return has_ended


class LocalHost(LoopHost):
    """Builds the parts of an engine that generates and runs its loop in a thread.

    Args:
        config: Options of the engine; `placement` is not looked at.
        publish: Called by the engine thread once per step with the futures to complete; by default
            it completes them here.
    """

    def __init__(
        self, config: EngineConfig, publish: Callable[[Wakeups], None] | None = None
    ) -> None:
        readers = ReaderClock()
        started_s = time.monotonic()
        parts = build_parts(config)
        resolved = parts.resolved
        counters = Counters()
        loop = EngineLoop(
            name=config.model,
            scheduler=parts.scheduler,
            runner=parts.runner,
            outputs=OutputProcessor(
                parts.scheduler,
                parts.text.tokenizer,
                counters,
                parts.runner.free_row,
                readers.read,
            ),
            counters=counters,
            max_steps_in_flight=resolved.max_steps_in_flight,
            publish=publish or partial(wake_loops, clock=readers),
        )
        facts = HostFacts(
            vocab_size=parts.model.config.vocab_size,
            limits=CapacityLimits(
                resolved.max_model_len,
                resolved.block_size,
                resolved.num_kv_blocks - 1,  # block 0 is padding's
            ),
            device=str(resolved.device),
            dtype=str(resolved.dtype),
            start_s=time.monotonic() - started_s,
        )
        super().__init__(
            loop=loop,
            parts=parts,
            scheduler=parts.scheduler,
            facts=facts,
            counters=counters,
            weight_bytes=parts.weight_bytes,
            kv_cache_bytes=kv_bytes_per_token(parts.model)
            * resolved.block_size
            * resolved.num_kv_blocks,
        )


def start_loop_host(
    config: EngineConfig, publish: Callable[[Wakeups], None] | None = None
) -> LoopHost:
    """The host for what the model of `config` does (see `engine.task`), its loop running.

    Raises:
        EngineError: What `Engine` raises.
    """
    if task_of(config) == "generate":
        return LocalHost(config, publish)
    from engine.placement.pooling import PoolingHost

    return PoolingHost(config, publish or wake_loops)
