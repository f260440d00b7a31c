"""Matrix products for a batch of decoding rows, with the norm, activation and residual sum around.

    scaled_linear:       y = (x W^T) / rms + b, or act(gate) * up of that y = (gate, up)
    add_weighed_linear:  hidden += x W^T + b;  x' = hidden * norm weight;  parts of its squares

A norm is a factor per column, its weight, and one per row, 1 / rms. Whoever writes the residual
stream multiplies by the first; the second is the same for a whole row, so the next product applies
it to its sums and its main loop is a product of two plain matrices. Between the products of a layer
no kernel of its own remains. This rounds once less than a norm kernel, whose x / rms is rounded
before it meets the weight.

| argument        | shape, dtype               | duty                                          |
|-----------------|----------------------------|-----------------------------------------------|
| x_ptr           | [T, K] bf16, fp16 or fp32  | stride 1 along K, any along T                 |
| weight_ptr      | [N, K], x's dtype          | likewise; gated: [2 N, K], gate above up      |
| bias_ptr        | [N] or [2 N], any float    | contiguous; None: no bias                     |
| squares_ptr     | [T, P] fp32                | contiguous; sums over parts of K; None: rms 1 |
| out_ptr         | [T, N], x's dtype          | contiguous                                    |
| hidden_ptr      | [T, N], x's dtype          | stride 1 along N, any along T; read, written  |
| norm_weight_ptr | [N], any float dtype       | contiguous                                    |
| weighed_ptr     | [T, N], x's dtype          | contiguous                                    |
| new_squares_ptr | [T, ceil(N / BLOCK_N)] fp32| contiguous                                    |

Grid (tiles of rows * tiles of columns,), rows first: programs that share a weight tile run side by
side. A gated program has BLOCK_N / 2 columns of gate, each beside its column of up, so that a
thread holds both.

Numerics: sums in fp32 in the order of k, then the factor, then the bias, then one rounding; the
activation as in `act_mul`, the residual sum as in `add_rms_norm`, hidden * weight rounded once. No
atomics: the same input gives the same bits. A row does not depend on other rows, only on the tiles,
and so on the bucket of T. hidden * weight must fit the dtype, which fp16 does not promise: the
decoder takes these for bf16. Row offsets are int64.

constexpr: tiles, switches, BLOCK_SQUARES (a power of two >= P). T is not specialised.

USE_PDL: programs start while the kernel before them still runs (programmatic dependent launch),
bring their weight rows to L2, then wait for it to end. Hopper and later.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.errors import ConfigError
from engine.kernels import stream_tiles
from engine.kernels.act_mul import activate
from engine.kernels.compile_ahead import launchable
from engine.kernels.fused_product import (
    await_input,
    load_squares,
    product,
    scale_rows,
    split_pairs,
)
from engine.kernels.fused_tiles import squares_block, tiles_for
from engine.kernels.reference import ACTIVATIONS, unknown_activation_message


@launchable
@triton.jit(do_not_specialize=["num_rows", "num_squares"])
def _scaled_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    squares_ptr,
    out_ptr,
    num_rows,
    num_cols,
    num_inner,
    stride_x_row,
    stride_weight_row,
    num_squares,
    eps,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_SQUARES: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    USE_PDL: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,
):
    is_gated: tl.constexpr = ACTIVATION != ""
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    tile = tl.program_id(0) // tiles_m
    rows = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    safe_rows = tl.minimum(rows, num_rows - 1)
    in_tile = tl.arange(0, BLOCK_N)
    if is_gated:
        cols = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        weight_rows = tl.minimum(tile * (BLOCK_N // 2) + in_tile // 2, num_cols - 1)
        weight_rows += in_tile % 2 * num_cols
    else:
        cols = tile * BLOCK_N + in_tile
        weight_rows = tl.minimum(cols, num_cols - 1)

    weight_ptrs = weight_ptr + weight_rows.to(tl.int64) * stride_weight_row
    if USE_PDL:
        await_input(weight_ptrs, num_inner, PREFETCH_LINES)
    squares = load_squares(
        squares_ptr, num_squares, rows, rows < num_rows, HAS_SCALE, BLOCK_SQUARES
    )
    acc = product(
        x_ptr + safe_rows.to(tl.int64) * stride_x_row,
        weight_ptrs,
        num_inner,
        EVEN_K,
        SWAPPED,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        NUM_STAGES,
    )
    dtype = out_ptr.dtype.element_ty
    y = scale_rows(acc, squares, bias_ptr, weight_rows, num_inner, eps, HAS_SCALE, HAS_BIAS)
    y = y.to(dtype)
    if is_gated:
        gate, up = split_pairs(y, BLOCK_M, BLOCK_N)
        y = activate(gate.to(tl.float32), up.to(tl.float32), dtype, ACTIVATION)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * num_cols + cols[None, :]
    tl.store(out_ptrs, y, mask=(rows < num_rows)[:, None] & (cols < num_cols)[None, :])


@launchable
@triton.jit(do_not_specialize=["num_rows"])
def _adding_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    hidden_ptr,
    norm_weight_ptr,
    weighed_ptr,
    new_squares_ptr,
    num_rows,
    num_cols,
    num_inner,
    stride_x_row,
    stride_weight_row,
    stride_hidden_row,
    weight_offset,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    USE_PDL: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,
):
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    tile = tl.program_id(0) // tiles_m
    rows = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    safe_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_col = cols < num_cols
    safe_cols = tl.minimum(cols, num_cols - 1)

    weight_ptrs = weight_ptr + safe_cols.to(tl.int64) * stride_weight_row
    if USE_PDL:
        await_input(weight_ptrs, num_inner, PREFETCH_LINES)
    old = tl.load(hidden_ptr + safe_rows[:, None] * stride_hidden_row + safe_cols[None, :])
    acc = product(
        x_ptr + safe_rows * stride_x_row,
        weight_ptrs,
        num_inner,
        EVEN_K,
        SWAPPED,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        NUM_STAGES,
    )
    if HAS_BIAS:
        acc += tl.load(bias_ptr + safe_cols).to(tl.float32)[None, :]
    dtype = hidden_ptr.dtype.element_ty
    new = (acc.to(dtype).to(tl.float32) + old.to(tl.float32)).to(dtype)
    wide = tl.where(is_col[None, :], new.to(tl.float32), 0.0)
    norm_weight = tl.load(norm_weight_ptr + safe_cols).to(tl.float32) + weight_offset

    num_tiles = tl.num_programs(0) // tiles_m
    is_row = rows < num_rows
    mask = is_row[:, None] & is_col[None, :]
    wide_rows = rows.to(tl.int64)
    tl.store(hidden_ptr + wide_rows[:, None] * stride_hidden_row + cols[None, :], new, mask=mask)
    tl.store(
        weighed_ptr + wide_rows[:, None] * num_cols + cols[None, :],
        (wide * norm_weight[None, :]).to(dtype),
        mask=mask,
    )
    tl.store(new_squares_ptr + rows * num_tiles + tile, tl.sum(wide * wide, axis=1), mask=is_row)


def scaled_linear(
    x: torch.Tensor,
    squares: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    activation: str | None = None,
) -> torch.Tensor:
    """See `fused_reference.scaled_linear`."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ConfigError(unknown_activation_message(activation))
    num_rows, num_inner = x.shape
    num_cols = weight.shape[0] if activation is None else weight.shape[0] // 2
    if activation is not None and num_rows:
        on_hopper = stream_tiles.tiles_for("gated", x, weight, activation)
        if on_hopper is not None:
            from engine.kernels.stream_gated import gated_linear

            return gated_linear(x, squares, weight, bias, eps, activation, on_hopper)
        on_hopper = stream_tiles.prompt_tiles(num_rows, weight, activation)
        if on_hopper is not None and squares is None and stream_tiles.is_readable(x):
            from engine.kernels.stream_prompts import gate_prompts

            return gate_prompts(x, weight, bias, activation, on_hopper)
    out = x.new_empty(num_rows, num_cols)
    if not num_rows:
        return out
    tiles = tiles_for("scaled" if activation is None else "gated", x, weight)
    num_squares = 1 if squares is None else squares.shape[1]
    cols_per_tile = tiles.block_n if activation is None else tiles.block_n // 2
    _scaled_kernel[(triton.cdiv(num_rows, tiles.block_m) * triton.cdiv(num_cols, cols_per_tile),)](
        x,
        weight,
        bias,
        squares,
        out,
        num_rows,
        num_cols,
        num_inner,
        x.stride(0),
        weight.stride(0),
        num_squares,
        eps,
        HAS_SCALE=squares is not None,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation or "",
        BLOCK_SQUARES=squares_block(num_squares),
        **tiles.constants(num_inner),
    )
    return out


