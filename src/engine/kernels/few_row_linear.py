"""Matrix products of few rows, at the speed of reading the weight, with what surrounds them fused.

    few_row_linear:  y = x W^T + b
    normed_linear:   y = norm(hidden) W^T + b, or act(gate) * up of that y = (gate, up)
    add_linear:      hidden += x W^T + b, and the sums of squares that the next norm divides by

With few rows the weight is nearly all the bytes there are, so each program reads some rows of it
once, whole, and no program waits for another: tiles are as narrow (16 weight rows) as it takes for
every SM to have work without cutting K, whose partial sums would be read back by everybody.

A norm needs the whole row, but only as one number. Whoever writes the residual stream knows its
own columns' sum of squares: `squares` [T, P] holds P such parts per row (one per program), and the
programs of the next product add them up in order. So a layer needs no norm kernel at all.

| argument        | shape, dtype                    | duty                                        |
|-----------------|---------------------------------|---------------------------------------------|
| x_ptr           | [T, K] bf16, fp16 or fp32       | stride 1 along K, any along T               |
| weight_ptr      | [N, K], x's dtype               | likewise; gated: [2 N, K], gate above up    |
| bias_ptr        | [N] or [2 N], any float dtype   | contiguous; None: no bias                   |
| norm_weight_ptr | [K], any float dtype            | contiguous; None: no norm                   |
| squares_ptr     | [T, P] fp32                     | contiguous; sums over parts of K            |
| out_ptr         | [T, N], x's dtype               | contiguous; the residual stream, any stride |
|                 |                                 | along T, where it is added to               |
| new_squares_ptr | [T, ceil(N / COLS)] fp32     | contiguous                                  |

Grid (ceil(N / COLS), ceil(T / BLOCK_M)): one program sums all of K for BLOCK_N weight rows (for
a gated product BLOCK_N of gate and the same of up), see `few_row_product`.

Numerics: products summed in fp32 in the order of k, in fixed trees; every rounding to the dtype is
where the separate kernels round (see `rms_norm`, `act_mul`; y is rounded before it joins the
residual stream). fp32 inputs are multiplied as IEEE fp32. No atomics: the same input gives the same
bits. A row does not depend on the other rows of a product, only on the tiles, and so on the bucket
of T. Row offsets are int64.

constexpr: tiles, switches, BLOCK_SQUARES (a power of two >= P). T is not specialised.
Tiles come from `few_row_tiles`, measured there.

USE_PDL (the sweep only): programs start while the kernel before them still runs (programmatic
dependent launch),
bring the head of their weight rows to L2, then wait for it to end. Hopper and later.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.errors import ConfigError
from engine.kernels.act_mul import activate
from engine.kernels.compile_ahead import launchable
from engine.kernels.few_row_product import await_input, products, row_scales, row_sums
from engine.kernels.few_row_tiles import FewRowTiles, tiles_for
from engine.kernels.reference import ACTIVATIONS, unknown_activation_message


@launchable
@triton.jit(do_not_specialize=["num_rows"])
def _few_row_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    squares_ptr,
    out_ptr,
    new_squares_ptr,
    num_rows,
    num_cols,
    num_inner,
    stride_x_row,
    stride_weight_row,
    stride_out_row,
    num_squares,
    eps,
    weight_offset,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK_SQUARES: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    USE_PDL: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,
):
    tile = tl.program_id(0)
    in_tile = tl.arange(0, BLOCK_N)
    cols = tile * COLS + in_tile
    is_col = (in_tile < COLS) & (cols < num_cols)
    safe_cols = tl.where(is_col, cols, 0)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < num_rows

    is_gated: tl.constexpr = ACTIVATION != ""
    weight_ptrs = weight_ptr + safe_cols.to(tl.int64) * stride_weight_row
    up_offset = num_cols.to(tl.int64) * stride_weight_row
    if USE_PDL:
        await_input(weight_ptrs, up_offset, num_inner, is_gated, PREFETCH_LINES)
    scale = tl.zeros([BLOCK_M], tl.float32)
    if HAS_NORM:
        scale = row_scales(squares_ptr, num_squares, rows, is_row, num_inner, eps, BLOCK_SQUARES)
    acc, acc_up = products(
        x_ptr + rows.to(tl.int64) * stride_x_row,
        is_row,
        scale,
        weight_ptrs,
        is_col,
        up_offset,
        norm_weight_ptr,
        num_inner,
        weight_offset,
        HAS_NORM,
        HAS_OFFSET,
        is_gated,
        EVEN_K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        NUM_STAGES,
    )

    dtype = out_ptr.dtype.element_ty
    y = row_sums(acc, bias_ptr, safe_cols, HAS_BIAS, BLOCK_M).to(dtype)
    if is_gated:
        up = row_sums(acc_up, bias_ptr, num_cols + safe_cols, HAS_BIAS, BLOCK_M).to(dtype)
        y = activate(y.to(tl.float32), up.to(tl.float32), dtype, ACTIVATION)
    out_ptrs = out_ptr + rows.to(tl.int64)[None, :] * stride_out_row + cols[:, None]
    mask = is_row[None, :] & is_col[:, None]
    if ADDS:
        wide = y.to(tl.float32) + tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
        y = wide.to(dtype)
        rounded = tl.where(is_col[:, None], y.to(tl.float32), 0.0)
        tl.store(
            new_squares_ptr + rows * tl.num_programs(0) + tile,
            tl.sum(rounded * rounded, axis=0),
            mask=is_row,
        )
    tl.store(out_ptrs, y, mask=mask)


def few_row_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `reference.few_row_linear`."""
    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[0])
    _launch(x, weight, bias, out, tiles_for("plain", x, weight))
    return out


