"""Rows of a weight of integer codes as numbers: for lookups, and for products of very many rows.

    out[r] = w[rows[r]],  w as in `quantised_layout`, rounded once to the dtype of `out`

| argument       | shape, dtype              | duty                                     |
|----------------|---------------------------|------------------------------------------|
| rows_ptr       | [R] int64 in [0, N)       | contiguous; None: those from first_row   |
| planes, scales | of a `CodePlanes`       | see there; what is not there: None       |
| out_ptr        | [R, K], any float dtype   | contiguous                               |

Grid (ceil(R / BLOCK_N), ceil(bundles / BLOCK_B)). Numerics: fp32, one rounding. Offsets of rows are
int64. constexpr: what the weight is like, tiles; R is not specialised.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.compile_ahead import launchable
from engine.kernels.quantised_layout import CodePlanes
from engine.kernels.quantised_unpack import (
    group_of,
    growth_of,
    load_words,
    scale_and_minimum,
    strip_weights,
)

_BLOCK_N, _BLOCK_B = 4, 8


@launchable
@triton.jit(do_not_specialize=["num_rows", "first_row"])
def _expand_kernel(
    rows_ptr,
    main_ptr,
    extra_ptr,
    scales_ptr,
    minima_ptr,
    table_ptr,
    out_ptr,
    num_rows,
    first_row,
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
    HAS_ROWS: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = rows < num_rows
    cols = tl.minimum(rows, num_rows - 1).to(tl.int64)
    if HAS_ROWS:
        cols = tl.load(rows_ptr + cols)
    else:
        cols += first_row
    bundles = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    safe_bundles = tl.minimum(bundles, num_bundles - 1)
    word = tl.arange(0, 16)
    places = (cols[:, None] * num_bundles + safe_bundles[None, :]) * 16
    places = places[:, :, None] + word[None, None, :]
    main, second, extra = load_words(main_ptr, extra_ptr, places, MAIN_BITS, EXTRA, EXPONENT_BITS)
    factor *= growth_of(EXPONENT_BITS, HAS_TABLE)
    out_rows = out_ptr + rows.to(tl.int64) * num_inner
    for strip in tl.static_range(0, 8):
        if strip % SUB == 0:
            group = group_of(safe_bundles, strip, num_groups, GROUP)
            scale, minimum = scale_and_minimum(
                scales_ptr,
                minima_ptr,
                group[None, :] * num_cols + cols[:, None],
                ZERO,
                HAS_MINIMA,
            )
        weight = strip_weights(
            main,
            second,
            extra,
            table_ptr,
            scale[:, :, None],
            minimum[:, :, None],
            strip,
            MAIN_BITS,
            EXTRA,
            EXPONENT_BITS,
            HAS_TABLE,
        )
        weight *= factor
        k = bundles[:, None] * 128 + strip * 16 + word[None, :]
        tl.store(
            out_rows[:, None, None] + k[None, :, :],
            weight.to(out_ptr.dtype.element_ty),
            mask=is_row[:, None, None] & (k < num_inner)[None, :, :],
        )


def expand_rows(
    weight: CodePlanes, rows: torch.Tensor | None, out: torch.Tensor, first_row: int = 0
) -> None:
    """Write rows [R] int64, or those from `first_row` on, to `out` [R, K], contiguous."""
    num_rows = out.shape[0]
    num_cols, num_inner = weight.shape
    if not num_rows:
        return
    grid = (triton.cdiv(num_rows, _BLOCK_N), triton.cdiv(weight.num_bundles, _BLOCK_B))
    _expand_kernel[grid](
        rows,
        *weight.planes,
        out,
        num_rows,
        first_row,
        num_cols,
        num_inner,
        weight.num_bundles,
        weight.scales.shape[0],
        weight.factor,
        **weight.constants,
        HAS_ROWS=rows is not None,
        BLOCK_N=_BLOCK_N,
        BLOCK_B=_BLOCK_B,
        num_warps=4,
        enable_fp_fusion=True,
    )