def add_weighed_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    hidden: torch.Tensor,
    norm_weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fused_reference.add_weighed_linear`. `hidden` needs stride 1 along N."""
    num_rows, num_inner = x.shape
    num_cols = weight.shape[0]
    on_hopper = stream_tiles.tiles_for("adding", x, weight) if num_rows else None
    if on_hopper is not None and hidden.is_contiguous():
        from engine.kernels.stream_adding import adding_linear

        return adding_linear(x, weight, hidden, norm_weight, bias, weight_offset, on_hopper)
    tiles = tiles_for("adding", x, weight)
    num_tiles = triton.cdiv(num_cols, tiles.block_n)
    weighed = hidden.new_empty(num_rows, num_cols)
    squares = torch.empty((num_rows, num_tiles), dtype=torch.float32, device=x.device)
    if num_rows:
        _adding_kernel[(triton.cdiv(num_rows, tiles.block_m) * num_tiles,)](
            x,
            weight,
            bias,
            hidden,
            norm_weight,
            weighed,
            squares,
            num_rows,
            num_cols,
            num_inner,
            x.stride(0),
            weight.stride(0),
            hidden.stride(0),
            weight_offset,
            HAS_BIAS=bias is not None,
            **tiles.constants(num_inner),
        )
    return weighed, squares
