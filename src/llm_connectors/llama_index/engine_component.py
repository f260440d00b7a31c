"""`EngineComponent`: what all classes here share: the engine behind them, copies and pickles."""

from __future__ import annotations

import asyncio
import copy
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import BaseComponent

from llm_connectors._runtime import EngineLease
from llm_connectors.llama_index.errors import ERRORS
from llm_connectors.llama_index.pickling import home_process, remembered, unpickled

if TYPE_CHECKING:
    from engine import Engine


class EngineComponent(BaseComponent):
    """A LlamaIndex object on an engine that other objects may use as well."""

    _lease: EngineLease = PrivateAttr()

    _shared_fields: ClassVar[tuple[str, ...]] = ("callback_manager", "rate_limiter")
    """Observers: copies have the same ones, pickles none."""

    # ------------------------------------------------------------------ the engine

    @property
    def engine(self) -> Engine:
        """The running engine; loads the model on first use, which may take minutes."""
        with ERRORS.converting():
            return self._lease.get()

    def load(self) -> Self:
        """Load the model now unless it is loaded; returns the object itself."""
        _ = self.engine
        return self

    async def aload(self) -> Self:
        """`load` without blocking the event loop. Await it before serving requests."""
        await self._aengine()
        return self

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Give the engine back; its memory is freed when nobody else uses it. Idempotent.

        A later request loads the model again. An engine passed as `engine=` is left running.

        Args:
            drain: Let running requests finish first, should the engine close now.
            timeout: Seconds to wait for them at most.
        """
        self._lease.close(drain=drain, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return await self.aload()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.close)

    async def _aengine(self) -> Engine:
        with ERRORS.converting():
            return await self._lease.aget()

    # ------------------------------------------------------------------ copies

    def __copy__(self) -> Self:
        clone = super().__copy__()
        clone._lease = copy.copy(self._lease)
        return clone

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """A copy with fields of its own. The engine and the observers are shared."""
        clone = self.__copy__()
        memo = {} if memo is None else memo
        memo[id(self)] = clone
        for name, value in self.__dict__.items():
            if name not in self._shared_fields:
                clone.__dict__[name] = copy.deepcopy(value, memo)
        return clone

    def __reduce__(self) -> tuple[Any, ...]:
        """The options, not the engine. Callback manager and rate limiter stay in this process."""
        fields = {
            name: value for name, value in self.__dict__.items() if name not in self._shared_fields
        }
        return (unpickled, (type(self), fields, home_process(self._lease)))

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> Self:
        """The object that `to_dict` described, on the engine that already runs for it."""
        component = super().from_dict(data, **kwargs)
        known = remembered(component._lease.config)
        if known is not None:
            component._lease = known
        return component