def normed_linear(
    hidden: torch.Tensor,
    squares: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    weight_offset: float = 0.0,
    activation: str | None = None,
) -> torch.Tensor:
    """See `reference.normed_linear`."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ConfigError(unknown_activation_message(activation))
    num_cols = weight.shape[0] if activation is None else weight.shape[0] // 2
    out = hidden.new_empty(hidden.shape[0], num_cols)
    _launch(
        hidden,
        weight,
        bias,
        out,
        tiles_for("normed" if activation is None else "gated", hidden, weight),
        norm=(squares, norm_weight, eps, weight_offset),
        activation=activation or "",
    )
    return out


def add_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    hidden: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `reference.add_linear`. `hidden` needs stride 1 along H, being written in place."""
    tiles = tiles_for("adding", x, weight)
    parts = triton.cdiv(weight.shape[0], tiles.num_cols)
    squares = torch.empty((x.shape[0], parts), dtype=torch.float32, device=x.device)
    _launch(x, weight, bias, hidden, tiles, new_squares=squares)
    return squares


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tiles: FewRowTiles,
    *,
    norm: tuple[torch.Tensor, torch.Tensor, float, float] | None = None,
    activation: str = "",
    new_squares: torch.Tensor | None = None,
) -> None:
    num_rows, num_inner = x.shape
    if not num_rows:
        return
    if x.stride(1) != 1:
        x = x.contiguous()
    squares, norm_weight, eps, weight_offset = norm or (None, None, 0.0, 0.0)
    num_squares = 1 if squares is None else squares.shape[1]
    num_cols = out.shape[1]
    grid = (triton.cdiv(num_cols, tiles.num_cols), triton.cdiv(num_rows, tiles.block_m))
    _few_row_kernel[grid](
        x,
        weight,
        bias,
        norm_weight,
        squares,
        out,
        new_squares,
        num_rows,
        num_cols,
        num_inner,
        x.stride(0),
        weight.stride(0),
        out.stride(0),
        num_squares,
        eps,
        weight_offset,
        HAS_BIAS=bias is not None,
        HAS_NORM=norm is not None,
        HAS_OFFSET=weight_offset != 0.0,
        ACTIVATION=activation,
        ADDS=new_squares is not None,
        BLOCK_SQUARES=triton.next_power_of_2(num_squares),
        EVEN_K=num_inner % tiles.block_k == 0,
        BLOCK_M=tiles.block_m,
        COLS=tiles.num_cols,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        NUM_STAGES=tiles.num_stages,
        USE_PDL=tiles.use_pdl,
        PREFETCH_LINES=tiles.prefetch_lines,
        num_warps=tiles.num_warps,
        enable_fp_fusion=True,
        launch_pdl=tiles.use_pdl,
    )
