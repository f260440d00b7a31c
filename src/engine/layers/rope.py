"""Rotary position tables for every scaling kind that transformers knows.

A rotation turns the pair (i, i + rot_dim/2) of a head by `position * inv_freq[i]` (RoFormer,
arXiv 2104.09864). The kinds differ in `inv_freq` [rot_dim/2] and in one factor on cos and sin:

==============  ===================================================================================
default         theta ** (-2i / rot_dim)
linear          default / factor (position interpolation, arXiv 2306.15595)
proportional    the first `partial_rotary_factor` of the pairs turn, with the exponent taken over
                the whole head; the others have frequency 0
dynamic         default with a theta that grows with the length (NTK-aware scaling)
yarn            slow pairs as linear, fast ones as default, a ramp between (arXiv 2309.00071)
longrope        default / factor[i], one list for short and one for long contexts (2402.13753)
llama3          slow pairs / factor, fast ones unchanged, a smooth step between (Llama 3.1)
==============  ===================================================================================

Two kinds depend on a length, "dynamic" and "longrope". transformers looks at the longest sequence
of each forward call and turns *new* keys by it, so that keys of one sequence end up turned by
different frequencies, depending on how the prompt was cut up and who its neighbours were. Blocks
of KV are shared between sequences and recomputed after preemption here, so a rotation must depend
on the position alone: the length is `max_model_len`, one number for the life of an engine. Hence:

- `max_model_len` within the original length: equal to transformers for every sequence.
- beyond it, longrope uses the long factors for all sequences. Equal to transformers for sequences
  longer than the original length; shorter ones differ (set a smaller `max_model_len` for those).
- beyond it, dynamic uses the theta of a sequence of `max_model_len` tokens. Equal to transformers
  for a prompt of that length; shorter ones are stretched more than there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

ROPE_KINDS = ("default", "linear", "proportional", "dynamic", "yarn", "longrope", "llama3")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """One kind of rotation and its numbers.

    Attributes:
        kind: One of `ROPE_KINDS`.
        theta: Base of the frequencies, > 1.
        partial_rotary_factor: Share of a head that turns, in (0, 1].
        max_position_embeddings: Positions the checkpoint was made for.
        original_max_position_embeddings: Positions before a context extension; equal to
            `max_position_embeddings` where there was none. Used by yarn, longrope and llama3.
        parameters: What else the kind needs, with transformers' names: `factor`, `beta_fast`,
            `beta_slow`, `mscale`, `mscale_all_dim`, `truncate`, `attention_factor`,
            `short_factor`, `long_factor`, `low_freq_factor`, `high_freq_factor`.
    """

    kind: str = "default"
    theta: float = 10_000.0
    partial_rotary_factor: float = 1.0
    max_position_embeddings: int
    original_max_position_embeddings: int
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def rotary_dim(self, head_dim: int) -> int:
        """Leading entries of a head that are paired up, turned or not."""
        if self.kind == "proportional":
            return head_dim
        return int(head_dim * self.partial_rotary_factor)


def build_cos_sin(
    rope: RopeConfig, head_dim: int, max_model_len: int, device: torch.device
) -> torch.Tensor:
    """Cos and sin of every position, [max_model_len, 2, rot_dim // 2] float32, contiguous.

    The attention factor of yarn and longrope is multiplied in.
    """
    inv_freq, attention_factor = inverse_frequencies(rope, head_dim, max_model_len)
    positions = torch.arange(max_model_len, dtype=torch.float32)
    angles = positions[:, None] * inv_freq  # [P, rot_dim // 2]
    table = torch.stack((angles.cos(), angles.sin()), dim=1) * attention_factor
    return table.to(device)


def inverse_frequencies(
    rope: RopeConfig, head_dim: int, max_model_len: int
) -> tuple[torch.Tensor, float]:
    """(`inv_freq` [rot_dim // 2] float32 on the CPU, factor on cos and sin)."""
    dim = rope.rotary_dim(head_dim)
    extra = rope.parameters
    if rope.kind == "linear":
        return _default(rope.theta, dim) / extra["factor"], 1.0
    if rope.kind == "proportional":
        return _proportional(rope, head_dim), 1.0
    if rope.kind == "dynamic":
        return _default(_dynamic_theta(rope, dim, max_model_len), dim), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, dim)
    if rope.kind == "longrope":
        return _longrope(rope, dim, max_model_len)
    if rope.kind == "llama3":
        return _llama3(rope, dim), 1.0
    return _default(rope.theta, dim), 1.0


def _default(theta: float, dim: int) -> torch.Tensor:
    return torch.pow(theta, _exponents(dim)).reciprocal()


def _exponents(dim: int) -> torch.Tensor:
    """2i / dim, [dim // 2] float32; rounded as in transformers, so that tables agree bit by bit."""
    return torch.arange(0, dim, 2, dtype=torch.float32) / dim


def _proportional(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    num_turning = int(rope.partial_rotary_factor * head_dim // 2)
    inv_freq = torch.zeros(head_dim // 2)
    inv_freq[:num_turning] = _default(rope.theta, head_dim)[:num_turning]
    return inv_freq.div_(rope.parameters.get("factor", 1.0))


def _dynamic_theta(rope: RopeConfig, dim: int, max_model_len: int) -> float:
    factor = rope.parameters["factor"]
    length = max(max_model_len, rope.max_position_embeddings)
    stretch = factor * length / rope.max_position_embeddings - (factor - 1)
    return float(rope.theta * stretch ** (dim / (dim - 2)))


def _context_extension(rope: RopeConfig) -> float:
    """How many times longer the context became; the configs' own number goes first."""
    factor = rope.parameters.get("factor")
    if factor is not None:
        return float(factor)
    return rope.max_position_embeddings / rope.original_max_position_embeddings


def _yarn(rope: RopeConfig, dim: int) -> tuple[torch.Tensor, float]:
    extra = rope.parameters
    factor = _context_extension(rope)
    attention_factor = extra.get("attention_factor")
    if attention_factor is None:
        numerator, denominator = extra.get("mscale"), extra.get("mscale_all_dim")
        if numerator and denominator:
            attention_factor = yarn_mscale(factor, numerator) / yarn_mscale(factor, denominator)
        else:
            attention_factor = yarn_mscale(factor, 1.0)

    def pair_with_rotations(num_rotations: float) -> float:
        """Index of the pair that turns so often within the original context."""
        wavelength = rope.original_max_position_embeddings / (num_rotations * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low = pair_with_rotations(extra.get("beta_fast") or 32)
    high = pair_with_rotations(extra.get("beta_slow") or 1)
    if extra.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001  # a step instead of a division by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)

    wavelengths = torch.pow(rope.theta, _exponents(dim))
    kept, stretched = 1.0 / wavelengths, 1.0 / (factor * wavelengths)
    # `1 - (1 - ramp)` is not `ramp` in float32; transformers rounds here, and so do we.
    share_kept = 1 - ramp
    return stretched * (1 - share_kept) + kept * share_kept, float(attention_factor)


def yarn_mscale(factor: float, mscale: float) -> float:
    """Factor on cos and sin for a context that became `factor` times longer."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(rope: RopeConfig, dim: int, max_model_len: int) -> tuple[torch.Tensor, float]:
    extra = rope.parameters
    original = rope.original_max_position_embeddings
    attention_factor = extra.get("attention_factor")
    if attention_factor is None:
        factor = _context_extension(rope)
        attention_factor = (
            1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        )
    is_long = max_model_len > original
    divisors = torch.tensor(
        extra["long_factor" if is_long else "short_factor"], dtype=torch.float32
    )
    return 1.0 / (divisors * torch.pow(rope.theta, _exponents(dim))), float(attention_factor)


def _llama3(rope: RopeConfig, dim: int) -> torch.Tensor:
    extra = rope.parameters
    factor, low, high = extra["factor"], extra["low_freq_factor"], extra["high_freq_factor"]
    original = rope.original_max_position_embeddings
    inv_freq = _default(rope.theta, dim)
    wavelength = 2 * math.pi / inv_freq
    # 0 for pairs that turn less than `low` times within the original context, 1 above `high`.
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    stretched = torch.where(wavelength > original / low, inv_freq / factor, blended)
    return torch.where(wavelength < original / high, inv_freq, stretched)
