"""`EngineFields`: what an embedding or ranking object has beside its engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from pydantic import ConfigDict, Field, model_validator

from llm_connectors._params import check_names
from llm_connectors.langchain._engine_holder import EngineHolder

if TYPE_CHECKING:
    from engine import Engine


class EngineFields(EngineHolder):
    """Mixin of `LocalEmbeddings`, `LocalRerank` and `LocalDecisions`.

    Raises:
        pydantic.ValidationError: A name is unknown or a value is bad.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    on_overflow: str = "error"
    """What becomes of a text longer than the model reads: "error", or "truncate" to ignore its
    end."""

    timeout: float | None = Field(default=None, gt=0)
    """Seconds a call may take; then it is aborted and `RequestTimeoutError` raised."""

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
    def _check_values(self) -> Self:
        if self.on_overflow not in ("error", "truncate"):
            msg = f"on_overflow={self.on_overflow!r} must be 'error' or 'truncate'."
            raise ValueError(msg)
        self._take_lease()
        return self

    def _engine(self) -> Engine:
        return self._lease.get()

    async def _aengine(self) -> Engine:
        return await self._lease.aget()
