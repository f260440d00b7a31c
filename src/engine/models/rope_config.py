"""Reads the rotation of a checkpoint's `config.json`, in its old and its new spelling.

Before transformers 5: `rope_theta` and `rope_scaling={"type" or "rope_type": …}` beside the other
keys. Since then: one dict `rope_parameters={"rope_type", "rope_theta", …}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.layers.rope import ROPE_KINDS, RopeConfig
from engine.models.config_reader import ConfigReader

_OPTIONAL_YARN_NUMBERS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def read_rope(config: ConfigReader, head_dim: int, *, default_theta: float = 1e4) -> RopeConfig:
    """The one rotation of all layers.

    Args:
        config: The whole config.
        head_dim: D.
        default_theta: The family's base where the config names none.

    Raises:
        UnsupportedModelError: The kind is unknown, or one of its numbers missing or nonsense.
    """
    values = config.get("rope_scaling") or config.get("rope_parameters") or {}
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    if not isinstance(values, Mapping):
        raise config.error(key, "must be an object")
    if any(isinstance(value, Mapping) for value in values.values()):
        raise config.error(key, "differs between layers, which this architecture does not support")
    merged = {name: config.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    merged |= {name: value for name, value in values.items() if value is not None}
    rope = ConfigReader(merged, f"{config.owner} {key}")

    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise rope.error("rope_type", f"is not supported; known are {', '.join(ROPE_KINDS)}")
    max_positions = config.size("max_position_embeddings")
    original = max_positions
    if kind in ("yarn", "longrope", "llama3"):
        original = rope.size("original_max_position_embeddings", max_positions)
        original = config.size("original_max_position_embeddings", original)
    share = rope.number("partial_rotary_factor", 1.0)
    if share > 1 or (share < 1 and kind != "proportional"):
        raise rope.error("partial_rotary_factor", "is not supported by this architecture")
    if head_dim % 2:
        raise config.error("head_dim", f"(here {head_dim}) must be even to be rotated in pairs")
    return RopeConfig(
        kind=kind,
        theta=rope.number("rope_theta", default_theta, above=1.0),
        partial_rotary_factor=share,
        max_position_embeddings=max_positions,
        original_max_position_embeddings=original,
        parameters=_parameters(kind, rope, head_dim),
    )


def _parameters(kind: str, rope: ConfigReader, head_dim: int) -> dict[str, Any]:
    """The kind's own numbers, checked; absent optional ones stay absent."""
    if kind in ("linear", "dynamic"):
        return {"factor": rope.number("factor")}
    if kind == "proportional":
        return {"factor": rope.number("factor", 1.0)}
    if kind == "llama3":
        parameters = {
            key: rope.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor")
        }
        if parameters["high_freq_factor"] <= parameters["low_freq_factor"]:
            raise rope.error("high_freq_factor", "must be greater than low_freq_factor")
        return parameters
    if kind == "yarn":
        return {
            **_optional_numbers(rope, "factor", *_OPTIONAL_YARN_NUMBERS),
            "truncate": rope.flag("truncate", True),
        }
    if kind == "longrope":
        return {
            **_optional_numbers(rope, "factor", "attention_factor"),
            "short_factor": rope.numbers("short_factor", head_dim // 2),
            "long_factor": rope.numbers("long_factor", head_dim // 2),
        }
    return {}


def _optional_numbers(rope: ConfigReader, *keys: str) -> dict[str, float]:
    return {key: rope.number(key) for key in keys if rope.get(key) is not None}
