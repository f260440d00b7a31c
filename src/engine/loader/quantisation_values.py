"""`QuantisationValues`: the entries of a `quantization_config`, checked as they are read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from engine.errors import UnsupportedModelError


class QuantisationValues:
    """Typed access to one JSON object.

    Args:
        found: What config.json holds there.
        place: What to call the object in errors.

    Raises:
        UnsupportedModelError: It is no object. All methods raise it for values of another type or
            out of range.
    """

    def __init__(self, found: Any, place: str = "quantization_config") -> None:
        if not isinstance(found, Mapping):
            msg = f"config.json: {place} is {found!r}, expected an object."
            raise UnsupportedModelError(msg)
        self._values = found
        self.place = place

    def get(self, key: str) -> Any:
        """The value as it is; None where there is none."""
        return self._values.get(key)

    def method(self) -> str:
        """`quant_method`, in its usual spelling."""
        if self.get("quant_method") is None:
            if self.get("config_groups") is not None:
                return "compressed-tensors"
            if self.get("load_in_4bit") or self.get("load_in_8bit"):
                return "bitsandbytes"
        method = self.text("quant_method", "").lower().replace("_", "-")
        return method.removesuffix("-4bit").removesuffix("-8bit")

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(key, value, "a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def one_of(self, key: str, allowed: tuple[int, ...]) -> int:
        """One of some integers."""
        value = self._values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
            raise self.error(key, value, " or ".join(map(str, allowed)))
        return value

    def group_size(self, key: str) -> int:
        """Columns that share a scale; 0 for all of a row, which configs write as -1 or null."""
        value = self._values.get(key)
        if value is None or value == -1:
            return 0
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(key, value, "a positive integer, or -1 for whole rows")
        return value

    def two_sizes(self, key: str) -> tuple[int, int]:
        """Two positive integers: a list, or "128x128" as older files of compressed-tensors say."""
        value = self._values.get(key)
        if isinstance(value, str) and re.fullmatch(r"[1-9]\d*x[1-9]\d*", value):
            value = [int(size) for size in value.split("x")]
        sizes = value if isinstance(value, list | tuple) else ()
        if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
            raise self.error(key, value, "a list of two positive integers")
        return sizes[0], sizes[1]

    def names(self, key: str) -> tuple[str, ...]:
        """A list of strings, empty without one."""
        value = self._values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.error(key, value, "a list of names")
        return tuple(value)

    def mapping(self, key: str) -> dict[str, dict[str, Any]]:
        """An object of objects, empty without one."""
        value = self._values.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping) or not all(
            isinstance(entry, Mapping) for entry in value.values()
        ):
            raise self.error(key, value, "an object of objects")
        return {str(name): dict(entry) for name, entry in value.items()}

    def error(self, key: str, found: Any, allowed: str) -> UnsupportedModelError:
        """For a value that cannot be."""
        return UnsupportedModelError(
            f"config.json: {self.place}.{key} is {found!r}; the engine runs {allowed}. Correct it, "
            "or use another checkpoint of the model."
        )
