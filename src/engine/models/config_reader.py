"""`ConfigReader`: checked access to the numbers of a checkpoint's `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from engine.errors import UnsupportedModelError


class NotNativeError(UnsupportedModelError):
    """The decoder lacks what a config asks for; transformers' own code may have it."""


class ConfigReader:
    """Reads keys of one config; a bad value raises with the key's name and the value.

    A key that is null counts as absent, as in transformers.

    Args:
        values: The config.
        owner: What it belongs to, for messages: the architecture's name.
        spelling: How this config spells keys that are asked for under Llama's name.
    """

    def __init__(
        self, values: Mapping[str, Any], owner: str, spelling: Mapping[str, str] | None = None
    ) -> None:
        self.values = values
        self.owner = owner
        self._spelling = spelling or {}

    def spelled(self, **spelling: str) -> ConfigReader:
        """The same config, read by Llama's keys: `hidden_size="n_embd"`."""
        return ConfigReader(self.values, self.owner, spelling)

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is; `default` where absent."""
        value = self.values.get(self._spelling.get(key, key))
        return default if value is None else value

    def size(self, key: str, default: int | None = None) -> int:
        """An integer >= 1. Required where there is no default."""
        value = self._required(key) if default is None else self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(key, "must be an integer >= 1")
        return value

    def number(self, key: str, default: float | None = None, *, above: float = 0.0) -> float:
        """A finite number greater than `above`. Required where there is no default."""
        value = self._required(key) if default is None else self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, "must be a number")
        if not above < value < float("inf"):
            raise self.error(key, f"must be a finite number > {above:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or False."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false")
        return value

    def numbers(self, key: str, length: int) -> list[float]:
        """A list of `length` positive numbers. Required."""
        value = self._required(key)
        if (
            not isinstance(value, list)
            or len(value) != length
            or not all(isinstance(item, int | float) and item > 0 for item in value)
        ):
            raise self.error(key, f"must be a list of {length} positive numbers")
        return cast("list[float]", value)

    def error(self, key: str, problem: str) -> UnsupportedModelError:
        """`<owner> config: <key>=<value> <problem>.`, to be raised by the caller."""
        name = self._spelling.get(key, key)
        return UnsupportedModelError(f"{self.owner} config: {name}={self.get(key)!r} {problem}.")

    def not_native(self, key: str) -> NotNativeError:
        """The error for a value that asks for something the decoder does not have."""
        problem = "is nothing that the engine's own decoder does"
        return NotNativeError(str(self.error(key, problem)))

    def _required(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            msg = f"{self.owner} config: {self._spelling.get(key, key)!r} is missing."
            raise UnsupportedModelError(msg)
        return value
