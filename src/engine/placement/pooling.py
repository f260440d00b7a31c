"""`PoolingHost`: the loop of an engine that embeds or scores, as a thread of this process."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, cast

from engine.config import EngineConfig
from engine.core.capacity import CapacityLimits
from engine.core.pooling_output import PoolingOutputs
from engine.handle import Wakeups, wake_loops
from engine.loop import EngineLoop
from engine.placement.host import HostFacts
from engine.placement.local import LoopHost
from engine.pooling_build import build_pooling_parts
from engine.stats import Counters, EngineStats


class PoolingHost(LoopHost):
    """Builds the parts and runs the same `EngineLoop` as engines that generate.

    The loop asks scheduler, runner and outputs for a handful of methods; with a scheduler of whole
    texts in their place it needs nothing else to embed.

    Args:
        config: Options of the engine; `placement` is not looked at.
        publish: Called by the engine thread once per step with the futures to complete.
    """

    def __init__(
        self, config: EngineConfig, publish: Callable[[Wakeups], None] = wake_loops
    ) -> None:
        started_s = time.monotonic()
        parts = build_pooling_parts(config)
        counters = Counters()
        loop = EngineLoop(
            name=config.model,
            scheduler=cast("Any", parts.scheduler),
            runner=cast("Any", parts.runner),
            outputs=cast(
                "Any", PoolingOutputs(parts.scheduler, counters, str(parts.resolved.dtype))
            ),
            counters=counters,
            max_steps_in_flight=parts.resolved.max_steps_in_flight,
            publish=publish,
        )
        max_tokens = parts.facts.max_tokens
        facts = HostFacts(
            vocab_size=parts.vocab_size,
            limits=CapacityLimits(max_tokens, 1, max_tokens),
            device=str(parts.resolved.device),
            dtype=str(parts.resolved.dtype),
            start_s=time.monotonic() - started_s,
            pooling=parts.facts,
        )
        super().__init__(
            loop=loop,
            parts=parts,
            scheduler=parts.scheduler,
            facts=facts,
            counters=counters,
            weight_bytes=parts.weight_bytes,
            kv_cache_bytes=0,
        )

    def stats(self) -> EngineStats:
        """See `EngineHost`. The rate is that of tokens read: none are generated."""
        return dataclasses.replace(super().stats(), output_tokens=0)
