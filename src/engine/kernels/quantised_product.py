"""Product of some rows with a weight of integer codes, on tensor cores.

    y[m, n] = sum_k x[m, k] w[n, k] + bias[n],  w as in `quantised_layout`, rounded to x's dtype

| argument       | shape, dtype                 | duty                                       |
|----------------|------------------------------|--------------------------------------------|
| x_ptr          | [M, K] bf16, fp16 or fp32    | stride 1 along K, any along M              |
| planes, scales | of a `CodePlanes`          | see there; what is not there: None         |
| bias_ptr       | [N], any float dtype         | contiguous; None: no bias                  |
| out_ptr        | [M, N], any float dtype      | stride 1 along N, any along M              |
| parts_ptr      | [S, M, N] fp32               | contiguous; None where S is 1              |
| arrivals_ptr   | [tiles] int32                | zeros before and after                     |

Grid (tiles of M and N, S): a program has BLOCK_N rows of the weight, which are the left operand
of the products, BLOCK_M rows of x, and one of S parts of K. Codes become numbers in registers,
on their way to the tensor cores. With S above 1 the last program to finish a tile adds up the
parts in their order, so that the result does not depend on who was last.

Numerics: w, without its factor, is computed in fp32 and rounded once to x's dtype, as the
dequantised weight of a half-precision model would be; products are summed in fp32 in the order of
k. A row's bits depend on its own x and on the tiles, not on its neighbours. fp32 x is multiplied as
IEEE fp32. Offsets of rows are int64. constexpr: what the weight is like, and tiles, not M.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.compile_ahead import launchable
from engine.kernels.quantised_layout import CodePlanes
from engine.kernels.quantised_tiles import ProductTiles
from engine.kernels.quantised_unpack import (
    group_of,
    growth_of,
    load_words,
    scale_and_minimum,
    strip_weights,
)


@triton.jit
def add_bundle(
    acc,
    x_ptrs,
    word,
    word_rows,
    cols,
    main_ptr,
    extra_ptr,
    scales_ptr,
    minima_ptr,
    table_ptr,
    bundle,
    num_cols,
    num_inner,
    num_groups,
    GROUP: tl.constexpr,
    SUB: tl.constexpr,
    MAIN_BITS: tl.constexpr,
    EXTRA: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """`acc` [BLOCK_N, BLOCK_M] and the products of a bundle of 128 columns, strip by strip.

    `word` is [16], `word_rows` [BLOCK_N, 16] int64 are places of the first bundle's words, `cols`
    [BLOCK_N] int64 the weight's rows in [0, num_cols), and `x_ptrs` [BLOCK_M, 16] of column 0.
    """
    places = word_rows + bundle * 16
    main, second, extra = load_words(main_ptr, extra_ptr, places, MAIN_BITS, EXTRA, EXPONENT_BITS)
    for strip in tl.static_range(0, 8):
        if strip % SUB == 0:
            group = group_of(bundle, strip, num_groups, GROUP).to(tl.int64)
            scale, minimum = scale_and_minimum(
                scales_ptr, minima_ptr, group * num_cols + cols, ZERO, HAS_MINIMA
            )
        k = bundle * 128 + strip * 16
        if EVEN_K:
            x = tl.load(x_ptrs + k)
        else:
            x = tl.load(x_ptrs + k, mask=(k + word < num_inner)[None, :], other=0.0)
        weight = strip_weights(
            main,
            second,
            extra,
            table_ptr,
            scale[:, None],
            minimum[:, None],
            strip,
            MAIN_BITS,
            EXTRA,
            EXPONENT_BITS,
            HAS_TABLE,
        )
        if x.dtype == tl.float16:
            weight *= growth_of(EXPONENT_BITS, HAS_TABLE)
        acc = tl.dot(weight.to(x.dtype), tl.trans(x), acc, input_precision="ieee")
    return acc


@launchable
@triton.jit(do_not_specialize=["num_rows"])
def _product_kernel(
    x_ptr,
    main_ptr,
    extra_ptr,
    scales_ptr,
    minima_ptr,
    table_ptr,
    bias_ptr,
    out_ptr,
    parts_ptr,
    arrivals_ptr,
    num_rows,
    num_cols,
    num_inner,
    num_bundles,
    num_groups,
    stride_x_row,
    stride_out_row,
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
    IS_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    tile = tl.program_id(0)
    part = tl.program_id(1)
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    rows = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_rows = tl.minimum(rows, num_rows - 1)
    safe_cols = tl.minimum(cols, num_cols - 1).to(tl.int64)
    word = tl.arange(0, 16)
    word_rows = safe_cols[:, None] * (num_bundles * 16) + word[None, :]
    x_ptrs = x_ptr + safe_rows.to(tl.int64)[:, None] * stride_x_row + word[None, :]

    num_parts = tl.num_programs(1)
    bundles_per_part = tl.cdiv(num_bundles, num_parts)
    first = part * bundles_per_part
    last = tl.minimum(first + bundles_per_part, num_bundles)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for bundle in tl.range(first, last, num_stages=NUM_STAGES):
        acc = add_bundle(
            acc,
            x_ptrs,
            word,
            word_rows,
            safe_cols,
            main_ptr,
            extra_ptr,
            scales_ptr,
            minima_ptr,
            table_ptr,
            bundle,
            num_cols,
            num_inner,
            num_groups,
            GROUP,
            SUB,
            MAIN_BITS,
            EXTRA,
            EXPONENT_BITS,
            ZERO,
            HAS_MINIMA,
            HAS_TABLE,
            EVEN_K,
        )

    is_there = (rows < num_rows)[None, :] & (cols < num_cols)[:, None]
    wide_rows = rows.to(tl.int64)[None, :]
    if IS_SPLIT:
        part_ptrs = parts_ptr + wide_rows * num_cols + cols[:, None]
        stride_part = num_rows.to(tl.int64) * num_cols
        tl.store(part_ptrs + part * stride_part, acc, mask=is_there)
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") != num_parts - 1:
            return
        tl.store(arrivals_ptr + tile, 0)
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for other in range(num_parts):
            acc += tl.load(
                part_ptrs + other * stride_part, mask=is_there, other=0.0, cache_modifier=".cg"
            )
    if x_ptr.dtype.element_ty != tl.float16:
        factor *= growth_of(EXPONENT_BITS, HAS_TABLE)
    acc *= factor
    if HAS_BIAS:
        acc += tl.load(bias_ptr + safe_cols).to(tl.float32)[:, None]
    out_ptrs = out_ptr + wide_rows * stride_out_row + cols[:, None]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=is_there)


def matrix_product(
    x: torch.Tensor,
    weight: CodePlanes,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tiles: ProductTiles,
) -> None:
    """Write the product of x [M, K], stride 1 along K, to `out` [M, N], stride 1 along N."""
    num_rows = x.shape[0]
    num_cols, num_inner = weight.shape
    num_tiles = triton.cdiv(num_rows, tiles.block_m) * triton.cdiv(num_cols, tiles.block_n)
    parts = None
    if tiles.split > 1:
        assert num_tiles <= weight.arrivals.shape[0], "more tiles than counters"
        parts = torch.empty((tiles.split, num_rows, num_cols), dtype=torch.float32, device=x.device)
    _product_kernel[(num_tiles, tiles.split)](
        x,
        *weight.planes,
        bias,
        out,
        parts,
        weight.arrivals,
        num_rows,
        num_cols,
        num_inner,
        weight.num_bundles,
        weight.scales.shape[0],
        x.stride(0),
        out.stride(0),
        weight.factor,
        **weight.constants,
        HAS_BIAS=bias is not None,
        EVEN_K=num_inner % 128 == 0,
        IS_SPLIT=tiles.split > 1,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        NUM_STAGES=tiles.num_stages,
        num_warps=tiles.num_warps,
        enable_fp_fusion=True,
    )
