"""The gated product of a batch of `fused_linear` on Hopper: gate_up with its activation.

    y = act(g) * u;  (g, u) = (x W^T) / rms + b

Formula, rounding and arguments are those of `fused_linear`, which hands over what `stream_tiles`
takes; how a program works, and what its descriptors are, is told in `stream_product`. A thread
holds the same columns of g and u.

Grid (tiles of 64 rows * tiles of HALF pairs of columns,).

Numerics: sums in fp32 in the order of k; a row's bits depend on itself and on the tiles.
constexpr: tiles, switches. T and P are not specialised.
"""

# Kernels annotate their compile-time parameters only; the rest are Gluon values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from engine.kernels.compile_ahead import launchable
from engine.kernels.stream_product import (
    add_bias,
    descriptors,
    load,
    prepare,
    row_scales,
    sums,
    tile_of,
)
from engine.kernels.stream_tiles import StreamTiles, squares_block


@gluon.jit
def activate_gates(gate, ACTIVATION: gl.constexpr):
    """The activation of fp32 gates; see `act_mul`."""
    LOG2_E: gl.constexpr = 1.4426950408889634
    if ACTIVATION == "silu":
        return gate / (1.0 + gl.exp2(gate * -LOG2_E))
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    return gate / (1.0 + gl.exp2(inner * (-2.0 * LOG2_E)))


@gluon.jit
def _gate(
    rings,
    bars,
    out_ptr,
    bias_ptr,
    squares_ptr,
    sizes,
    eps,
    first_row,
    tile,
    HAS_SCALE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    BLOCK_SQUARES: gl.constexpr,
):
    """The consumer."""
    num_rows, num_cols, num_inner, num_squares = sizes
    half: gl.constexpr = rings[1].type.shape[1]
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    acc_of: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, half, 16])
    row_of: gl.constexpr = gl.SliceLayout(1, acc_of)
    gdc_wait()
    if HAS_SCALE:
        scale = row_scales(
            squares_ptr, first_row, num_rows, num_squares, num_inner, eps, BLOCK_SQUARES
        )
        scale = gl.convert_layout(scale, row_of)[:, None]
    gate, up = sums(rings, bars, 0, num_inner // 64, 0, 1)
    row = first_row + gl.arange(0, 64, row_of)
    col = tile * half + gl.arange(0, half, gl.SliceLayout(0, acc_of))
    if HAS_SCALE:
        gate = gate * scale
        up = up * scale
    if HAS_BIAS:
        gate = add_bias(gate, bias_ptr, col)
        up = add_bias(up, bias_ptr + num_cols, col)
    active = activate_gates(gate.to(dtype).to(gl.float32), ACTIVATION)
    y = (active.to(dtype).to(gl.float32) * up.to(dtype).to(gl.float32)).to(dtype)
    ptrs = out_ptr + row.to(gl.int64)[:, None] * num_cols + col[None, :]
    gl.store(ptrs, y, mask=(row < num_rows)[:, None])


@launchable
@gluon.jit(do_not_specialize=["num_rows", "num_squares"])
def _gated_kernel(
    x_desc,
    w_desc,
    out_ptr,
    bias_ptr,
    squares_ptr,
    num_rows,
    num_cols,
    num_inner,
    num_squares,
    eps,
    LOADER_REGISTERS: gl.constexpr,
    STAGES: gl.constexpr,
    HALF: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    BLOCK_SQUARES: gl.constexpr,
):
    rings, bars = prepare(x_desc.dtype, 1, STAGES, HALF)
    first_row, tile = tile_of(num_rows)
    gl.warp_specialize(
        [
            (
                _gate,
                (
                    rings,
                    bars,
                    out_ptr,
                    bias_ptr,
                    squares_ptr,
                    (num_rows, num_cols, num_inner, num_squares),
                    eps,
                    first_row,
                    tile,
                    HAS_SCALE,
                    HAS_BIAS,
                    ACTIVATION,
                    BLOCK_SQUARES,
                ),
            ),
            (
                load,
                (
                    (x_desc, w_desc),
                    rings,
                    bars,
                    first_row,
                    tile * HALF,
                    num_cols + tile * HALF,
                    num_inner // 64,
                ),
            ),
        ],
        [1],
        [LOADER_REGISTERS],
    )


def gated_linear(
    x: torch.Tensor,
    squares: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    activation: str,
    tiles: StreamTiles,
) -> torch.Tensor:
    """`fused_linear.scaled_linear` with an activation, by `tiles` of one consumer; T > 0."""
    num_rows, num_inner = x.shape
    num_cols = weight.shape[0] // 2
    out = x.new_empty(num_rows, num_cols)
    num_squares = 1 if squares is None else squares.shape[1]
    _gated_kernel[(triton.cdiv(num_rows, 64) * (num_cols // tiles.half),)](
        *descriptors(x, weight, tiles.half),
        out,
        out if bias is None else bias,
        out if squares is None else squares,
        num_rows,
        num_cols,
        num_inner,
        num_squares,
        eps,
        HAS_SCALE=squares is not None,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        BLOCK_SQUARES=squares_block(num_squares),
        **tiles.constants(num_inner),
    )
    return out
