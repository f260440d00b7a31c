"""What a model that comes back from a pickle or a dictionary finds.

`IngestionPipeline(num_workers=…)` pickles its transformations, the model among them, into spawned
processes. An object that then quietly loaded the model again, once per process, would fill the
GPU several times over. So in its own process a pickle finds the running engine, and elsewhere it
becomes an object that says on first use what is wrong. It does not refuse to be unpickled:
`multiprocessing.Pool` workers die of that without a message, and the parent waits for ever.
"""

from __future__ import annotations

import copy
import itertools
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

from llm_connectors._runtime import EngineLease
from llm_connectors.llama_index.errors import ForeignProcessError

if TYPE_CHECKING:
    from engine import Engine, EngineConfig
    from llm_connectors.llama_index.engine_component import EngineComponent


class ForeignLease(EngineLease):
    """A lease that came from another process and finds no engine here."""

    __slots__ = ("home_pid", "owner")

    def __init__(self, model: str, options: dict[str, Any], home_pid: int, owner: str) -> None:
        super().__init__(model, options)
        self.home_pid = home_pid
        self.owner = owner

    def __copy__(self) -> ForeignLease:
        return ForeignLease(self.config.model, self.options, self.home_pid, self.owner)

    def get(self) -> Engine:
        """Never an engine.

        Raises:
            ForeignProcessError: Always.
        """
        msg = (
            f"This {self.owner}({self.config.model!r}) was pickled in process {self.home_pid} and "
            f"is used in process {os.getpid()}, which would load the model again. Run the work in "
            "threads or coroutines of one process (num_workers of an extractor, not of "
            "IngestionPipeline.run), or make a new one here on purpose."
        )
        raise ForeignProcessError(msg)


_lock = threading.Lock()
_numbers = itertools.count()
_caller_leases: weakref.WeakValueDictionary[int, EngineLease] = weakref.WeakValueDictionary()
"""By their order; the last one is the newest."""


def remember(lease: EngineLease) -> None:
    """Make an engine that its caller made findable; `Engine.shared` does not know it."""
    with _lock:
        _caller_leases[next(_numbers)] = lease


def remembered(config: EngineConfig) -> EngineLease | None:
    """A lease on the newest running engine with this config that some caller made, or None."""
    with _lock:
        for _, lease in sorted(_caller_leases.items(), reverse=True):
            engine = lease.peek()
            if lease.config == config and engine is not None and not engine.is_closed:
                return copy.copy(lease)
    return None


def home_process(lease: EngineLease) -> int:
    """Id of the process whose engine `lease` can use."""
    return lease.home_pid if isinstance(lease, ForeignLease) else os.getpid()


def unpickled(cls: type[EngineComponent], fields: dict[str, Any], home_pid: int) -> EngineComponent:
    """The object described by `fields`, on the same engine if that runs in this process."""
    component = cls.from_dict(fields)
    if home_pid != os.getpid():
        lease = component._lease
        component._lease = ForeignLease(lease.config.model, lease.options, home_pid, cls.__name__)
    return component
