"""8-bit numbers of a KV cache on their way to the tensor cores, few instructions each.

A tile of values [keys, D] meets the tensor cores with its keys along the sum, and memory has its
columns side by side. Matrix loads turn 16-bit numbers round on their way out of shared memory, but
not 8-bit ones, and left to itself the compiler fetches those byte by byte. So values are loaded two
columns at a time, as 16-bit numbers, and widened before they enter shared memory: into all even
columns, then all odd ones.

bfloat16 from int8: with x = low - 128 s, where low has 7 bits and s is the sign bit,
    0x4300 | low = 128 + low;  0x4300 | 128 s = 128 + 128 s;  their difference is x, exactly.
bfloat16 from e4m3: the sign, and the other 7 bits as the lower 4 of the exponent and the upper 3 of
    the mantissa, are x * 2^-120, subnormal numbers included.
A loop over 128 keys, D = 128: 1471 instructions for int8 and 1624 for e4m3, against 1806 and 1723,
of which 256 slow ones, with the compiler's conversions and bytes (triton 3.9, sm_90).
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def columns_of_pairs(pairs, dtype: tl.constexpr, IS_INT8: tl.constexpr, IS_ASSEMBLED: tl.constexpr):
    """[N, D / 2] int16, two columns each -> [N, D] of `dtype`: the even columns, then the odd ones.

    IS_ASSEMBLED: In machine code, for bfloat16 on compute capability 9.0 and above.
    """
    if IS_ASSEMBLED:
        if IS_INT8:
            even, odd = tl.inline_asm_elementwise(
                """
                {
                .reg .b32 t, low, high;
                lop3.b32 low, $2, 0x007f007f, 0x43004300, 0xea;
                lop3.b32 high, $2, 0x00800080, 0x43004300, 0xea;
                sub.bf16x2 $0, low, high;
                shr.b32 t, $2, 8;
                lop3.b32 low, t, 0x007f007f, 0x43004300, 0xea;
                lop3.b32 high, t, 0x00800080, 0x43004300, 0xea;
                sub.bf16x2 $1, low, high;
                }
                """,
                "=r,=r,r",
                [pairs],
                dtype=(tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=2,
            )
        else:
            even, odd = tl.inline_asm_elementwise(
                """
                {
                .reg .b32 t, sign, rest, power;
                mov.b32 power, 0x7b807b80;
                shl.b32 t, $2, 8;
                and.b32 sign, t, 0x80008000;
                shl.b32 t, $2, 4;
                lop3.b32 rest, t, 0x07f007f0, sign, 0xea;
                mul.bf16x2 $0, rest, power;
                and.b32 sign, $2, 0x80008000;
                shr.b32 t, $2, 4;
                lop3.b32 rest, t, 0x07f007f0, sign, 0xea;
                mul.bf16x2 $1, rest, power;
                }
                """,
                "=r,=r,r",
                [pairs],
                dtype=(tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=2,
            )
    elif IS_INT8:
        even = ((pairs << 8) >> 8).to(dtype)
        odd = (pairs >> 8).to(dtype)
    else:
        even = pairs.to(tl.int8).to(tl.float8e4nv, bitcast=True).to(dtype)
        odd = (pairs >> 8).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(dtype)
    both = tl.permute(tl.join(even, odd), (0, 2, 1))
    return tl.reshape(both, (pairs.shape[0], 2 * pairs.shape[1]))


@triton.jit
def widened(x, dtype: tl.constexpr, IS_INT8: tl.constexpr, IS_ASSEMBLED: tl.constexpr):
    """8-bit numbers as `dtype`; IS_ASSEMBLED as in `columns_of_pairs`."""
    if IS_ASSEMBLED and not IS_INT8:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t, sign, rest, power;
            mov.b32 power, 0x7b807b80;
            prmt.b32 t, $2, 0, 0x1404;
            and.b32 sign, t, 0x80008000;
            shr.b32 t, t, 4;
            lop3.b32 rest, t, 0x07f007f0, sign, 0xea;
            mul.bf16x2 $0, rest, power;
            prmt.b32 t, $2, 0, 0x3424;
            and.b32 sign, t, 0x80008000;
            shr.b32 t, t, 4;
            lop3.b32 rest, t, 0x07f007f0, sign, 0xea;
            mul.bf16x2 $1, rest, power;
            }
            """,
            "=r,=r,r",
            [x],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    else:  # noqa: RET505 - a compile-time branch: only one of them is traced
        return x.to(dtype)
