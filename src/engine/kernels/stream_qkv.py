"""`fused_qkv` on Hopper: qkv, head norms, rotation and KV write in one launch.

Formulas, rounding and arguments are those of `fused_qkv`, which hands over plain caches and what
`stream_tiles` takes; how a program works, and what its descriptors are, is told in
`stream_product`.

Grid (tiles of 64 rows * tiles of columns,). A tile has HALF columns and those they are turned with,
half a head further; with head norms it is a whole head.
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
from engine.kernels.metadata import AttentionMetadata
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
def _normed(y, scale, weight_ptr, col, offset, dtype: gl.constexpr, HAS_OFFSET: gl.constexpr):
    """Half a head times its norm's scale and weight, rounded as in `rms_norm`, fp32."""
    weight = gl.load(weight_ptr + col).to(gl.float32)[None, :]
    if HAS_OFFSET:
        return (y * scale * (offset + weight)).to(dtype).to(gl.float32)
    return ((y * scale).to(dtype).to(gl.float32) * weight).to(dtype).to(gl.float32)


@gluon.jit
def _turn(
    rings,
    bars,
    out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    inputs,
    sizes,
    strides,
    epsilons,
    first_row,
    tile,
    NUM_Q_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_Q_NORM: gl.constexpr,
    HAS_K_NORM: gl.constexpr,
    HAS_NORM_OFFSET: gl.constexpr,
    HAS_ROTATION: gl.constexpr,
    BLOCK_SQUARES: gl.constexpr,
):
    """The consumer: norms, turns and stores its columns of one head."""
    bias_ptr, squares_ptr, cos_sin_ptr, positions_ptr, slots_ptr, q_norm_ptr, k_norm_ptr = inputs
    num_rows, num_inner, num_squares = sizes
    stride_block, stride_token, stride_head = strides
    eps, norm_eps, norm_offset = epsilons
    half: gl.constexpr = rings[1].type.shape[1]
    turn: gl.constexpr = HEAD_DIM // 2
    tiles_per_head: gl.constexpr = turn // half
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    acc_of: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, half, 16])
    row_of: gl.constexpr = gl.SliceLayout(1, acc_of)
    row = first_row + gl.arange(0, 64, row_of)
    is_row = row < num_rows
    head = tile // tiles_per_head
    col = tile % tiles_per_head * half + gl.arange(0, half, gl.SliceLayout(0, acc_of))
    gdc_wait()
    slots = gl.load(slots_ptr + row, mask=is_row, other=-1)
    positions = gl.load(positions_ptr + row, mask=slots >= 0, other=0)
    if HAS_SCALE:
        scale = row_scales(
            squares_ptr, first_row, num_rows, num_squares, num_inner, eps, BLOCK_SQUARES
        )
        scale = gl.convert_layout(scale, row_of)[:, None]
    first, second = sums(rings, bars, 0, num_inner // 64, 0, 1)
    if HAS_SCALE:
        first = first * scale
        second = second * scale
    if HAS_BIAS:
        first = add_bias(first, bias_ptr + head * HEAD_DIM, col)
        second = add_bias(second, bias_ptr + head * HEAD_DIM + turn, col)
    first = first.to(dtype).to(gl.float32)
    second = second.to(dtype).to(gl.float32)
    is_q = head < NUM_Q_HEADS
    is_v = head >= NUM_Q_HEADS + NUM_KV_HEADS
    if HAS_Q_NORM or HAS_K_NORM:
        squares = gl.sum(first * first + second * second, axis=1)
        head_scale = gl.rsqrt(squares / HEAD_DIM + norm_eps)[:, None]
    # Nested, because the outer branches are taken by the compiler.
    if HAS_Q_NORM:  # noqa: SIM102
        if is_q:
            first = _normed(first, head_scale, q_norm_ptr, col, norm_offset, dtype, HAS_NORM_OFFSET)
            second = _normed(
                second,
                head_scale,
                q_norm_ptr + turn,
                col,
                norm_offset,
                dtype,
                HAS_NORM_OFFSET,
            )
    if HAS_K_NORM:  # noqa: SIM102
        if head >= NUM_Q_HEADS and head < NUM_Q_HEADS + NUM_KV_HEADS:
            first = _normed(first, head_scale, k_norm_ptr, col, norm_offset, dtype, HAS_NORM_OFFSET)
            second = _normed(
                second,
                head_scale,
                k_norm_ptr + turn,
                col,
                norm_offset,
                dtype,
                HAS_NORM_OFFSET,
            )
    if HAS_ROTATION:  # noqa: SIM102
        if not is_v:
            angle_ptrs = cos_sin_ptr + positions[:, None] * HEAD_DIM + col[None, :]
            cos = gl.load(angle_ptrs)
            sin = gl.load(angle_ptrs + turn)
            turned = first * cos - second * sin
            second = second * cos + first * sin
            first = turned
    if is_q:
        ptrs = out_ptr + row.to(gl.int64)[:, None] * (NUM_Q_HEADS * HEAD_DIM)
        ptrs += (head * HEAD_DIM + col)[None, :]
        gl.store(ptrs, first.to(dtype), mask=is_row[:, None])
        gl.store(ptrs + turn, second.to(dtype), mask=is_row[:, None])
    else:
        kv_head = head - NUM_Q_HEADS - gl.where(is_v, NUM_KV_HEADS, 0)
        places = slots // BLOCK_SIZE * stride_block + slots % BLOCK_SIZE * stride_token
        places = places[:, None] + (kv_head * stride_head + col)[None, :]
        is_stored = (slots >= 0)[:, None]
        if is_v:
            gl.store(v_cache_ptr + places, first.to(dtype), mask=is_stored)
            gl.store(v_cache_ptr + places + turn, second.to(dtype), mask=is_stored)
        else:
            gl.store(k_cache_ptr + places, first.to(dtype), mask=is_stored)
            gl.store(k_cache_ptr + places + turn, second.to(dtype), mask=is_stored)


@launchable
@gluon.jit(do_not_specialize=["num_rows", "num_squares"])
def _stream_qkv_kernel(
    x_desc,
    w_desc,
    out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    bias_ptr,
    squares_ptr,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    q_norm_weight_ptr,
    k_norm_weight_ptr,
    num_rows,
    num_inner,
    num_squares,
    stride_block,
    stride_token,
    stride_head,
    eps,
    norm_eps,
    norm_weight_offset,
    NUM_Q_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
    STAGES: gl.constexpr,
    HALF: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_Q_NORM: gl.constexpr,
    HAS_K_NORM: gl.constexpr,
    HAS_NORM_OFFSET: gl.constexpr,
    HAS_ROTATION: gl.constexpr,
    BLOCK_SQUARES: gl.constexpr,
):
    rings, bars = prepare(x_desc.dtype, 1, STAGES, HALF)
    first_row, tile = tile_of(num_rows)
    tiles_per_head: gl.constexpr = HEAD_DIM // (2 * HALF)
    first_w_row = tile // tiles_per_head * HEAD_DIM + tile % tiles_per_head * HALF
    gl.warp_specialize(
        [
            (
                _turn,
                (
                    rings,
                    bars,
                    out_ptr,
                    k_cache_ptr,
                    v_cache_ptr,
                    (
                        bias_ptr,
                        squares_ptr,
                        cos_sin_ptr,
                        positions_ptr,
                        slots_ptr,
                        q_norm_weight_ptr,
                        k_norm_weight_ptr,
                    ),
                    (num_rows, num_inner, num_squares),
                    (stride_block, stride_token, stride_head),
                    (eps, norm_eps, norm_weight_offset),
                    first_row,
                    tile,
                    NUM_Q_HEADS,
                    NUM_KV_HEADS,
                    HEAD_DIM,
                    BLOCK_SIZE,
                    HAS_SCALE,
                    HAS_BIAS,
                    HAS_Q_NORM,
                    HAS_K_NORM,
                    HAS_NORM_OFFSET,
                    HAS_ROTATION,
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
                    first_w_row,
                    first_w_row + HEAD_DIM // 2,
                    num_inner // 64,
                ),
            ),
        ],
        [1],
        [LOADER_REGISTERS],
    )


def stream_qkv(
    x: torch.Tensor,
    squares: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    metadata: AttentionMetadata,
    cos_sin: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tiles: StreamTiles,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    norm_eps: float,
    norm_weight_offset: float,
) -> torch.Tensor:
    """`fused_qkv.scaled_qkv` by `tiles`, whose `half` divides half a head; T > 0."""
    num_rows, num_inner = x.shape
    q = x.new_empty(num_rows, num_q_heads, head_dim)
    num_squares = 1 if squares is None else squares.shape[1]
    num_programs = triton.cdiv(num_rows, 64) * (weight.shape[0] // (2 * tiles.half))
    _stream_qkv_kernel[(num_programs,)](
        *descriptors(x, weight, tiles.half),
        q,
        k_cache,
        v_cache,
        q if bias is None else bias,
        q if squares is None else squares,
        q if cos_sin is None else cos_sin,
        metadata.positions,
        metadata.slot_mapping,
        q if q_norm_weight is None else q_norm_weight,
        q if k_norm_weight is None else k_norm_weight,
        num_rows,
        num_inner,
        num_squares,
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        eps,
        norm_eps,
        norm_weight_offset,
        NUM_Q_HEADS=num_q_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=k_cache.shape[1],
        HAS_SCALE=squares is not None,
        HAS_BIAS=bias is not None,
        HAS_Q_NORM=q_norm_weight is not None,
        HAS_K_NORM=k_norm_weight is not None,
        HAS_NORM_OFFSET=norm_weight_offset != 0.0,
        HAS_ROTATION=cos_sin is not None,
        BLOCK_SQUARES=squares_block(num_squares),
        **tiles.constants(num_inner),
    )
    return q
