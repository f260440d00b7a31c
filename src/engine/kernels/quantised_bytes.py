"""Rows of x as bytes, for the library's products of bytes with bytes (W8A8).

    scale[m] = max_k |x[m, k]| / limit;   codes[m, p] = round(x[m, order(p)] / scale[m])

with limit 448 for e4m3 and 127 for int8: every row has its own scale, taken when it comes, so that
no calibration is needed and no row depends on another. `order` is that of the weight's bytes (see
`quantised_layout.byte_order`), which costs nothing here.

| argument   | shape, dtype                   | duty                               |
|------------|--------------------------------|------------------------------------|
| x_ptr      | [M, K] bf16, fp16 or fp32      | stride 1 along K, any along M      |
| codes_ptr  | [M, 128 bundles] e4m3 or int8  | contiguous; zeros beyond K         |
| scales_ptr | [M] fp32                       | contiguous                         |

    scale_sums:  out[m, n] = sums[m, n] x_scale[m] w_scale[n] + bias[n]

takes the int32 sums of the product of int8 back. Both walk a row in rounds of BLOCK columns, one
program for a row, the second for a part of a row. A row of zeros has any scale.
Numerics: fp32, one rounding (to even). Offsets of rows are int64. M is not specialised.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.compile_ahead import launchable
from engine.kernels.quantised_layout import CodePlanes

_BLOCK = 2048


@launchable
@triton.jit
def _quantise_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    num_inner,
    num_bytes,
    stride_x_row,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x_row
    codes_ptr += row * num_bytes
    places = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_inner, BLOCK):
        k = first + places
        x = tl.load(x_ptr + k, mask=k < num_inner, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    scale = tl.maximum(tl.max(largest, axis=0), 1e-30) / LIMIT
    tl.store(scales_ptr + row, scale)
    in_half = places % 64
    column = places // 64 * 64 + in_half % 4 * 16 + in_half // 4
    for first in range(0, num_bytes, BLOCK):
        k = first + column
        x = tl.load(x_ptr + k, mask=k < num_inner, other=0.0).to(tl.float32) / scale
        if LIMIT == 127:
            x = (x + 12582912.0) - 12582912.0  # to the nearest integer, by what float32 can hold
        at = first + places
        tl.store(codes_ptr + at, x.to(codes_ptr.dtype.element_ty), mask=at < num_bytes)


@launchable
@triton.jit
def _scale_sums_kernel(
    sums_ptr,
    x_scales_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    num_cols,
    stride_out_row,
    factor,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < num_cols
    sums = tl.load(sums_ptr + row * num_cols + cols, mask=mask, other=0).to(tl.float32)
    scales = tl.load(scales_ptr + cols, mask=mask, other=0.0).to(tl.float32) * factor
    y = sums * (scales * tl.load(x_scales_ptr + row))
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * stride_out_row + cols, y.to(out_ptr.dtype.element_ty), mask=mask)


def quantise_rows(
    x: torch.Tensor, num_bytes: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes [M, num_bytes] of `dtype` e4m3 or int8, scales [M] float32), new, of x [M, K]."""
    codes = torch.empty((x.shape[0], num_bytes), dtype=dtype, device=x.device)
    scales = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    _quantise_kernel[(x.shape[0],)](
        x,
        codes,
        scales,
        x.shape[1],
        num_bytes,
        x.stride(0),
        LIMIT=127 if dtype == torch.int8 else 448,
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return codes, scales


def bytes_product(
    x: torch.Tensor, weight: CodePlanes, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Write the product of x [M, K], stride 1 along K, as bytes, to `out` [M, N].

    For weights of bytes with one scale for a row, see `CodePlanes.multiplies_bytes`. Rows of x
    are rounded to 8 bits.
    """
    num_rows, num_cols = x.shape[0], weight.shape[0]
    stored = weight.main.view(num_cols, -1)
    if weight.exponent_bits:
        codes, scales = quantise_rows(x, 4 * stored.shape[1], torch.float8_e4m3fn)
        row_scales = weight.scales.view(1, num_cols) * weight.factor
        product = torch._scaled_mm(
            codes,
            stored.view(torch.float8_e4m3fn).t(),
            scale_a=scales[:, None],
            scale_b=row_scales,
            bias=None if bias is None else bias.to(torch.bfloat16),
            out_dtype=torch.bfloat16,
        )
        out.copy_(product)
        return
    codes, scales = quantise_rows(x, 4 * stored.shape[1], torch.int8)
    sums = torch._int_mm(codes, stored.view(torch.int8).t())
    _scale_sums_kernel[(num_rows, triton.cdiv(num_cols, _BLOCK))](
        sums,
        scales,
        weight.scales,
        bias,
        out,
        num_cols,
        out.stride(0),
        weight.factor,
        HAS_BIAS=bias is not None,
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
