"""What the kernels for few rows share: one program's product of weight rows with a few rows of x.

    products:  weight x^T, or weight norm(x)^T, of one or two groups of BLOCK_N weight rows

The weight is the left operand, so that its rows are the 16 (or, by warp groups, 64) rows of a
tensor core product and the few rows of x its columns. With one row of x (BLOCK_M 1) there is no
matrix: plain multiplications, summed at the end (`row_sums`).

Loads run NUM_STAGES - 1 rounds ahead of the products. Sums are fp32, in the order of k and in fixed
trees; the norm rounds as `rms_norm` does. See `few_row_linear` for the arguments.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.rms_norm import apply_norm


@triton.jit
def row_scales(squares_ptr, num_squares, rows, is_row, num_inner, eps, BLOCK_SQUARES: tl.constexpr):
    """1 / rms of each row, from the parts of its sum of squares, [BLOCK_M] fp32."""
    parts = tl.arange(0, BLOCK_SQUARES)
    squares = tl.load(
        squares_ptr + rows[:, None] * num_squares + parts[None, :],
        mask=is_row[:, None] & (parts < num_squares)[None, :],
        other=0.0,
    )
    return tl.rsqrt(tl.sum(squares, axis=1) / num_inner + eps)


@triton.jit
def products(
    x_ptrs,
    is_row,
    scale,
    weight_ptrs,
    is_col,
    second_offset,
    norm_weight_ptr,
    num_inner,
    weight_offset,
    HAS_NORM: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Sums for the weight rows at `weight_ptrs` and, HAS_SECOND, `second_offset` entries further.

    Each is [BLOCK_N, BLOCK_M] fp32 for `row_sums`; [BLOCK_N, BLOCK_K] where BLOCK_M is 1.
    """
    inner = tl.arange(0, BLOCK_K)
    if HAS_NORM:
        norm_weight = tl.load(norm_weight_ptr + inner, mask=inner < num_inner, other=0.0)
    acc = tl.zeros([BLOCK_N, BLOCK_K if BLOCK_M == 1 else BLOCK_M], tl.float32)
    second = acc
    for k in tl.range(0, num_inner, BLOCK_K, num_stages=NUM_STAGES):
        weight = _weight_tile(weight_ptrs, is_col, k, inner, num_inner, EVEN_K)
        x = _input_tile(x_ptrs, is_row, k, inner, num_inner, EVEN_K)
        if HAS_NORM:
            x = apply_norm(
                x.to(tl.float32),
                scale[:, None],
                norm_weight[None, :],
                weight_offset,
                x.dtype,
                HAS_OFFSET,
            )
            # One round ahead: Triton's pipeliner leaves this load where it stands.
            ahead = k + BLOCK_K + inner
            norm_weight = tl.load(norm_weight_ptr + ahead, mask=ahead < num_inner, other=0.0)
        acc = _add_product(acc, weight, x, BLOCK_M)
        if HAS_SECOND:
            weight = _weight_tile(weight_ptrs + second_offset, is_col, k, inner, num_inner, EVEN_K)
            second = _add_product(second, weight, x, BLOCK_M)
    return acc, second


@triton.jit
def _weight_tile(weight_ptrs, is_col, k, inner, num_inner, EVEN_K: tl.constexpr):
    """[BLOCK_N, BLOCK_K], zero outside."""
    mask = is_col[:, None]
    if not EVEN_K:
        mask = mask & (k + inner < num_inner)[None, :]
    return tl.load(weight_ptrs[:, None] + (k + inner)[None, :], mask=mask, other=0.0)


@triton.jit
def _input_tile(x_ptrs, is_row, k, inner, num_inner, EVEN_K: tl.constexpr):
    """[BLOCK_M, BLOCK_K] of x, zero outside."""
    mask = is_row[:, None]
    if not EVEN_K:
        mask = mask & (k + inner < num_inner)[None, :]
    return tl.load(x_ptrs[:, None] + (k + inner)[None, :], mask=mask, other=0.0)


@triton.jit
def _add_product(acc, weight, x, BLOCK_M: tl.constexpr):
    """Add weight x^T: [BLOCK_N, BLOCK_M], or before the sum over k where there is one row."""
    if BLOCK_M == 1:
        acc += weight.to(tl.float32) * x.to(tl.float32)
    else:
        acc = tl.dot(weight, tl.trans(x), acc, input_precision="ieee")
    return acc


@triton.jit
def row_sums(acc, bias_ptr, cols, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr):
    """What `products` summed, with the bias, [BLOCK_N, BLOCK_M] fp32."""
    if BLOCK_M == 1:
        acc = tl.sum(acc, axis=1)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols).to(tl.float32)[:, None]
    return acc
