"""Which engine a connector object talks to: found on first use, shared, given back on close.

Framework objects are made, copied and thrown away all the time (LangChain builds a new one for
every configured call, LlamaIndex deep-copies them), so an object never owns weights. It holds an
`EngineLease`: the model's name and the engine options, and, after the first use, a reference to
the process-wide engine with exactly these options.

    ChatLocal A ──lease──┐
    ChatLocal B ──lease──┼── one reference from Engine.shared(model, **options)
    LocalLLM  C ──lease──┘

All leases of one config share one reference. It stays when an object that used it is garbage
collected, because the next one may be a microsecond away. It goes back when `close` is called on
a lease and no other living lease uses it any more, or when the same model is asked for with other
options and no living lease uses it: an engine that nobody could close must not be in the way. Where
none of its leases was made with `keep_loaded`, it goes back when the last of them is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import threading
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from engine import ConfigError, EngineConfig

if TYPE_CHECKING:
    from engine import Engine


class EngineLease:
    """A connector object's access to an engine. Making one costs nothing and loads nothing.

    Thread-safe. A copy, a deep copy or a pickle carries the name and the options and finds the
    same shared engine in its process; only a lease on an engine object that the caller made keeps
    that very object when it is copied, and cannot be told apart from a shared one once unpickled.

    Args:
        model: As in `EngineConfig.model`. Ignored where `engine` is given.
        options: Further `EngineConfig` fields by name.
        engine: An engine the caller made and will close.
        keep_loaded: The engine may stay when nobody uses it any more.

    Attributes:
        keep_loaded: As given.
        config: The engine's config, as asked for.
        options: Its fields, without `model`, that differ from an engine's defaults.

    Raises:
        ConfigError: An option is unknown or its value is bad.
    """

    __slots__ = (
        "__weakref__",
        "_engine",
        "_is_owned_by_caller",
        "config",
        "keep_loaded",
        "options",
    )

    def __init__(
        self,
        model: str,
        options: Mapping[str, Any] | None = None,
        engine: Engine | None = None,
        *,
        keep_loaded: bool = True,
    ) -> None:
        self.keep_loaded = keep_loaded
        self._engine = engine
        self._is_owned_by_caller = engine is not None
        self.config: EngineConfig = (
            engine.config
            if engine is not None
            else EngineConfig.from_kwargs(**{**(options or {}), "model": model})
        )
        self.options: dict[str, Any] = _non_default_options(self.config)

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(EngineLease, keep_loaded=self.keep_loaded)
        return (make, (self.config.model, self.options))

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineLease:
        return self.__copy__()

    def __copy__(self) -> EngineLease:
        if self._is_owned_by_caller:
            return EngineLease(self.config.model, engine=self._engine)
        return EngineLease(self.config.model, self.options, keep_loaded=self.keep_loaded)

    def __repr__(self) -> str:
        state = "loaded" if self.is_loaded else "not loaded"
        return f"<EngineLease {self.config.model!r}, {state}>"

    @property
    def is_loaded(self) -> bool:
        """True where `get` returns at once."""
        engine = self._engine
        return engine is not None and (self._is_owned_by_caller or not engine.is_closed)

    def peek(self) -> Engine | None:
        """The engine if this lease has it already. Loads nothing."""
        return self._engine if self.is_loaded else None

    def get(self) -> Engine:
        """The engine, loaded now if nobody in the process has loaded it. May take minutes.

        Raises:
            EngineError: The model cannot be found, loaded or fitted into memory, or is loaded
                with other options.
        """
        engine = self._engine
        if engine is not None and (self._is_owned_by_caller or not engine.is_closed):
            return engine
        engine = _REFERENCES.acquire(self)
        self._engine = engine
        return engine

    async def aget(self) -> Engine:
        """`get` without blocking the event loop: a worker thread loads the model."""
        engine = self.peek()
        return engine if engine is not None else await asyncio.to_thread(self.get)

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Give the engine back. It closes when no living lease or other owner uses it any more.

        An engine that the caller made is left alone: its maker closes it. A later `get` loads
        the model again.

        Args:
            drain: Let running requests finish first, should the engine close now.
            timeout: Seconds to wait for them at most.
        """
        if self._is_owned_by_caller:
            return
        self._engine = None
        _REFERENCES.release(self, drain=drain, timeout=timeout)


