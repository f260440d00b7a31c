"""Product of one row with a weight of integer codes, at the speed of reading the codes.

    y[n] = sum_k x[k] w[n, k] + bias[n],  w as in `quantised_layout`

| argument       | shape, dtype                 | duty                                       |
|----------------|------------------------------|--------------------------------------------|
| x_ptr          | [K] bf16, fp16 or fp32       | contiguous                                 |
| planes, scales | of a `CodePlanes`          | see there; what is not there: None         |
| bias_ptr       | [N], any float dtype         | contiguous; None: no bias                  |
| out_ptr        | [N], any float dtype         | contiguous                                 |

Grid (ceil(N / BLOCK_N),): a program has BLOCK_N rows of the weight, and walks them BLOCK_B bundles
of 128 columns at a time. A thread has four words of a bundle of every row, so that what it reads of
x serves all of them. There is no matrix in a product of one row: plain multiplications, three
instructions for a weight where tensor cores would take more (the budget of an H100 at 3 TB/s of
4-bit codes is 4.8).

Numerics: x times units (see `quantised_unpack`) summed in fp32 over a group's columns within a
word, in the order of the strips, then scaled; bundles in order; words in a fixed tree. The weight
itself is never rounded to the dtype of x. The same input gives the same bits. Offsets of rows are
int64. constexpr: what the weight is like, tiles.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.compile_ahead import launchable
from engine.kernels.quantised_layout import CodePlanes
from engine.kernels.quantised_tiles import VectorTiles, vector_tiles
from engine.kernels.quantised_unpack import (
    group_of,
    growth_of_products,
    load_words,
    scale_and_minimum,
    strip_products,
)


@triton.jit
def _load_strip(x_ptr, bundles, STRIP: tl.constexpr, word, num_inner, EVEN_K: tl.constexpr):
    """X of a strip of the bundles, [BLOCK_B, 16] fp32, zero beyond K."""
    k = bundles[:, None] * 128 + STRIP * 16 + word[None, :]
    if EVEN_K:
        x = tl.load(x_ptr + k)
    else:
        x = tl.load(x_ptr + k, mask=k < num_inner, other=0.0)
    return x.to(tl.float32)


@launchable
@triton.jit
def _vector_kernel(
    x_ptr,
    main_ptr,
    extra_ptr,
    scales_ptr,
    minima_ptr,
    table_ptr,
    bias_ptr,
    out_ptr,
    num_cols,
    num_inner,
    num_bundles,
    num_groups,
    factor,
    GROUP: tl.constexpr,
    SUB: tl.constexpr,
    MAIN_BITS: tl.constexpr,
    EXTRA: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_cols = tl.minimum(cols, num_cols - 1)
    word_rows = safe_cols.to(tl.int64) * num_bundles
    word = tl.arange(0, 16)
    acc = tl.zeros([BLOCK_B, BLOCK_N, 16], tl.float32)
    for first in range(0, num_bundles, BLOCK_B):
        bundles = first + tl.arange(0, BLOCK_B)
        safe_bundles = tl.minimum(bundles, num_bundles - 1)
        places = (word_rows[None, :] + safe_bundles[:, None]) * 16
        places = places[:, :, None] + word[None, None, :]
        main, second, extra = load_words(
            main_ptr, extra_ptr, places, MAIN_BITS, EXTRA, EXPONENT_BITS
        )
        for part in tl.static_range(0, 8, SUB):
            # The sum of x comes first: what it subtracts is then where the products start, and
            # costs nothing. The loads below are the same ones again, which the compiler drops.
            products = tl.zeros([BLOCK_B, BLOCK_N, 16], tl.float32)
            x_sum = tl.zeros([BLOCK_B, 16], tl.float32)
            if HAS_MINIMA or ZERO != 0:
                for strip in tl.static_range(part, part + SUB):
                    x_sum += _load_strip(x_ptr, bundles, strip, word, num_inner, EVEN_K)
            if not HAS_MINIMA and ZERO != 0:
                products += x_sum[:, None, :] * (-ZERO * 2.0**-46)
            for strip in tl.static_range(part, part + SUB):
                x = _load_strip(x_ptr, bundles, strip, word, num_inner, EVEN_K)
                products = strip_products(
                    products,
                    main,
                    second,
                    extra,
                    table_ptr,
                    x,
                    strip,
                    MAIN_BITS,
                    EXTRA,
                    EXPONENT_BITS,
                    HAS_TABLE,
                )
            group = group_of(safe_bundles, part, num_groups, GROUP)
            places_of_scales = group[:, None] * num_cols + safe_cols[None, :]
            scale, minimum = scale_and_minimum(
                scales_ptr, minima_ptr, places_of_scales, ZERO, HAS_MINIMA
            )
            scale *= growth_of_products(EXPONENT_BITS, HAS_TABLE)
            acc += scale[:, :, None] * products
            if HAS_MINIMA:
                acc += minimum[:, :, None] * x_sum[:, None, :]
    y = tl.sum(tl.sum(acc, axis=2), axis=0) * factor
    if HAS_BIAS:
        y += tl.load(bias_ptr + safe_cols).to(tl.float32)
    tl.store(out_ptr + cols, y.to(out_ptr.dtype.element_ty), mask=cols < num_cols)


def vector_product(
    x: torch.Tensor,
    weight: CodePlanes,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tiles: VectorTiles | None = None,
) -> None:
    """Write the product of x [1, K], contiguous, to `out` [1, N], stride 1 along N."""
    num_cols, num_inner = weight.shape
    tiles = tiles or vector_tiles(weight)
    _vector_kernel[(triton.cdiv(num_cols, tiles.block_n),)](
        x,
        *weight.planes,
        bias,
        out,
        num_cols,
        num_inner,
        weight.num_bundles,
        weight.scales.shape[0],
        weight.factor,
        **weight.constants,
        HAS_BIAS=bias is not None,
        EVEN_K=num_inner % (128 * tiles.block_b) == 0,
        BLOCK_N=tiles.block_n,
        BLOCK_B=tiles.block_b,
        num_warps=tiles.num_warps,
        enable_fp_fusion=True,
    )
