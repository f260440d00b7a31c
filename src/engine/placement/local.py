"""`LocalHost`: the engine loop as a thread of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from engine.build import EngineParts, build_parts, kv_bytes_per_token
from engine.config import EngineConfig, ResolvedConfig
from engine.core.capacity import CapacityLimits
from engine.core.output import OutputProcessor
from engine.core.request import Request
from engine.ending import free_parts, thread_setup
from engine.handle import RequestSink, Wakeups, wake_loops
from engine.loop import EngineLoop
from engine.model_text import ModelText
from engine.placement.host import HostFacts
from engine.stats import Counters, EngineStats


class LocalHost:
    """Builds the parts of an engine and runs its loop in a thread; see `EngineHost`.

    Args:
        config: Options of the engine; `placement` is not looked at.
        publish: Called by the engine thread once per step with the futures to complete.

    Attributes:
        parts: What the loop works with; None once they are freed.
        loop: The loop, for those who wait for its end.
    """

    def __init__(
        self, config: EngineConfig, publish: Callable[[Wakeups], None] = wake_loops
    ) -> None:
        started_s = time.monotonic()
        parts = build_parts(config)
        self.parts: EngineParts | None = parts
        self._resolved = parts.resolved
        self._scheduler = parts.scheduler
        self._counters = Counters()
        self._weight_bytes = parts.weight_bytes
        self._kv_cache_bytes = (
            kv_bytes_per_token(parts.model)
            * parts.resolved.block_size
            * parts.resolved.num_kv_blocks
        )
        self._stop_lock = threading.Lock()
        self.loop = EngineLoop(
            name=config.model,
            scheduler=parts.scheduler,
            runner=parts.runner,
            outputs=OutputProcessor(
                parts.scheduler, parts.text.tokenizer, self._counters, parts.runner.free_row
            ),
            counters=self._counters,
            max_steps_in_flight=parts.resolved.max_steps_in_flight,
            publish=publish,
        )
        self.loop.start(thread_setup(parts))
        self._text = parts.text
        self._facts = HostFacts(
            vocab_size=parts.model.config.vocab_size,
            limits=CapacityLimits(
                parts.resolved.max_model_len,
                parts.resolved.block_size,
                parts.resolved.num_kv_blocks - 1,  # block 0 is padding's
            ),
            device=str(parts.resolved.device),
            dtype=str(parts.resolved.dtype),
            start_s=time.monotonic() - started_s,
        )

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

    def post_submit(self, pairs: Sequence[tuple[Request, RequestSink]]) -> None:
        """See `EngineHost`."""
        self.loop.post_submit(pairs)

    def post_abort(self, request: Request) -> None:
        """See `EngineHost`."""
        self.loop.post_abort(request)

    def post_stream(self, request: Request) -> None:
        """See `EngineHost`."""
        self.loop.post_stream(request)

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
