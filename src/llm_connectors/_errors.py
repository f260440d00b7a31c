"""Turning the engine's errors into classes that are the engine's and a framework's at once.

A caller who catches `engine.ContextOverflowError` and one who catches the framework's own class
must both succeed, so each framework package declares a table of such classes and one `ErrorMap`.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

from engine import EngineError


class ErrorMap:
    """Engine error class -> the framework's class for it, looked up along the class hierarchy.

    Args:
        table: Engine class -> a subclass of it. `EngineError` itself must be there, so that
            every error has an entry.
    """

    def __init__(self, table: Mapping[type[EngineError], type[EngineError]]) -> None:
        self._table = dict(table)
        self._targets = frozenset(self._table.values())

    def convert(self, error: EngineError) -> EngineError:
        """The framework's error for `error`: same arguments, notes, cause and traceback.

        Always a new object: several waiting threads may hold the same engine error.
        """
        if type(error) in self._targets:
            return error
        target = next(self._table[cls] for cls in type(error).__mro__ if cls in self._table)
        converted = target(*error.args)
        for note in getattr(error, "__notes__", ()):
            converted.add_note(note)
        converted.__cause__ = error.__cause__
        return converted.with_traceback(error.__traceback__)

    @contextmanager
    def converting(self) -> Generator[None]:
        """Raise the framework's error for every engine error that leaves the `with` block."""
        try:
            yield
        except EngineError as error:
            converted = self.convert(error)
            if converted is error:
                raise
            raise converted from error.__cause__
