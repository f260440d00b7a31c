"""`EngineHolder`: the engine behind a LangChain object, its life, copies and pickles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, Field, PrivateAttr

from llm_connectors._runtime import EngineLease, lease_for
from llm_connectors.langchain.errors import LANGCHAIN_ERRORS

if TYPE_CHECKING:
    from engine import Engine


class EngineHolder(BaseModel):
    """Mixin of all LangChain classes here. Making one loads nothing."""

    model: str = Field(default="", frozen=True)
    """Folder, `.gguf` file, hub id or packaged model. Also accepted as `model_name`."""

    engine: Any = Field(default=None, exclude=True, repr=False, frozen=True)
    """An `engine.Engine` to use instead of the shared one. Who made it closes it."""

    engine_kwargs: dict[str, Any] = Field(default_factory=dict, frozen=True)
    """Further `engine.EngineConfig` fields, such as `device`, `dtype` or `task`."""

    keep_loaded: bool = Field(default=True, frozen=True)
    """Whether the model stays in memory when the last object that uses it is gone. `close` frees it
    in any case. False: it is freed as soon as nobody uses it, and loaded again when asked for."""

    _lease: EngineLease = PrivateAttr()

    def _take_lease(self) -> None:
        """Called once the fields are known."""
        self._lease = lease_for(
            self.model, self.engine_kwargs, self.engine, keep_loaded=self.keep_loaded
        )

    def __getstate__(self) -> dict[Any, Any]:
        """A pickle carries the engine's name and options; weights and threads stay here."""
        state = super().__getstate__()
        if self.engine is None:
            return state
        fields = {
            **state["__dict__"],
            "engine": None,
            "model": self._lease.config.model,
            "engine_kwargs": self._lease.options,
        }
        return {**state, "__dict__": fields}

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """A deep copy in the same process shares the engine."""
        memo = {} if memo is None else memo
        if self.engine is not None:
            memo[id(self.engine)] = self.engine
        return super().__deepcopy__(memo)

    def load(self) -> Self:
        """Load the model now instead of at the first call. Returns the object itself.

        Raises:
            ConfigError: The model is loaded in this process with other options.
            ModelNotFoundError: The name leads nowhere.
            UnsupportedModelError: The engine cannot run this model.
            CapacityError: The model does not fit into memory.
        """
        with LANGCHAIN_ERRORS.converting():
            self._on_engine(self._lease.get())
        return self

    async def aload(self) -> Self:
        """`load` in a worker thread, so that the event loop goes on. Same errors."""
        with LANGCHAIN_ERRORS.converting():
            self._on_engine(await self._lease.aget())
        return self

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Give the engine back; its memory is freed once no other living object uses it.

        An `engine=` that was passed in is left to its owner. The next call loads the model again.

        Args:
            drain: Let running requests finish first.
            timeout: Seconds to wait for them at most.
        """
        self._lease.close(drain=drain, timeout=timeout)

    def _on_engine(self, engine: Engine) -> None:
        """Called with the engine before each use, for what is known only once it is loaded."""
