"""What the fused products for a batch of decoding rows share: one tile's product on tensor cores.

    product:  x W^T of BLOCK_M rows of x and BLOCK_N rows of the weight, [BLOCK_M, BLOCK_N] fp32

Rows beyond the last are read as the last one, so that no load needs a mask; nobody stores them.
Loads run NUM_STAGES - 1 rounds ahead of the products. With SWAPPED the weight is the left operand:
its rows are then the 64 rows of a warp group's product, and the rows of x its columns, of which 16
are enough. Sums are fp32, in the order of k.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def await_input(weight_ptrs, num_inner, LINES: tl.constexpr):
    """Wait for the kernel before this one, with the head of the weight rows on its way to L2.

    For kernels launched with `launch_pdl`; lets the next one start early, too. Before the wait
    nothing but weights may be read: several kernels of a chain may be waiting at once.
    """
    gdc_launch_dependents()
    if LINES > 0:
        LINE: tl.constexpr = 1024 // weight_ptrs.dtype.element_ty.primitive_bitwidth
        starts = tl.arange(0, LINES) * LINE
        starts = tl.where(starts < num_inner, starts, 0)
        addresses = (weight_ptrs[:, None] + starts[None, :]).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [addresses],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    gdc_wait()


@triton.jit
def product(
    x_ptrs,
    weight_ptrs,
    num_inner,
    EVEN_K: tl.constexpr,
    SWAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Sums over K of the rows at `x_ptrs` [BLOCK_M] and `weight_ptrs` [BLOCK_N]."""
    inner = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptrs[:, None] + inner[None, :]
    weight_ptrs = weight_ptrs[:, None] + inner[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAPPED else [BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, num_inner, BLOCK_K, num_stages=NUM_STAGES):
        if EVEN_K:
            weight = tl.load(weight_ptrs + k)
            x = tl.load(x_ptrs + k)
        else:
            is_inner = (k + inner < num_inner)[None, :]
            weight = tl.load(weight_ptrs + k, mask=is_inner, other=0.0)
            x = tl.load(x_ptrs + k, mask=is_inner, other=0.0)
        if SWAPPED:
            acc = tl.dot(weight, tl.trans(x), acc, input_precision="ieee")
        else:
            acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
    return tl.trans(acc) if SWAPPED else acc


@triton.jit
def load_squares(
    squares_ptr, num_squares, rows, is_row, HAS_SCALE: tl.constexpr, BLOCK_SQUARES: tl.constexpr
):
    """The parts of each row's sum of squares, [BLOCK_M, BLOCK_SQUARES] fp32, where there are some.

    Loaded before the product and added up after it, so that nothing waits for them.
    """
    parts = tl.arange(0, BLOCK_SQUARES)
    mask = is_row[:, None] & (parts < num_squares)[None, :]
    squares = tl.zeros([rows.shape[0], BLOCK_SQUARES], tl.float32)
    if HAS_SCALE:
        squares = tl.load(
            squares_ptr + rows[:, None] * num_squares + parts[None, :], mask=mask, other=0.0
        )
    return squares


@triton.jit
def scale_rows(
    acc,
    squares,
    bias_ptr,
    cols,
    num_inner,
    eps,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """`acc / rms + bias` in fp32, where `squares` are those of the rows before their norm."""
    if HAS_SCALE:
        acc = acc * tl.rsqrt(tl.sum(squares, axis=1) / num_inner + eps)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols).to(tl.float32)[None, :]
    return acc


@triton.jit
def split_pairs(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Even and odd columns, which a thread holds beside each other, each [BLOCK_M, BLOCK_N / 2]."""
    return tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_N // 2, 2]))
