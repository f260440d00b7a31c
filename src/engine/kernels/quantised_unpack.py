"""What the kernels over `CodePlanes` share: words to codes, codes to numbers.

    weight = slope unit + offset

A unit is a float32 whose bits are those of the code, put where they need the least work; `slope`
and `offset` take back, once for a group, what that multiplies and adds:

| codes                | unit                                                              |
|----------------------|-------------------------------------------------------------------|
| integers             | 1 + code / 2^BITS: the code is the head of the mantissa           |
| of a table           | the table's entry                                                 |
| small floats (e4m3,  | sign, exponent and mantissa in their places, so 2^(128 - 2^(E-1)) |
| e2m1: E = 4 and 2)   | times too small: denormal numbers stay denormal                   |

One shift and one or two bitwise operations each, where a conversion takes a slower unit.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_words(
    main_ptr,
    extra_ptr,
    places,
    MAIN_BITS: tl.constexpr,
    EXTRA: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
):
    """Words of (main, main's second half, extra) at `places`, in words of a plane; int32.

    Where a plane is not there, `main` is returned again.
    """
    if MAIN_BITS == 8:
        halves = places // 16 * 32 + places % 16
        main = tl.load(main_ptr + halves)
        second = tl.load(main_ptr + halves + 16)
        if EXPONENT_BITS == 0:  # stored as signed bytes
            main ^= -2139062144  # 0x80808080
            second ^= -2139062144
    else:
        main = tl.load(main_ptr + places).to(tl.int32)
        second = main
    extra = main
    if EXTRA > 0:
        extra = tl.load(extra_ptr + places).to(tl.int32)
    return main, second, extra


@triton.jit
def strip_units(
    main,
    second,
    extra,
    table_ptr,
    STRIP: tl.constexpr,
    MAIN_BITS: tl.constexpr,
    EXTRA: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
):
    """Of strip number STRIP the units, fp32; see the head of this module."""
    PLACE: tl.constexpr = 8 * (STRIP % 4) if MAIN_BITS == 8 else MAIN_BITS * STRIP
    words = main
    if MAIN_BITS == 8 and STRIP >= 4:
        words = second
    if EXPONENT_BITS > 0:
        unit = float_bits(words, PLACE, MAIN_BITS, EXPONENT_BITS)
    else:
        code = (words >> PLACE) & ((1 << MAIN_BITS) - 1)
        if EXTRA > 0:
            code |= ((extra >> (EXTRA * STRIP)) & ((1 << EXTRA) - 1)) << MAIN_BITS
        if HAS_TABLE:
            unit = tl.load(table_ptr + code)
        else:
            unit = ((code << (23 - MAIN_BITS - EXTRA)) | 0x3F800000).to(tl.float32, bitcast=True)
    return unit


@triton.jit
def float_bits(words, PLACE: tl.constexpr, BITS: tl.constexpr, EXPONENT_BITS: tl.constexpr):
    """The small floats at bit PLACE of the words, as float32 of the same sign and fields."""
    MANTISSA_BITS: tl.constexpr = BITS - 1 - EXPONENT_BITS
    MASK: tl.constexpr = -(2**31) + (((1 << (BITS - 1)) - 1) << (23 - MANTISSA_BITS))
    aligned = (words << (32 - BITS - PLACE)) >> (8 - EXPONENT_BITS)
    return (aligned & MASK).to(tl.float32, bitcast=True)


@triton.jit
def scale_and_minimum(scales_ptr, minima_ptr, places, ZERO: tl.constexpr, HAS_MINIMA: tl.constexpr):
    """Scales and minima fp32 of the groups at `places`, without the weight's factor."""
    scale = tl.load(scales_ptr + places).to(tl.float32)
    if HAS_MINIMA:
        minimum = tl.load(minima_ptr + places).to(tl.float32)
    else:
        minimum = scale * -ZERO
    return scale, minimum


@triton.jit
def slope_and_offset(
    scale, minimum, BITS: tl.constexpr, EXPONENT_BITS: tl.constexpr, HAS_TABLE: tl.constexpr
):
    """What units are multiplied by, and what is added; see the head of this module."""
    slope = scale
    offset = minimum
    if EXPONENT_BITS > 0:
        slope = scale * (2.0 ** (128 - 2 ** (EXPONENT_BITS - 1)))
    elif not HAS_TABLE:
        slope = scale * (2.0**BITS)
        offset = minimum - slope
    return slope, offset


@triton.jit
def group_of(bundle, strip, num_groups, GROUP: tl.constexpr):
    """Number of the group that strip `strip` of a bundle belongs to; GROUP 0: there is one."""
    if GROUP == 0:
        group = bundle * 0
    else:
        group = tl.minimum((bundle * 8 + strip) // (GROUP // 16), num_groups - 1)
    return group
