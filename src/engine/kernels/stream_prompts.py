"""The gated product of prompts on Hopper: gate_up with its activation, in one launch.

    y = act(g) * u;  (g, u) = x W^T + b

Formula, rounding and arguments are those of `fused_linear` for rows that are normalised already;
how a program works, and what its descriptors are, is told in `stream_product`. What differs:

Grid (multiprocessors,): each program walks items, tiles of CONSUMERS * 64 rows by HALF pairs of
columns. Their rounds lie behind one another in the rings, so that the loader fills them with the
next item while one is stored. GROUP tiles of rows take turns before the next tile of W.

A row of a tile is stored by the 16 bytes: as the products leave it, a thread has 4 bytes side by
side, and the kernel took 171 us instead of 151 (H100, 8192 rows of the 0.6B shape).

Numerics: sums in fp32 in the order of k; a row's bits depend on itself alone.
constexpr: tiles, switches. T is not specialised.
"""

# Kernels annotate their compile-time parameters only; the rest are Gluon values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_wait

from engine.kernels.attention_tiles import num_multiprocessors
from engine.kernels.compile_ahead import launchable
from engine.kernels.stream_gated import activate_gates
from engine.kernels.stream_product import (
    add_bias,
    copy_rows,
    copy_weight,
    descriptors,
    prepare,
    sums,
)
from engine.kernels.stream_tiles import StreamTiles

GROUP = 16
"""Tiles of rows that take turns before the next tile of the weight; 8 to 64 were level."""


@gluon.jit
def _place_of(item, num_rows, num_tiles, CONSUMERS: gl.constexpr, GROUP: gl.constexpr):
    """(first row of x, tile of W) of an item."""
    tiles_m = (num_rows + 64 * CONSUMERS - 1) // (64 * CONSUMERS)
    first = item // (GROUP * num_tiles) * GROUP
    in_group = gl.minimum(tiles_m - first, GROUP)
    within = item % (GROUP * num_tiles)
    return (first + within % in_group) * (64 * CONSUMERS), within // in_group


@gluon.jit
def _load_items(
    descs,
    rings,
    bars,
    num_rows,
    num_cols,
    num_rounds,
    num_items,
    CONSUMERS: gl.constexpr,
    GROUP: gl.constexpr,
):
    """The loader: item after item, round after round."""
    x_desc, w_desc = descs
    x_ring, w_ring = rings
    full, empty = bars
    stages: gl.constexpr = full.type.shape[0]
    half: gl.constexpr = w_desc.block_type.shape[0]
    num_bytes: gl.constexpr = CONSUMERS * x_desc.block_type.nbytes + 2 * w_desc.block_type.nbytes
    gdc_wait()
    first_count = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        first_row, tile = _place_of(item, num_rows, num_cols // half, CONSUMERS, GROUP)
        for step in range(num_rounds):
            count = first_count + step
            stage = count % stages
            bar = full.index(stage)
            # The first time round this is the barrier's phase before the first, which is over.
            mbarrier.wait(empty.index(stage), ((count // stages) & 1) ^ 1)
            mbarrier.expect(bar, num_bytes)
            copy_weight(w_desc, w_ring, bar, stage, tile * half, num_cols + tile * half, step * 64)
            copy_rows(x_desc, x_ring, bar, stage, first_row, step * 64, CONSUMERS)
        first_count += num_rounds


@gluon.jit
def _gate_items(
    rings,
    bars,
    out_ptr,
    bias_ptr,
    num_rows,
    num_cols,
    num_rounds,
    num_items,
    CONSUMER: gl.constexpr,
    CONSUMERS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    GROUP: gl.constexpr,
):
    """One consumer: item after item."""
    half: gl.constexpr = rings[1].type.shape[1]
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    acc_of: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, half, 16])
    # Eight columns of a row in a thread, 32 in the four that have parts of them anyway.
    out_of: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, half],
    )
    first_count = 0
    gdc_wait()
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        first_row, tile = _place_of(item, num_rows, num_cols // half, CONSUMERS, GROUP)
        gate, up = sums(rings, bars, first_count, num_rounds, CONSUMER, CONSUMERS)
        first_count += num_rounds
        if HAS_BIAS:
            col = tile * half + gl.arange(0, half, gl.SliceLayout(0, acc_of))
            gate = add_bias(gate, bias_ptr, col)
            up = add_bias(up, bias_ptr + num_cols, col)
        active = activate_gates(gate.to(dtype).to(gl.float32), ACTIVATION)
        y = (active.to(dtype).to(gl.float32) * up.to(dtype).to(gl.float32)).to(dtype)
        y = gl.convert_layout(y, out_of)
        row = first_row + CONSUMER * 64 + gl.arange(0, 64, gl.SliceLayout(1, out_of))
        cols = tile * half + gl.arange(0, half, gl.SliceLayout(0, out_of))
        ptrs = out_ptr + row.to(gl.int64)[:, None] * num_cols + cols[None, :]
        gl.store(ptrs, y, mask=(row < num_rows)[:, None])


@launchable
@gluon.jit(do_not_specialize=["num_rows", "num_items"])
def _prompt_kernel(
    x_desc,
    w_desc,
    out_ptr,
    bias_ptr,
    num_rows,
    num_cols,
    num_inner,
    num_items,
    CONSUMER_REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
    STAGES: gl.constexpr,
    HALF: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    GROUP: gl.constexpr,
):
    rings, bars = prepare(x_desc.dtype, 2, STAGES, HALF)
    num_rounds = num_inner // 64
    # The arguments are written out: a variable would turn the constants among them into values.
    gl.warp_specialize(
        [
            (
                _gate_items,
                (
                    rings,
                    bars,
                    out_ptr,
                    bias_ptr,
                    num_rows,
                    num_cols,
                    num_rounds,
                    num_items,
                    gl.constexpr(0),
                    gl.constexpr(2),
                    HAS_BIAS,
                    ACTIVATION,
                    GROUP,
                ),
            ),
            (
                _gate_items,
                (
                    rings,
                    bars,
                    out_ptr,
                    bias_ptr,
                    num_rows,
                    num_cols,
                    num_rounds,
                    num_items,
                    gl.constexpr(1),
                    gl.constexpr(2),
                    HAS_BIAS,
                    ACTIVATION,
                    GROUP,
                ),
            ),
            (
                _load_items,
                (
                    (x_desc, w_desc),
                    rings,
                    bars,
                    num_rows,
                    num_cols,
                    num_rounds,
                    num_items,
                    gl.constexpr(2),
                    GROUP,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, LOADER_REGISTERS],
    )


def gate_prompts(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    tiles: StreamTiles,
) -> torch.Tensor:
    """`fused_linear.scaled_linear` of normalised rows with an activation; T > 0.

    `tiles` have two consumers and 128 pairs of columns.
    """
    num_rows, num_inner = x.shape
    num_cols = weight.shape[0] // 2
    out = x.new_empty(num_rows, num_cols)
    num_items = triton.cdiv(num_rows, 64 * tiles.consumers) * (num_cols // tiles.half)
    _prompt_kernel[(min(num_items, num_multiprocessors(x.device)),)](
        *descriptors(x, weight, tiles.half),
        out,
        out if bias is None else bias,
        num_rows,
        num_cols,
        num_inner,
        num_items,
        CONSUMER_REGISTERS=tiles.consumer_registers,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        GROUP=GROUP,
        **tiles.constants(num_inner),
    )
    return out
