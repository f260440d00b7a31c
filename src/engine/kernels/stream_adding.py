"""The products into the residual stream of `fused_linear` on Hopper.

    hidden += x W^T + b;  x' = hidden * norm weight;  parts of the squares of hidden's rows

Formulas, rounding and arguments are those of `fused_linear`, which hands over contiguous rows and
what `stream_tiles` takes; how a program works, and what its descriptors are, is told in
`stream_product`.

Grid (tiles of 64 rows * tiles of 2 * HALF columns,).

Numerics: sums in fp32 in the order of k; a row's bits depend on itself and on the tiles.
constexpr: tiles, switches. T is not specialised.
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
from engine.kernels.stream_product import add_bias, descriptors, load, prepare, sums, tile_of
from engine.kernels.stream_tiles import StreamTiles


@gluon.jit
def _store_sum(
    y,
    old,
    norm_weight,
    hidden_ptr,
    weighed_ptr,
    bias_ptr,
    places,
    col,
    is_row,
    HAS_BIAS: gl.constexpr,
):
    """Add a half of a tile to the residual stream; what is stored there, fp32."""
    dtype: gl.constexpr = hidden_ptr.dtype.element_ty
    if HAS_BIAS:
        y = add_bias(y, bias_ptr, col)
    new = (y.to(dtype).to(gl.float32) + old.to(gl.float32)).to(dtype)
    gl.store(hidden_ptr + places, new, mask=is_row)
    new = new.to(gl.float32)
    gl.store(weighed_ptr + places, (new * norm_weight[None, :]).to(dtype), mask=is_row)
    return new


@gluon.jit
def _add(
    rings,
    bars,
    hidden_ptr,
    norm_weight_ptr,
    weighed_ptr,
    bias_ptr,
    new_squares_ptr,
    sizes,
    weight_offset,
    first_row,
    tile,
    HAS_BIAS: gl.constexpr,
):
    """The consumer of the product into the residual stream."""
    num_rows, num_cols, num_rounds = sizes
    half: gl.constexpr = rings[1].type.shape[1]
    acc_of: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, half, 16])
    row = first_row + gl.arange(0, 64, gl.SliceLayout(1, acc_of))
    is_row = (row < num_rows)[:, None]
    col = tile * (2 * half) + gl.arange(0, half, gl.SliceLayout(0, acc_of))
    first_weight = gl.load(norm_weight_ptr + col).to(gl.float32) + weight_offset
    second_weight = gl.load(norm_weight_ptr + col + half).to(gl.float32) + weight_offset
    gdc_wait()
    places = row.to(gl.int64)[:, None] * num_cols + col[None, :]
    first_old = gl.load(hidden_ptr + places, mask=is_row, other=0.0)
    second_old = gl.load(hidden_ptr + places + half, mask=is_row, other=0.0)
    first, second = sums(rings, bars, 0, num_rounds, 0, 1)
    first = _store_sum(
        first,
        first_old,
        first_weight,
        hidden_ptr,
        weighed_ptr,
        bias_ptr,
        places,
        col,
        is_row,
        HAS_BIAS,
    )
    places += half
    second = _store_sum(
        second,
        second_old,
        second_weight,
        hidden_ptr,
        weighed_ptr,
        bias_ptr,
        places,
        col + half,
        is_row,
        HAS_BIAS,
    )
    squares = gl.sum(first * first + second * second, axis=1)
    num_tiles = num_cols // (2 * half)
    gl.store(new_squares_ptr + row * num_tiles + tile, squares, mask=row < num_rows)


@launchable
@gluon.jit(do_not_specialize=["num_rows"])
def _adding_kernel(
    x_desc,
    w_desc,
    hidden_ptr,
    norm_weight_ptr,
    weighed_ptr,
    bias_ptr,
    new_squares_ptr,
    num_rows,
    num_cols,
    num_inner,
    weight_offset,
    LOADER_REGISTERS: gl.constexpr,
    STAGES: gl.constexpr,
    HALF: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    rings, bars = prepare(x_desc.dtype, 1, STAGES, HALF)
    num_rounds = num_inner // 64
    first_row, tile = tile_of(num_rows)
    first_w_row = tile * (2 * HALF)
    gl.warp_specialize(
        [
            (
                _add,
                (
                    rings,
                    bars,
                    hidden_ptr,
                    norm_weight_ptr,
                    weighed_ptr,
                    bias_ptr,
                    new_squares_ptr,
                    (num_rows, num_cols, num_rounds),
                    weight_offset,
                    first_row,
                    tile,
                    HAS_BIAS,
                ),
            ),
            (
                load,
                (
                    (x_desc, w_desc),
                    rings,
                    bars,
                    first_row,
                    first_w_row,
                    first_w_row + HALF,
                    num_rounds,
                ),
            ),
        ],
        [1],
        [LOADER_REGISTERS],
    )


def adding_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    hidden: torch.Tensor,
    norm_weight: torch.Tensor,
    bias: torch.Tensor | None,
    weight_offset: float,
    tiles: StreamTiles,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`fused_linear.add_weighed_linear` by `tiles` of one consumer; T > 0."""
    num_rows, num_inner = x.shape
    num_cols = weight.shape[0]
    num_tiles = num_cols // (2 * tiles.half)
    weighed = torch.empty_like(hidden)
    squares = torch.empty((num_rows, num_tiles), dtype=torch.float32, device=x.device)
    _adding_kernel[(triton.cdiv(num_rows, 64) * num_tiles,)](
        *descriptors(x, weight, tiles.half),
        hidden,
        norm_weight,
        weighed,
        hidden if bias is None else bias,
        squares,
        num_rows,
        num_cols,
        num_inner,
        weight_offset,
        HAS_BIAS=bias is not None,
        **tiles.constants(num_inner),
    )
    return weighed, squares
