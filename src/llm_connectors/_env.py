"""The environment variables that connectors read, all of them.

LLM_CONNECTORS_MODEL    model of objects that are given neither a model nor an engine
LLM_CONNECTORS_DEVICE   `device` of engines whose options do not say
LLM_CONNECTORS_DTYPE    `dtype`, likewise
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any


def default_model() -> str | None:
    """The model to use where none is given."""
    return os.environ.get("LLM_CONNECTORS_MODEL") or None


def with_default_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Engine options, completed by those of the environment."""
    defaults = {
        name: value
        for name in ("device", "dtype")
        if (value := os.environ.get(f"LLM_CONNECTORS_{name.upper()}"))
    }
    return {**defaults, **(options or {})}
