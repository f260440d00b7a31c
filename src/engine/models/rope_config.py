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


def read_rope(
    config: ConfigReader,
    head_dim: int,
    *,
    default_theta: float = 1e4,
    default_share: float | None = None,
) -> RopeConfig:
    """The one rotation of all layers.

    Args:
        config: The whole config.
        head_dim: D.
        default_theta: The family's base where the config names none.
        default_share: Share of a head that turns where the config names none; None for a family
            whose heads turn as a whole.

    Raises:
        UnsupportedModelError: The kind is unknown, or one of its numbers missing or nonsense.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    values = _mapping(config, key)
    if any(isinstance(value, Mapping) for value in values.values()):
        raise config.error(key, "differs between layers, which this architecture does not support")
    beside = {name: config.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    return _rope(config, key, {**beside, **values}, head_dim, default_theta, default_share)


def read_rope_by_layer_type(
    config: ConfigReader,
    head_dim: int,
    *,
    sliding_key: str = "rope_local_base_freq",
    default_thetas: tuple[float, float] = (1e6, 1e4),
) -> dict[str, RopeConfig]:
    """Two rotations: "full_attention" and "sliding_attention" -> rotation.

    In the old spelling `rope_scaling` and `rope_theta` are those of full attention, and
    `sliding_key` is the base of sliding attention. `default_thetas` are those of the two.

    Raises:
        UnsupportedModelError: As `read_rope`.
    """
    nested = _mapping(config, "rope_parameters")
    ropes = {}
    for layer_type, theta_key, default_theta in (
        ("full_attention", "rope_theta", default_thetas[0]),
        ("sliding_attention", sliding_key, default_thetas[1]),
    ):
        values = nested.get(layer_type) or {}
        if layer_type == "full_attention":
            values = {**values, **_mapping(config, "rope_scaling")}
        values = {"rope_theta": config.get(theta_key), **values}
        ropes[layer_type] = _rope(
            config, f"rope_parameters[{layer_type!r}]", values, head_dim, default_theta
        )
    return ropes


def _mapping(config: ConfigReader, key: str) -> dict[str, Any]:
    """The object under `key` without its nulls; empty where absent."""
    values = config.get(key, {})
    if not isinstance(values, Mapping):
        raise config.error(key, "must be an object")
    return {name: value for name, value in values.items() if value is not None}


def _rope(
    config: ConfigReader,
    key: str,
    values: Mapping[str, Any],
    head_dim: int,
    default_theta: float,
    default_share: float | None = None,
) -> RopeConfig:
    """A rotation from its own numbers and the config around them."""
    rope = ConfigReader(values, f"{config.owner} {key}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = {"su": "longrope"}.get(kind, kind)  # Phi-3's first name for it
    if kind not in ROPE_KINDS:
        raise rope.error("rope_type", f"is not supported; known are {', '.join(ROPE_KINDS)}")
    max_positions = config.size("max_position_embeddings")
    original = max_positions
    if kind in ("yarn", "longrope", "llama3"):
        original = rope.size("original_max_position_embeddings", max_positions)
        original = config.size("original_max_position_embeddings", original)
    if head_dim % 2:
        raise config.error("head_dim", f"(here {head_dim}) must be even to be rotated in pairs")
    share = rope.number("partial_rotary_factor", default_share or 1.0)
    may_be_partial = kind == "proportional" or default_share is not None
    if share > 1 or (share < 1 and not may_be_partial):
        raise rope.error("partial_rotary_factor", "is not supported by this architecture")
    rotary_dim = head_dim if kind == "proportional" else int(head_dim * share)
    if rotary_dim % 2 or not rotary_dim:
        raise rope.error("partial_rotary_factor", f"turns {rotary_dim} entries: must be even")
    return RopeConfig(
        kind=kind,
        theta=rope.number("rope_theta", default_theta, above=1.0),
        partial_rotary_factor=share,
        max_position_embeddings=max_positions,
        original_max_position_embeddings=original,
        parameters=_parameters(kind, rope, rotary_dim),
    )


def _parameters(kind: str, rope: ConfigReader, rotary_dim: int) -> dict[str, Any]:
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
            "short_factor": rope.numbers("short_factor", rotary_dim // 2),
            "long_factor": rope.numbers("long_factor", rotary_dim // 2),
        }
    return {}


def _optional_numbers(rope: ConfigReader, *keys: str) -> dict[str, float]:
    return {key: rope.number(key) for key in keys if rope.get(key) is not None}