class _Reference:
    """One reference to a shared engine and the leases that use it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.users: weakref.WeakSet[EngineLease] = weakref.WeakSet()
        self.is_kept = False

    def add(self, lease: EngineLease) -> None:
        """`lease` uses the engine from now on."""
        if lease in self.users:
            return
        if not lease.keep_loaded:
            # Before the set's own reference: what was registered last is called first.
            weakref.finalize(lease, _release_soon, lease.config).atexit = False
        self.users.add(lease)
        self.is_kept |= lease.keep_loaded


class _References:
    """The process's references to shared engines, one per config."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_config: dict[EngineConfig, _Reference] = {}

    def acquire(self, lease: EngineLease) -> Engine:
        known = self._join(lease)
        if known is not None:
            return known
        from engine import Engine

        self._drop_unused(lease.config)
        # Outside the lock: another model must not wait for this one. Two threads that want this
        # one meet in `Engine.shared`, which loads once and counts twice.
        engine = Engine.shared(lease.config.model, **lease.options)
        with self._lock:
            reference = self._by_config.get(lease.config)
            is_first = reference is None or reference.engine.is_closed
            if reference is None or is_first:
                reference = self._by_config[lease.config] = _Reference(engine)
            reference.add(lease)
        if not is_first:
            engine.close()
        return reference.engine

    def _join(self, lease: EngineLease) -> Engine | None:
        with self._lock:
            reference = self._by_config.get(lease.config)
            if reference is None or reference.engine.is_closed:
                return None
            reference.add(lease)
            return reference.engine

    def _drop_unused(self, wanted: EngineConfig) -> None:
        """Give back references to the same model with other options that no living lease uses."""

        def in_the_way() -> dict[EngineConfig, _Reference]:
            return {
                config: reference
                for config, reference in self._by_config.items()
                if config != wanted and _model_of(config) == _model_of(wanted)
            }

        with self._lock:
            if not in_the_way():
                return
        gc.collect()  # an object in a cycle, as a failed test leaves one, is gone as well
        with self._lock:
            unused = {key: found for key, found in in_the_way().items() if not found.users}
            for config in unused:
                del self._by_config[config]
        for reference in unused.values():
            reference.engine.close()

    def release(self, lease: EngineLease, *, drain: bool, timeout: float | None) -> None:
        with self._lock:
            reference = self._by_config.get(lease.config)
            if reference is None:
                return
            reference.users.discard(lease)
            if len(reference.users) > 0:
                return
            del self._by_config[lease.config]
        reference.engine.close(drain=drain, timeout=timeout)

    def release_unused(self, config: EngineConfig) -> None:
        """Close the engine of `config` if nobody uses it and nobody wanted it kept."""
        with self._lock:
            reference = self._by_config.get(config)
            if reference is None or reference.is_kept or len(reference.users) > 0:
                return
            del self._by_config[config]
        reference.engine.close()


_REFERENCES = _References()


def _release_soon(config: EngineConfig) -> None:
    """Called while a lease is collected, in any thread and with any lock held: close elsewhere."""
    thread = threading.Thread(
        target=_REFERENCES.release_unused, args=(config,), name="engine-release", daemon=True
    )
    with contextlib.suppress(RuntimeError):  # the interpreter is ending, and everything goes
        thread.start()


def _model_of(config: EngineConfig) -> tuple[str, str | None, str]:
    """What `Engine.shared` loads once: a model may generate and embed side by side."""
    return config.model, config.revision, config.task


def _non_default_options(config: EngineConfig) -> dict[str, Any]:
    """The fields of `config`, without `model`, that differ from an engine's defaults."""
    changed = config.differing_fields(EngineConfig(model=config.model))
    return {name: own for name, (own, _default) in changed.items()}


def lease_for(
    model: str | None,
    options: Mapping[str, Any] | None,
    engine: Engine | None,
    *,
    keep_loaded: bool = True,
) -> EngineLease:
    """The lease of a connector object from its fields.

    Raises:
        ConfigError: Neither a model nor an engine is given, `engine` comes with options, with
            another model's name or without `keep_loaded`, or an option is unknown or bad.
    """
    if engine is None:
        if not model:
            msg = (
                "No model given. Pass model='<folder, .gguf file, hub id or smollm2-135m>', or "
                "engine=<an Engine you made>."
            )
            raise ConfigError(msg)
        return EngineLease(model, options, keep_loaded=keep_loaded)
    if not keep_loaded:
        msg = (
            "keep_loaded=False cannot be applied to engine=…: whoever made it closes it. Pass "
            "model= instead, or leave keep_loaded out."
        )
        raise ConfigError(msg)
    if options:
        msg = (
            f"engine_kwargs={dict(options)!r} cannot be applied to engine=…, which is running "
            "already. Give them to the Engine, or pass model= and engine_kwargs= without engine=."
        )
        raise ConfigError(msg)
    names = (engine.model_name, engine.config.model)
    if model and model not in names:
        msg = f"model={model!r} is not the model of engine=…, which is {names[0]!r}. Give one."
        raise ConfigError(msg)
    return EngineLease(engine.model_name, engine=engine)
