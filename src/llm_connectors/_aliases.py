"""Models that a call may choose by name: `chat.invoke(…, model="small")`."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from engine import ConfigError
from llm_connectors._runtime import EngineLease, lease_for

if TYPE_CHECKING:
    from engine import Engine

_lock = threading.Lock()
_leases: dict[str, EngineLease] = {}


def register_model(
    name: str, model: str | None = None, *, engine: Engine | None = None, **engine_kwargs: Any
) -> None:
    """Let every call of this process choose a model by `name`. Loads nothing.

    Args:
        name: What `model=` of a call says.
        model: Folder, `.gguf` file, hub id or packaged model.
        engine: An engine the caller made, instead of `model`.
        **engine_kwargs: Fields of `engine.EngineConfig`.

    Raises:
        ConfigError: The name is empty or taken by another model, or an option is bad.
    """
    if not isinstance(name, str) or not name:
        msg = f"A model's name is a non-empty string, got {name!r}."
        raise ConfigError(msg)
    lease = lease_for(model, engine_kwargs, engine)
    with _lock:
        known = _leases.get(name)
        if known is not None and known.config != lease.config:
            msg = (
                f"{name!r} is registered already, for {known.config.model!r}. Unregister it first."
            )
            raise ConfigError(msg)
        if known is None or engine is not None:
            _leases[name] = lease


def unregister_model(name: str) -> None:
    """Forget a name and give its engine back. Unknown names are ignored."""
    with _lock:
        lease = _leases.pop(name, None)
    if lease is not None:
        lease.close()


def registered_lease(name: str) -> EngineLease | None:
    """Access to the model registered as `name`; None for an unknown name."""
    return _leases.get(name)
