"""What the products of `stream_…` share on Hopper: tiles by TMA, wgmma, and an early start.

    sums:  x W^T of 64 rows of x and of two groups of HALF rows of W, each [64, HALF] fp32

A program's warps have roles:

    loader             1 warp         boxes of 64 columns by TMA into rings of STAGES rounds
    1 or 2 consumers   4 warps each   64 rows of x each, all of the program's rows of W

A round is 64 columns of K. It has one barrier `full`, which counts the bytes of its boxes, and one
barrier `empty`, at which every consumer arrives when its products of the round are done.

| argument | shape, dtype                 | duty                                         |
|----------|------------------------------|----------------------------------------------|
| x_desc   | [T, K] bf16 or fp16          | TMA descriptor, boxes [64, 64]; K % 64 == 0; |
|          |                              | rows past T read as zero                     |
| w_desc   | [N, K] or [2 N, K], likewise | boxes [HALF, 64]; N a multiple of a tile     |

The launch is an early one (programmatic dependent launch): programs start where the kernel before
leaves room. What they do until it ends is to load their first STAGES rounds of W, which no kernel
of a step writes; x, and whatever else a kernel reads or writes, comes after `gdc_wait`. Every
kernel of a chain waits, so when the one before is done, so are those before that. Whoever fills W
must have ended before the kernel in front of the product begins.

Where a tile lies is worked out once, not in every round: a loader is one warp, and a build whose
loader divided there took 32.8 us for a layer of llama-135m instead of 25.1 (H100, 160 rows).
"""

# Kernels annotate their compile-time parameters only; the rest are Gluon values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# The name changed between triton 3.6 and 3.9.
_copy_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def prepare(dtype: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, HALF: gl.constexpr):
    """((ring of x, ring of W), (full, empty)); the next kernel may start from here on."""
    gdc_launch_dependents()
    box_of: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    bar_of: gl.constexpr = mbarrier.MBarrierLayout()
    x_ring = gl.allocate_shared_memory(dtype, [STAGES * CONSUMERS, 64, 64], box_of)
    w_ring = gl.allocate_shared_memory(dtype, [STAGES * 2, HALF, 64], box_of)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_of)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_of)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    fence_async_shared()
    return (x_ring, w_ring), (full, empty)


@gluon.jit
def tile_of(num_rows):
    """(first row of x, tile of W) of a program; programs of one tile of W run side by side."""
    tiles_m = (num_rows + 63) // 64
    return gl.program_id(0) % tiles_m * 64, gl.program_id(0) // tiles_m


@gluon.jit
def copy_weight(w_desc, ring, bar, stage, first_row, second_row, column):
    """Start to copy a round's boxes of W."""
    _copy_box(w_desc, [first_row, column], bar, ring.index(2 * stage))
    _copy_box(w_desc, [second_row, column], bar, ring.index(2 * stage + 1))


@gluon.jit
def copy_rows(x_desc, ring, bar, stage, first_row, column, CONSUMERS: gl.constexpr):
    """Start to copy a round's boxes of x."""
    for consumer in gl.static_range(CONSUMERS):
        place = ring.index(stage * CONSUMERS + consumer)
        _copy_box(x_desc, [first_row + consumer * 64, column], bar, place)


@gluon.jit
def load(descs, rings, bars, first_x_row, first_row, second_row, num_rounds):
    """The loader of one tile: boxes of W ahead of the wait, then round after round."""
    x_desc, w_desc = descs
    x_ring, w_ring = rings
    full, empty = bars
    stages: gl.constexpr = full.type.shape[0]
    num_bytes: gl.constexpr = x_desc.block_type.nbytes + 2 * w_desc.block_type.nbytes
    num_first = gl.minimum(num_rounds, stages)
    for stage in range(num_first):
        bar = full.index(stage)
        mbarrier.expect(bar, num_bytes)
        copy_weight(w_desc, w_ring, bar, stage, first_row, second_row, stage * 64)
    gdc_wait()
    for stage in range(num_first):
        copy_rows(x_desc, x_ring, full.index(stage), stage, first_x_row, stage * 64, 1)
    for count in range(num_first, num_rounds):
        stage = count % stages
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), ((count // stages) & 1) ^ 1)
        mbarrier.expect(bar, num_bytes)
        copy_weight(w_desc, w_ring, bar, stage, first_row, second_row, count * 64)
        copy_rows(x_desc, x_ring, bar, stage, first_x_row, count * 64, 1)


@gluon.jit
def sums(rings, bars, first_count, num_rounds, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """One consumer's sums of a tile, whose first round is number `first_count` of the program."""
    x_ring, w_ring = rings
    full, empty = bars
    stages: gl.constexpr = full.type.shape[0]
    half: gl.constexpr = w_ring.type.shape[1]
    acc_of: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, half, 16])
    first = gl.zeros([64, half], gl.float32, acc_of)
    second = gl.zeros([64, half], gl.float32, acc_of)
    for count in range(first_count, first_count + num_rounds):
        stage = count % stages
        mbarrier.wait(full.index(stage), (count // stages) & 1)
        x = x_ring.index(stage * CONSUMERS + CONSUMER)
        first = warpgroup_mma(x, w_ring.index(2 * stage).permute((1, 0)), first, is_async=True)
        second = warpgroup_mma(
            x, w_ring.index(2 * stage + 1).permute((1, 0)), second, is_async=True
        )
        # The round before is done: its place may be filled again.
        first, second = warpgroup_mma_wait(2, deps=(first, second))
        before = (count + stages - 1) % stages
        mbarrier.arrive(empty.index(before), count=1, pred=count > first_count)
    first, second = warpgroup_mma_wait(0, deps=(first, second))
    mbarrier.arrive(empty.index((first_count + num_rounds - 1) % stages), count=1)
    return first, second


@gluon.jit
def row_scales(
    squares_ptr, first_row, num_rows, num_squares, num_inner, eps, BLOCK_SQUARES: gl.constexpr
):
    """1 / rms of 64 rows from the parts of their sums of squares, [64] fp32."""
    of: gl.constexpr = gl.BlockedLayout([1, BLOCK_SQUARES // 4], [8, 4], [4, 1], [1, 0])
    row = first_row + gl.arange(0, 64, gl.SliceLayout(1, of))
    part = gl.arange(0, BLOCK_SQUARES, gl.SliceLayout(0, of))
    mask = (row < num_rows)[:, None] & (part < num_squares)[None, :]
    places = row[:, None] * num_squares + part[None, :]
    squares = gl.load(squares_ptr + places, mask=mask, other=0.0)
    return gl.rsqrt(gl.sum(squares, axis=1) / num_inner + eps)


@gluon.jit
def add_bias(y, bias_ptr, col):
    """`y` and the bias of its columns, fp32."""
    return y + gl.load(bias_ptr + col).to(gl.float32)[None, :]


def descriptors(x: torch.Tensor, weight: torch.Tensor, half: int) -> tuple[Any, Any]:
    """(`x_desc`, `w_desc`)."""
    layout = gl.NVMMASharedLayout(128, 16, 2)
    return (
        TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [64, 64], layout),
        TensorDescriptor(weight, list(weight.shape), [weight.stride(0), 1], [half, 64], layout),
    )
