"""What the kernels over `CodePlanes` share: words to codes, codes to numbers.

Codes become float32 by bit operations alone, where a conversion takes a slower unit:

| codes               | float32                                                                    |
|---------------------|----------------------------------------------------------------------------|
| integers            | stay where they are in the word; what a mask leaves of it is a denormal    |
|                     | number, code 2^(place - 149), and the scale is multiplied by the rest      |
| small floats (e4m3, | sign, exponent and mantissa are put in their places: 2^(128 - 2^(E-1))     |
| e2m1: E = 4 and 2)  | times too small, and denormal numbers stay denormal                        |
| of a table          | the table's entry                                                          |

So a weight of integers costs one bitwise operation and one multiplication, and every third word of
4-bit codes a shift. 2^149 does not fit float32: weights of integers are made 2^36 times too small
(`GROWTH`), which whoever uses them takes back from the sum.
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
def strip_weights(
    main,
    second,
    extra,
    table_ptr,
    scale,
    minimum,
    STRIP: tl.constexpr,
    MAIN_BITS: tl.constexpr,
    EXTRA: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
):
    """Weights of strip number STRIP, fp32, without the factor; of integers 2^36 times too small.

    `scale` and `minimum` are those of the strip's groups, in a shape that fits the words.
    """
    words = main
    if MAIN_BITS == 8 and STRIP >= 4:
        words = second
    IN_WORD: tl.constexpr = STRIP % 4 if MAIN_BITS == 8 else STRIP
    if HAS_TABLE:
        weight = table_entries(words, extra, table_ptr, IN_WORD, STRIP, MAIN_BITS, EXTRA)
        weight = weight * scale + minimum
    elif EXPONENT_BITS > 0:
        unit = float_bits(words, MAIN_BITS * IN_WORD, MAIN_BITS, EXPONENT_BITS)
        weight = unit * (scale * (2.0 ** (128 - 2 ** (EXPONENT_BITS - 1))))
    else:
        slope = scale * 2.0 ** (149 - 36 - place_of(IN_WORD, MAIN_BITS))
        weight = plane_bits(words, IN_WORD, MAIN_BITS) * slope + minimum * 2.0**-36
        if EXTRA > 0:
            slope = scale * 2.0 ** (149 - 36 - place_of(STRIP, EXTRA) + MAIN_BITS)
            weight += plane_bits(extra, STRIP, EXTRA) * slope
    return weight


@triton.jit
def growth_of(EXPONENT_BITS: tl.constexpr, HAS_TABLE: tl.constexpr):
    """What weights of `strip_weights` must be multiplied by."""
    growth = 1.0
    if EXPONENT_BITS == 0 and not HAS_TABLE:
        growth = 2.0**36
    return growth


@triton.jit
def strip_products(
    products,
    main,
    second,
    extra,
    table_ptr,
    x,
    STRIP: tl.constexpr,
    MAIN_BITS: tl.constexpr,
    EXTRA: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
):
    """`products` and those of strip number STRIP with x, too small by `growth_of_products`.

    X has a dimension of rows less. What codes lack in size (see the head of this module) it is
    multiplied by, once for all rows.
    """
    words = main
    if MAIN_BITS == 8 and STRIP >= 4:
        words = second
    IN_WORD: tl.constexpr = STRIP % 4 if MAIN_BITS == 8 else STRIP
    if HAS_TABLE:
        entry = table_entries(words, extra, table_ptr, IN_WORD, STRIP, MAIN_BITS, EXTRA)
        products += entry * x[:, None, :]
    elif EXPONENT_BITS > 0:
        unit = float_bits(words, MAIN_BITS * IN_WORD, MAIN_BITS, EXPONENT_BITS)
        products += unit * (x * 2.0**103)[:, None, :]
    else:
        lifted = x * 2.0 ** (149 - 46 - place_of(IN_WORD, MAIN_BITS))
        products += plane_bits(words, IN_WORD, MAIN_BITS) * lifted[:, None, :]
        if EXTRA > 0:
            lifted = x * 2.0 ** (149 - 46 - place_of(STRIP, EXTRA) + MAIN_BITS)
            products += plane_bits(extra, STRIP, EXTRA) * lifted[:, None, :]
    return products


@triton.jit
def growth_of_products(EXPONENT_BITS: tl.constexpr, HAS_TABLE: tl.constexpr):
    """What products of `strip_products` must be multiplied by."""
    growth = 2.0**46
    if HAS_TABLE:
        growth = 1.0
    elif EXPONENT_BITS > 0:
        growth = 2.0 ** (128 - 2 ** (EXPONENT_BITS - 1) - 103)
    return growth


@triton.constexpr_function
def shift_of(strip, bits):
    """How far words are shifted so that a strip's codes end below bit 23."""
    if bits * (strip + 1) <= 23:
        return 0
    return 12 if bits == 4 else 16


@triton.constexpr_function
def place_of(strip, bits):
    """Bit of the word at which `plane_bits` leaves a strip's codes."""
    return bits * strip - shift_of(strip, bits)


@triton.jit
def plane_bits(words, STRIP: tl.constexpr, BITS: tl.constexpr):
    """A plane's codes of a strip times 2^(place_of - 149), fp32."""
    MASK: tl.constexpr = ((1 << BITS) - 1) << place_of(STRIP, BITS)
    return ((words >> shift_of(STRIP, BITS)) & MASK).to(tl.float32, bitcast=True)


@triton.jit
def table_entries(
    words,
    extra,
    table_ptr,
    IN_WORD: tl.constexpr,
    STRIP: tl.constexpr,
    MAIN_BITS: tl.constexpr,
    EXTRA: tl.constexpr,
):
    """The table's entries for the codes of a strip."""
    if MAIN_BITS + EXTRA == 4:
        entry = _select(words, table_ptr, 4 * IN_WORD, 3, 0)
    else:
        code = (words >> (MAIN_BITS * IN_WORD)) & ((1 << MAIN_BITS) - 1)
        if EXTRA > 0:
            code |= ((extra >> (EXTRA * STRIP)) & ((1 << EXTRA) - 1)) << MAIN_BITS
        entry = tl.load(table_ptr + code)
    return entry


@triton.jit
def _select(words, table_ptr, PLACE: tl.constexpr, BIT: tl.constexpr, FIRST: tl.constexpr):
    """The entry from FIRST on that the bits up to BIT of the codes at PLACE choose.

    Fifteen selections: the entries are in registers, where a load for every code is twice as slow.
    """
    is_upper = (words & (1 << (PLACE + BIT) if PLACE + BIT < 31 else -(2**31))) != 0
    if BIT == 0:
        lower = tl.load(table_ptr + FIRST)
        upper = tl.load(table_ptr + FIRST + 1)
    else:
        lower = _select(words, table_ptr, PLACE, BIT - 1, FIRST)
        upper = _select(words, table_ptr, PLACE, BIT - 1, FIRST + (1 << BIT))
    return tl.where(is_upper, upper, lower)


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
def group_of(bundle, strip, num_groups, GROUP: tl.constexpr):
    """Number of the group that strip `strip` of a bundle belongs to; GROUP 0: there is one."""
    if GROUP == 0:
        group = bundle * 0
    else:
        group = tl.minimum((bundle * 8 + strip) // (GROUP // 16), num_groups - 1)
    return group
