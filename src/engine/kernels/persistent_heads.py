"""Heads in halves, for attention within the persistent decode kernel.

Rotation mixes entry d of a head with entry d + D / 2. Vectors and tiles of heads come and stay as
two tensors, the first and the second halves, so that nothing has to move between threads for it.

Numerics: fp32, with the roundings of `rope_write_kv`.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.rms_norm import apply_norm


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def sum_halves(low, high, AXIS: tl.constexpr, THREADS: tl.constexpr):
    """Sums of both over an axis, in one go where threads have to meet for it."""
    if THREADS == 0:  # the interpreter would add one by one
        return tl.sum(low, axis=AXIS), tl.sum(high, axis=AXIS)
    else:  # noqa: RET505 - a compile-time branch
        return tl.reduce((low, high), AXIS, _add_both)


@triton.jit
def normed_halves(low, high, scale, low_weight, high_weight, weight_offset, HAS_OFFSET, DTYPE):
    """Halves of heads, fp32, normalised as `rope_write_kv` does."""
    low = apply_norm(low, scale, low_weight, weight_offset, DTYPE, HAS_OFFSET)
    high = apply_norm(high, scale, high_weight, weight_offset, DTYPE, HAS_OFFSET)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def turned_halves(low, high, cos, sin, DTYPE: tl.constexpr):
    """Halves of heads, rotated and rounded, fp32."""
    first = (low * cos - high * sin).to(DTYPE).to(tl.float32)
    return first, (high * cos + low * sin).to(DTYPE).to(tl.float32)


@triton.jit
def load_halves(cache_ptr, places, mask):
    """Both halves of the heads at `places`, [keys, D / 2] each."""
    low = tl.load(cache_ptr + places, mask=mask, other=0.0)
    high = tl.load(cache_ptr + places.shape[1] + places, mask=mask, other=0.0)
    return low, high


@triton.jit
def store_halves(cache_ptr, place, halves, low, high):
    """One head to its place in a cache."""
    dtype = cache_ptr.dtype.element_ty
    tl.store(cache_ptr + place + halves, low.to(dtype))
    tl.store(cache_ptr + place + halves.shape[0] + halves, high.to(dtype))


@triton.jit
def scaled_scores(scores, score_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores as exponents of 2; see `attention_tiles.softmax_step`."""
    if HAS_SOFTCAP:
        return softcap * (2.0 * tl.sigmoid(2.0 * score_scale * scores) - 1.0)
    else:  # noqa: RET505 - a compile-time branch
        return scores * score_scale
