"""`EngineHost`: what the engine's face needs of whatever runs the loop, and the choice between two.

Engine ──► EngineHost ─┬─ LocalHost, PoolingHost   the loop is a thread of this process
└─ RemoteHost  the loop is a thread of a child process, which holds a
LocalHost of its own; a socket between them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from engine.config import EngineConfig, ResolvedConfig
from engine.core.capacity import CapacityLimits
from engine.model_text import ModelText
from engine.pooling_facts import PoolingFacts
from engine.stats import EngineStats

if TYPE_CHECKING:
    from engine.core.pooling_request import PoolingRequest
    from engine.core.request import Request
    from engine.handle import RequestSink

    AnyRequest = Request | PoolingRequest

EXIT_TIMEOUT_S = 10.0
"""How long a forgotten engine may hold up the interpreter's exit: the step that runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What the face must know of the loaded model. Plain values: they cross a process boundary.

    Attributes:
        vocab_size: Token ids of the model.
        limits: What one request may take.
        device: Where it runs, as torch spells it.
        dtype: Of weights, activations and KV cache, as torch spells it.
        start_s: Seconds it took to get ready.
        pooling: Of a model that embeds or scores; None for one that generates.
    """

    vocab_size: int
    limits: CapacityLimits
    device: str
    dtype: str
    start_s: float
    pooling: PoolingFacts | None = None


class EngineHost(Protocol):
    """Runs one engine loop. Any thread may call any method."""

    @property
    def text(self) -> ModelText:
        """The model's tokenizer, chat template and end-of-sequence ids, in this process."""

    @property
    def facts(self) -> HostFacts:
        """What is known since the start."""

    @property
    def resolved_config(self) -> ResolvedConfig:
        """What the options came to."""

    @property
    def is_alive(self) -> bool:
        """True while requests are accepted."""

    def post_submit(self, pairs: Sequence[tuple[AnyRequest, RequestSink]]) -> None:
        """Hand over requests; all of them are seen by the same step.

        Raises:
            EngineClosedError: The engine was closed, or belongs to the process forked from.
            EngineDeadError: It ended with an error.
        """

    def post_abort(self, request: AnyRequest) -> None:
        """Ask for the end of `request`; no effect once it is finished."""

    def post_stream(self, request: AnyRequest) -> None:
        """Somebody iterates over the request's handle: publish its deltas from now on."""

    def post_reset_prefix_cache(self) -> None:
        """Forget all cached prefixes before the next submitted request."""

    def stats(self) -> EngineStats:
        """Counts and rates up to now; those of the end once it has ended."""

    def stop(self, *, drain: bool, timeout: float | None) -> bool:
        """Accept nothing more, end, and give all memory back. May be called again.

        Args:
            drain: Finish what was submitted first; otherwise running requests end with
                `EngineClosedError`.
            timeout: Seconds to wait for that; after them the rest ends as without `drain`.

        Returns:
            True once it has ended. False where that cannot be waited for: in the host's own
            thread, and in a forked child.
        """


def start_host(config: EngineConfig) -> EngineHost:
    """Load the model and start the loop where `config.placement` says. Blocks until it is ready.

    Raises:
        EngineError: What `Engine` raises.
    """
    # Imported here: a process that leaves the model to a child needs no torch.
    if config.placement == "process":
        from engine.placement.remote import RemoteHost

        return RemoteHost(config)
    from engine.placement.local import start_loop_host

    return start_loop_host(config)
