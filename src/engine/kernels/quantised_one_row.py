"""Product of one row with a weight of integer codes, where a thread's place in a tile is chosen.

The formula, the arguments and the numbers are those of `quantised_vector`, which hands over what
this kernel can do: groups that divide a bundle of 128 columns, or are made of whole ones.

Grid (ceil(N / BLOCK_N),): a program has BLOCK_N rows of the weight, a warp eight bundles of them at
a time, and a thread four words of a bundle in every row:

    word        0 ... 3   4 ... 7   8 ... 11   12 ... 15
    bundle 0    lane 0    lane 1    lane 2     lane 3
    bundle 1    lane 4    ...

So what a thread reads of x serves all rows, scales of neighbouring rows are one load, and both are
already in the threads that multiply with them: Triton's own choice of places costs an exchange
through shared memory, with a barrier, for every group of columns. The four words of a group are
summed before they are scaled.

Written in Gluon, the lower layer of Triton. constexpr: what the weight is like, tiles.
"""

# Kernels annotate their compile-time parameters only; the rest are Gluon values.
# mypy: disallow-incomplete-defs=False, disable-error-code="assignment,var-annotated"

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from engine.kernels.act_mul import activate
from engine.kernels.compile_ahead import launchable
from engine.kernels.quantised_layout import BUNDLE, CodePlanes, NormOfRows
from engine.kernels.quantised_lookup import entry_of, look_up
from engine.kernels.quantised_tiles import VectorTiles, one_row_tiles
from engine.kernels.quantised_unpack import group_of, growth_of_products, load_words, strip_products

_WARP_BUNDLES = gl.constexpr(8)
_WORD_LANES = gl.constexpr(4)


