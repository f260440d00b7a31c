"""Rotary embedding settings of a GGUF file, as Hugging Face's `rope_parameters`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from engine.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from engine.loader.gguf_config import GGUFKeys

DEFAULT_THETA: Final = 10000.0
# (low_freq_factor, high_freq_factor, original_max_position_embeddings) of Llama 3.1, 3.2 and 3.3.
_LLAMA3_BANDS: Final = (1.0, 4.0, 8192)


def rope_parameters(
    keys: GGUFKeys, head_dim: int, *, may_turn_partly: bool = False
) -> dict[str, Any]:
    """Type, base and scaling of the rotary embedding.

    Frequencies that a file gives as a tensor of divisors become the type "llama3" where they are
    exactly Llama 3's, else "longrope" with the divisors listed.

    Raises:
        UnsupportedModelError: An unknown scaling type, or heads that are rotated in part.
        CheckpointError: A value is missing or makes no sense.
    """
    rotary_dim = keys.count("rope.dimension_count", head_dim)
    if rotary_dim != head_dim and not may_turn_partly:
        msg = (
            f"{keys.file.path}: rope.dimension_count {keys.get('rope.dimension_count')} is not the "
            f"head size {head_dim}; heads that are rotated in part are not supported."
        )
        raise UnsupportedModelError(msg)
    theta = keys.number("rope.freq_base", DEFAULT_THETA)
    parameters: dict[str, Any] = {"rope_theta": theta}
    if rotary_dim != head_dim:
        parameters["partial_rotary_factor"] = rotary_dim / head_dim
    return parameters | (_divided_frequencies(keys, rotary_dim, theta) or _scaled_positions(keys))


def _scaled_positions(keys: GGUFKeys) -> dict[str, Any]:
    kind = keys.get("rope.scaling.type") or "none"
    if keys.get("rope.scale_linear"):
        # The spelling of files from before rope.scaling.* existed.
        return {"rope_type": "linear", "factor": keys.number("rope.scale_linear")}
    if kind == "none":
        return {"rope_type": "default"}
    factor = keys.number("rope.scaling.factor", 1.0)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        msg = (
            f"{keys.file.path}: rope scaling {kind!r} is not supported, only 'none', 'linear', "
            "'yarn' and frequency factors."
        )
        raise UnsupportedModelError(msg)
    parameters: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.count(
            "rope.scaling.original_context_length", keys.count("context_length")
        ),
    }
    for name in ("beta_fast", "beta_slow"):
        if keys.get(f"rope.scaling.yarn_{name}") is not None:
            parameters[name] = keys.number(f"rope.scaling.yarn_{name}")
    if keys.get("rope.scaling.attn_factor") is not None:
        # llama.cpp multiplies its attn_factor with YaRN's own, Hugging Face replaces the latter.
        own_factor = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        parameters["attention_factor"] = keys.number("rope.scaling.attn_factor") * own_factor
    return parameters


def _divided_frequencies(keys: GGUFKeys, head_dim: int, theta: float) -> dict[str, Any] | None:
    """Settings from the frequency divisors which a file has as tensors, None without them."""
    tensors = keys.file.tensors
    original_length = keys.count(
        "rope.scaling.original_context_length", keys.count("context_length")
    )
    if "rope_freqs.weight" in tensors:
        divisors = _divisors(keys, "rope_freqs.weight", head_dim)
        factor = float(divisors.max())
        if factor == 1.0 == float(divisors.min()):
            return None
        if np.allclose(divisors, llama3_divisors(theta, head_dim, factor), rtol=1e-4, atol=0):
            low, high, length = _LLAMA3_BANDS
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }
        short = long = divisors
        attention_factor = 1.0
    elif "rope_factors_long.weight" in tensors and "rope_factors_short.weight" in tensors:
        long = _divisors(keys, "rope_factors_long.weight", head_dim)
        short = _divisors(keys, "rope_factors_short.weight", head_dim)
        attention_factor = keys.number("rope.scaling.attn_factor", 1.0)
    else:
        return None
    return {
        "rope_type": "longrope",
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
        "attention_factor": attention_factor,
        "original_max_position_embeddings": original_length,
    }


def llama3_divisors(theta: float, head_dim: int, factor: float) -> npt.NDArray[np.float64]:
    """What Llama 3.1's rope scaling divides each of the head_dim / 2 frequencies by, [D / 2].

    Long waves are stretched by `factor`, short ones left alone, those between interpolated
    (meta-llama, apply_scaling in the Llama 3.1 reference code).
    """
    low, high, length = _LLAMA3_BANDS
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    waves_in_length = length * frequencies / (2 * math.pi)
    share = np.clip((waves_in_length - low) / (high - low), 0.0, 1.0)
    divisors: npt.NDArray[np.float64] = 1 / ((1 - share) / factor + share)
    return divisors


def _divisors(keys: GGUFKeys, name: str, head_dim: int) -> npt.NDArray[np.float32]:
    divisors: npt.NDArray[np.float32] = keys.file.read(name).numpy()
    if divisors.shape != (head_dim // 2,) or not np.all(np.isfinite(divisors) & (divisors > 0)):
        msg = (
            f"{keys.file.path}: tensor {name!r} has shape {divisors.shape}, expected "
            f"({head_dim // 2},) positive numbers."
        )
        raise CheckpointError(msg)
    return divisors
