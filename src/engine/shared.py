"""`SharedEngines`: one engine per model and process, reference-counted."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.config import EngineConfig
from engine.errors import ConfigError

if TYPE_CHECKING:
    from engine.engine import Engine


@dataclass(slots=True)
class _Entry:
    """One model's engine. `lock` is held while it loads, so that two threads load once."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    engine: Engine | None = None
    num_references: int = 0


class SharedEngines:
    """Registry behind `Engine.shared`. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[tuple[str, str | None, str], _Entry] = {}

    def acquire(
        self,
        config: EngineConfig,
        load: Callable[[], Engine],
        mark_shared: Callable[[Engine, Callable[[], bool]], None],
    ) -> Engine:
        """The engine for `config`, loaded if need be, with one more reference.

        Args:
            config: Its model decides which engine; the rest must agree with the loaded one.
            load: Makes the engine.
            mark_shared: Tells a new engine how to give a reference back. That function returns
                True for the last one: the engine must then really close.

        Raises:
            ConfigError: The model is loaded with another config; the message names the fields.
        """
        key = _key(config)
        with self._lock:
            entry = self._entries.setdefault(key, _Entry())
        with entry.lock:
            engine = entry.engine
            if engine is not None and not engine.is_closed:
                _check_same(engine.config, config)
                entry.num_references += 1
                return engine
            engine = load()
            entry.engine, entry.num_references = engine, 1
            mark_shared(engine, lambda: self._release(entry, engine))
            return engine

    @staticmethod
    def _release(entry: _Entry, engine: Engine) -> bool:
        with entry.lock:
            if entry.engine is not engine:
                return True
            entry.num_references -= 1
            if entry.num_references > 0:
                return False
            entry.engine = None
            return True


def _key(config: EngineConfig) -> tuple[str, str | None, str]:
    """Paths by where they lead, names as they are; a model may generate and embed side by side."""
    path = os.path.realpath(config.model) if os.path.exists(config.model) else config.model
    return path, config.revision, config.task


def _check_same(loaded: EngineConfig, asked: EngineConfig) -> None:
    different = loaded.differing_fields(asked)
    different.pop("model", None)
    if different:
        fields = "; ".join(
            f"{name}: loaded with {ours!r}, asked for {theirs!r}"
            for name, (ours, theirs) in different.items()
        )
        msg = (
            f"{asked.model!r} is already loaded in this process with other options ({fields}). "
            "Use the same options, close the loaded engine first, or make a separate Engine(…)."
        )
        raise ConfigError(msg)
