"""What kernels that write an 8-bit KV cache share: `kv_cache.quantise`, as Triton's helpers.

Every step rounds as the plain twin does: the bits are the same.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scales_of(largest, LIMIT: tl.constexpr):
    """Of heads whose largest entry has the absolute value `largest`: (scales, their inverses)."""
    limits = tl.zeros_like(largest) + LIMIT
    # 2^-100, as in `kv_cache.quantise`
    inverses = tl.div_rn(limits, tl.maximum(largest, 7.888609052210118e-31))
    return tl.div_rn(largest, limits), inverses


@triton.jit
def stored_numbers(x, inverses, dtype: tl.constexpr, LIMIT: tl.constexpr):
    """Heads [H, D] fp32 -> the numbers that a cache of `dtype` holds, in fp32.

    Adding a number whose last place is the step wanted rounds to that step, ties to even. (Triton's
    own conversion to fp8 rounds likewise, but loses carries in the interpreter.)
    """
    # The bounds keep the product, which is rounded by itself, and the sum below apart.
    ratios = tl.minimum(tl.maximum(x * inverses[:, None], -LIMIT), LIMIT)
    if dtype == tl.int8:
        large = 12582912.0  # 1.5 * 2^23: steps of 1
    else:
        # 8 steps from a power of two to the next; 2^-6 is the smallest that has its own.
        power = tl.maximum(tl.abs(ratios), 0.015625).to(tl.int32, bitcast=True) & 0x7F800000
        large = power.to(tl.float32, bitcast=True) * 1572864.0  # 1.5 * 2^20
    return (ratios + large) - large