@gluon.jit
def _fours(values, layout: gl.constexpr):
    """Entries 0, 1, 2 and 3 of every run of four along the last axis, in `layout`."""
    shape: gl.constexpr = values.type.shape
    even, odd = gl.split(values.reshape(shape[:-1] + [shape[-1] // 4, 2, 2]))  # noqa: RUF005 - no stars in Triton's lists
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return (
        gl.convert_layout(first, layout),
        gl.convert_layout(second, layout),
        gl.convert_layout(third, layout),
        gl.convert_layout(fourth, layout),
    )


@gluon.jit
def _load_strip(
    x_ptr,
    norm_ptr,
    columns,
    num_inner,
    norm_offset,
    STRIP: gl.constexpr,
    HAS_NORM: gl.constexpr,
    EVEN_K: gl.constexpr,
    layout: gl.constexpr,
):
    """(x of a strip of the bundles [bundles, 16], the same times the norm's weight, in fours).

    Fp32, zero beyond K.
    """
    places = columns + STRIP * 16
    if EVEN_K:
        x = gl.load(x_ptr + places).to(gl.float32)
    else:
        x = gl.load(x_ptr + places, mask=places < num_inner, other=0.0).to(gl.float32)
    weighed = x
    if HAS_NORM:
        if EVEN_K:
            norm = gl.load(norm_ptr + places)
        else:
            norm = gl.load(norm_ptr + places, mask=places < num_inner, other=0.0)
        weighed = x * (norm.to(gl.float32) + norm_offset)
    return x, _fours(weighed, layout)


@launchable
@gluon.jit
def _one_row_kernel(
    x_ptr,
    main_ptr,
    extra_ptr,
    scales_ptr,
    minima_ptr,
    table_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    out_ptr,
    num_out,
    num_cols,
    num_inner,
    num_bundles,
    num_groups,
    factor,
    norm_offset,
    eps,
    GROUP: gl.constexpr,
    SUB: gl.constexpr,
    MAIN_BITS: gl.constexpr,
    EXTRA: gl.constexpr,
    EXPONENT_BITS: gl.constexpr,
    ZERO: gl.constexpr,
    HAS_MINIMA: gl.constexpr,
    HAS_TABLE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_NORM: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    EVEN_K: gl.constexpr,
    EVEN_N: gl.constexpr,
    ACTIVATION: gl.constexpr,
    BLOCK_N: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):
    block_b: gl.constexpr = _WARP_BUNDLES * NUM_WARPS
    # [bundles, rows, words], and the same without the four words of a thread.
    words_of: gl.constexpr = gl.BlockedLayout(
        [1, BLOCK_N, 4], [_WARP_BUNDLES, 1, _WORD_LANES], [NUM_WARPS, 1, 1], [2, 1, 0]
    )
    fours_of: gl.constexpr = gl.BlockedLayout(
        [1, BLOCK_N, 1], [_WARP_BUNDLES, 1, _WORD_LANES], [NUM_WARPS, 1, 1], [2, 1, 0]
    )
    scales_of: gl.constexpr = gl.SliceLayout(2, fours_of)
    x_of: gl.constexpr = gl.SliceLayout(1, words_of)
    x_fours_of: gl.constexpr = gl.SliceLayout(1, fours_of)
    looks_up: gl.constexpr = HAS_TABLE and MAIN_BITS + EXTRA == 4
    # With an activation half of a program's rows are of gate, the other half of up.
    sides: gl.constexpr = 1 if ACTIVATION is None else 2
    side_rows: gl.constexpr = BLOCK_N // sides
    first_out = gl.program_id(0) * side_rows
    rows = gl.arange(0, BLOCK_N, gl.SliceLayout(0, gl.SliceLayout(2, words_of)))
    word = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, words_of)))
    x_word = gl.arange(0, 16, gl.SliceLayout(0, x_of))
    scale_rows = gl.arange(0, BLOCK_N, gl.SliceLayout(0, scales_of))
    word_cols = first_out + rows % side_rows
    scale_cols = first_out + scale_rows % side_rows
    if not EVEN_N:
        word_cols = gl.minimum(word_cols, num_out - 1)
        scale_cols = gl.minimum(scale_cols, num_out - 1)
    word_cols += rows // side_rows * num_out
    scale_cols += scale_rows // side_rows * num_out
    word_rows = word_cols.to(gl.int64) * num_bundles
    in_round = gl.arange(0, block_b, gl.SliceLayout(1, gl.SliceLayout(2, words_of)))
    x_in_round = gl.arange(0, block_b, gl.SliceLayout(1, x_of))
    scale_in_round = gl.arange(0, block_b, gl.SliceLayout(1, scales_of))

    acc = gl.zeros([block_b, BLOCK_N, _WORD_LANES], gl.float32, fours_of)
    squares = gl.zeros([block_b, 16], gl.float32, x_of)
    for first in range(0, num_bundles, block_b):
        bundles = gl.minimum(first + in_round, num_bundles - 1)
        places = (word_rows[None, :] + bundles[:, None]) * 16
        places = gl.expand_dims(places, 2) + gl.expand_dims(gl.expand_dims(word, 0), 1)
        main, second, extra = load_words(
            main_ptr, extra_ptr, places, MAIN_BITS, EXTRA, EXPONENT_BITS
        )
        mains = _fours(main, fours_of)
        seconds = _fours(second, fours_of)
        extras = _fours(extra, fours_of)
        columns = (first + x_in_round)[:, None] * 128 + x_word[None, :]
        # All loads of the round are on their way before the first product.
        scale_bundles = gl.minimum(first + scale_in_round, num_bundles - 1)
        scales = ()
        minima = ()
        for part in gl.static_range(0, 8, SUB):
            group = group_of(scale_bundles, part, num_groups, GROUP)
            places = group[:, None] * num_cols + scale_cols[None, :]
            scales = scales + (gl.load(scales_ptr + places),)  # noqa: RUF005 - no stars in Triton
            if HAS_MINIMA:
                minima = minima + (gl.load(minima_ptr + places),)  # noqa: RUF005
        for part in gl.static_range(0, 8, SUB):
            products = gl.zeros([block_b, BLOCK_N, _WORD_LANES], gl.float32, fours_of)
            x_sum = gl.zeros([block_b, _WORD_LANES], gl.float32, x_fours_of)
            xs = ()
            for strip in gl.static_range(part, part + SUB):
                raw, x = _load_strip(
                    x_ptr,
                    norm_ptr,
                    columns,
                    num_inner,
                    norm_offset,
                    strip,
                    HAS_NORM,
                    EVEN_K,
                    x_fours_of,
                )
                xs = xs + (x,)  # noqa: RUF005
                if HAS_NORM:
                    squares += raw * raw
                if HAS_MINIMA or ZERO != 0:
                    x_sum += (x[0] + x[1]) + (x[2] + x[3])
            if not HAS_MINIMA and ZERO != 0:
                # What all codes of a group lack stands where the products start, and costs nothing.
                products += gl.expand_dims(x_sum, 1) * (-ZERO * 2.0**-46)
            for strip in gl.static_range(part, part + SUB):
                x = xs[strip - part]
                if looks_up and strip % 4 == 0:
                    found = (
                        look_up(mains[0], table_ptr, strip // 4),
                        look_up(mains[1], table_ptr, strip // 4),
                        look_up(mains[2], table_ptr, strip // 4),
                        look_up(mains[3], table_ptr, strip // 4),
                    )
                for at in gl.static_range(4):
                    if looks_up:
                        products += entry_of(found[at], strip % 4) * gl.expand_dims(x[at], 1)
                    else:
                        products = strip_products(
                            products,
                            mains[at],
                            seconds[at],
                            extras[at],
                            table_ptr,
                            x[at],
                            strip,
                            MAIN_BITS,
                            EXTRA,
                            EXPONENT_BITS,
                            HAS_TABLE,
                        )
            scale = scales[part // SUB].to(gl.float32)
            scale *= growth_of_products(EXPONENT_BITS, HAS_TABLE)
            acc += gl.expand_dims(scale, 2) * products
            if HAS_MINIMA:
                minimum = minima[part // SUB].to(gl.float32)
                acc += gl.expand_dims(minimum, 2) * gl.expand_dims(x_sum, 1)
    y = gl.sum(gl.sum(acc, 2), 0) * factor
    if HAS_NORM:
        y *= gl.rsqrt(gl.sum(gl.sum(squares, 1), 0) / num_inner + eps)
    if HAS_BIAS:
        rows = gl.arange(0, BLOCK_N, y.type.layout)
        cols = gl.minimum(first_out + rows % side_rows, num_out - 1) + rows // side_rows * num_out
        y += gl.load(bias_ptr + cols).to(gl.float32)
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    if ACTIVATION is not None:
        gate, up = gl.split(gl.permute(y.reshape([2, side_rows]), (1, 0)))
        y = activate(gate, up, dtype, ACTIVATION)
    outs = first_out + gl.arange(0, side_rows, y.type.layout)
    if HAS_RESIDUAL:
        residual = gl.load(residual_ptr + outs, mask=outs < num_out, other=0.0)
        y = y.to(gl.float32) + residual.to(gl.float32)
    gl.store(out_ptr + outs, y.to(dtype), mask=outs < num_out)


def multiplies_one_row(weight: CodePlanes) -> bool:
    """Whether the kernel takes a weight: a group does not begin within another's bundle."""
    return BUNDLE % max(weight.group, 1) == 0 or weight.group % BUNDLE == 0


def one_row_product(
    x: torch.Tensor,
    weight: CodePlanes,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tiles: VectorTiles | None = None,
    *,
    activation: str | None = None,
    norm: NormOfRows | None = None,
    adds: bool = False,
) -> None:
    """Write the product of x [1, K], contiguous, to `out` [1, N], contiguous.

    Args:
        x: The row.
        weight: Its columns are in x's order.
        bias: [N] or None.
        out: Of any float dtype; [1, N / 2] with an activation.
        tiles: For measurements.
        activation: Write the gated one of it, as `act_mul` does: in fp32 but for the activation,
            where two kernels round the product in between.
        norm: Applied to x first, in fp32.
        adds: Add to what is in `out`.
    """
    num_cols, num_inner = weight.shape
    num_out = num_cols if activation is None else num_cols // 2
    tiles = tiles or one_row_tiles(weight, is_gated=activation is not None)
    block_b = _WARP_BUNDLES.value * tiles.num_warps
    side_rows = tiles.block_n if activation is None else tiles.block_n // 2
    _one_row_kernel[(triton.cdiv(num_out, side_rows),)](
        x,
        *weight.looked_up_planes,
        bias,
        None if norm is None else norm.weight,
        out if adds else None,
        out,
        num_out,
        num_cols,
        num_inner,
        weight.num_bundles,
        weight.scales.shape[0],
        weight.factor,
        0.0 if norm is None else norm.offset,
        0.0 if norm is None else norm.eps,
        **weight.constants,
        HAS_BIAS=bias is not None,
        HAS_NORM=norm is not None,
        HAS_RESIDUAL=adds,
        EVEN_K=num_inner % (BUNDLE * block_b) == 0,
        EVEN_N=num_out % side_rows == 0,
        ACTIVATION=activation,
        BLOCK_N=tiles.block_n,
        NUM_WARPS=tiles.num_warps,
        num_warps=tiles.num_warps,
        enable_fp_fusion=True,
    )
