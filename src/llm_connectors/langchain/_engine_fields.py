"""`EngineFields`: where the model of an embedding or ranking object comes from, and its life."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from llm_connectors._params import check_names
from llm_connectors._runtime import EngineLease, lease_for
from llm_connectors.langchain.errors import LANGCHAIN_ERRORS

if TYPE_CHECKING:
    from engine import Engine


class EngineFields(BaseModel):
    """Mixin of `LocalEmbeddings` and `LocalRerank`. Making one loads nothing.

    Raises:
        pydantic.ValidationError: A name is unknown or a value is bad.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    model: str = Field(default="", frozen=True)
    """Folder, hub id or packaged model, such as "all-minilm-l6-v2". Also accepted as
    `model_name`."""

    engine: Any = Field(default=None, exclude=True, repr=False, frozen=True)
    """An `engine.Engine` to use instead of the shared one. Who made it closes it."""

    engine_kwargs: dict[str, Any] = Field(default_factory=dict, frozen=True)
    """Further `engine.EngineConfig` fields, such as `device`, `dtype` or `task`."""

    keep_loaded: bool = Field(default=True, frozen=True)
    """Whether the model stays in memory when the last object that uses it is gone. `close` frees it
    in any case. False: it is freed as soon as nobody uses it, and loaded again when asked for."""

    on_overflow: str = "error"
    """What becomes of a text longer than the model reads: "error", or "truncate" to ignore its
    end."""

    timeout: float | None = Field(default=None, gt=0)
    """Seconds a call may take; then it is aborted and `RequestTimeoutError` raised."""

    _lease: EngineLease = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _check_options(cls, values: Any) -> Any:
        """Refuse unknown names, which pydantic would drop in silence."""
        if not isinstance(values, Mapping):
            return values
        options = dict(values)
        if "model_name" in options and "model" not in options:
            options["model"] = options.pop("model_name")
        check_names(options, cls.model_fields, f"{cls.__name__} option")
        engine = options.get("engine")
        if engine is not None and not options.get("model"):
            options["model"] = engine.model_name
        return options

    @model_validator(mode="after")
    def _take_lease(self) -> Self:
        if self.on_overflow not in ("error", "truncate"):
            msg = f"on_overflow={self.on_overflow!r} must be 'error' or 'truncate'."
            raise ValueError(msg)
        self._lease = lease_for(
            self.model, self.engine_kwargs, self.engine, keep_loaded=self.keep_loaded
        )
        return self

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
            self._lease.get()
        return self

    async def aload(self) -> Self:
        """`load` in a worker thread, so that the event loop goes on. Same errors."""
        with LANGCHAIN_ERRORS.converting():
            await self._lease.aget()
        return self

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Give the engine back; its memory is freed once no other living object uses it.

        An `engine=` that was passed in is left to its owner. The next call loads the model again.

        Args:
            drain: Let running requests finish first.
            timeout: Seconds to wait for them at most.
        """
        self._lease.close(drain=drain, timeout=timeout)

    def _engine(self) -> Engine:
        return self._lease.get()

    async def _aengine(self) -> Engine:
        return await self._lease.aget()
