"""From weighed rows to what attention reads, in one launch: qkv, head norms, rotation, KV write.

    (q, k, v) = (x W^T) / rms + b, then as `rope_write_kv`: optional norm of each q and k head,
    q, k:  y[d] = x[d] cos[d] - x[d + R] sin[d],  y[d + R] = x[d + R] cos[d] + x[d] sin[d],  d < R

with R = D / 2: whole heads turn. A program's columns come in pairs (d, d + R) of one head, which a
thread holds beside each other; with head norms, and for 8-bit caches, a program has whole heads.

| argument                   | shape, dtype                | duty                                  |
|----------------------------|-----------------------------|---------------------------------------|
| x_ptr                      | [T, K]: weighed rows        | as in `fused_linear`                  |
| weight_ptr                 | [(Hq + 2 Hkv) D, K]         | likewise: q, k and v heads            |
| bias_ptr                   | [(Hq + 2 Hkv) D]            | likewise                              |
| squares_ptr                | [T, P] fp32                 | likewise                              |
| out_ptr                    | [T, Hq, D], x's dtype       | contiguous                            |
| k_cache_ptr, v_cache_ptr   | [N, block_size, Hkv, D]     | equal strides, 1 along D; written     |
| k_scales_ptr, v_scales_ptr | [N, Hkv, block_size] fp32   | of 8-bit caches, written; or None     |
| cos_sin_ptr                | [P, 2, R] fp32              | contiguous; None: no rotation         |
| positions_ptr              | [T] int64                   | < P; not read where the slot is -1    |
| slots_ptr                  | [T] int64                   | -1 marks padding, which is not stored |
| q_norm_weight_ptr, k_…     | [D], any float dtype        | contiguous; None: no norm             |

Grid (tiles of rows * tiles of columns,), rows first.

Numerics: qkv is rounded to the dtype before norm and rotation, each of which rounds as in
`rope_write_kv`; a head's squares are summed in another order. int64: token, slot, block and weight
row offsets. constexpr: as in `fused_linear`, head counts and sizes.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from engine.kernels import stream_tiles
from engine.kernels.attention_tiles import starts_kernels_early
from engine.kernels.compile_ahead import launchable
from engine.kernels.fused_product import (
    await_input,
    load_squares,
    product,
    scale_rows,
    split_pairs,
)
from engine.kernels.fused_tiles import squares_block, tiles_for
from engine.kernels.kv_cache import LIMITS, KVTensor, parts_of
from engine.kernels.metadata import AttentionMetadata
from engine.kernels.quantise_kv import scales_of, stored_numbers
from engine.kernels.rms_norm import apply_norm


@triton.jit
def _norm_heads(
    first,
    second,
    weight_ptr,
    in_head,
    eps,
    weight_offset,
    dtype: tl.constexpr,
    HALF: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
):
    """RMS norm of whole heads, given as their halves, fp32 in and rounded to dtype within."""
    sums = tl.sum(first * first + second * second, axis=1)
    scale = tl.rsqrt(sums / (2 * HALF) + eps)[:, None]
    weight = tl.load(weight_ptr + in_head)[None, :]
    first = apply_norm(first, scale, weight, weight_offset, dtype, HAS_OFFSET).to(tl.float32)
    weight = tl.load(weight_ptr + HALF + in_head)[None, :]
    second = apply_norm(second, scale, weight, weight_offset, dtype, HAS_OFFSET).to(tl.float32)
    return first, second


@launchable
@triton.jit(do_not_specialize=["num_rows", "num_squares"])
def _scaled_qkv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    squares_ptr,
    out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scales_ptr,
    v_scales_ptr,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    q_norm_weight_ptr,
    k_norm_weight_ptr,
    num_rows,
    num_inner,
    stride_x_row,
    stride_weight_row,
    stride_cache_block,
    stride_cache_token,
    stride_cache_head,
    stride_scales,
    num_squares,
    eps,
    norm_eps,
    norm_weight_offset,
    BLOCK_SIZE: tl.constexpr,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    HAS_NORM_OFFSET: tl.constexpr,
    HAS_ROTATION: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_SQUARES: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    USE_PDL: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,
    STARTS_NEXT: tl.constexpr,
):
    if STARTS_NEXT and not USE_PDL:
        gdc_launch_dependents()
    pairs: tl.constexpr = BLOCK_N // 2
    tiles_per_head: tl.constexpr = HALF // pairs
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    tile = tl.program_id(0) // tiles_m
    head = tile // tiles_per_head
    start = tile % tiles_per_head * pairs
    in_tile = tl.arange(0, BLOCK_N)
    weight_rows = head * (2 * HALF) + start + in_tile // 2 + in_tile % 2 * HALF
    rows = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < num_rows
    safe_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)

    weight_ptrs = weight_ptr + weight_rows.to(tl.int64) * stride_weight_row
    if USE_PDL:
        await_input(weight_ptrs, num_inner, PREFETCH_LINES)
    squares = load_squares(squares_ptr, num_squares, rows, is_row, HAS_SCALE, BLOCK_SQUARES)
    slots = tl.load(slots_ptr + rows, mask=is_row, other=-1)
    positions = tl.load(positions_ptr + rows, mask=slots >= 0, other=0)
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
    dtype = out_ptr.dtype.element_ty
    y = scale_rows(acc, squares, bias_ptr, weight_rows, num_inner, eps, HAS_SCALE, HAS_BIAS)
    first, second = split_pairs(y.to(dtype).to(tl.float32), BLOCK_M, BLOCK_N)

    is_q = head < NUM_Q_HEADS
    is_v = head >= NUM_Q_HEADS + NUM_KV_HEADS
    in_head = start + tl.arange(0, pairs)
    # Nested, because the outer branches are taken by the compiler.
    if HAS_Q_NORM:  # noqa: SIM102
        if is_q:
            first, second = _norm_heads(
                first,
                second,
                q_norm_weight_ptr,
                in_head,
                norm_eps,
                norm_weight_offset,
                dtype,
                HALF,
                HAS_NORM_OFFSET,
            )
    if HAS_K_NORM:  # noqa: SIM102
        if head >= NUM_Q_HEADS and head < NUM_Q_HEADS + NUM_KV_HEADS:
            first, second = _norm_heads(
                first,
                second,
                k_norm_weight_ptr,
                in_head,
                norm_eps,
                norm_weight_offset,
                dtype,
                HALF,
                HAS_NORM_OFFSET,
            )
    if HAS_ROTATION:  # noqa: SIM102
        if not is_v:
            angle_ptrs = cos_sin_ptr + positions[:, None] * (2 * HALF) + in_head[None, :]
            cos = tl.load(angle_ptrs)
            sin = tl.load(angle_ptrs + HALF)
            turned = first * cos - second * sin
            second = second * cos + first * sin
            first = turned

    if is_q:
        out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * (NUM_Q_HEADS * 2 * HALF)
        out_ptrs += head * (2 * HALF) + in_head[None, :]
        tl.store(out_ptrs, first.to(dtype), mask=is_row[:, None])
        tl.store(out_ptrs + HALF, second.to(dtype), mask=is_row[:, None])
    else:
        kv_head = head - NUM_Q_HEADS - tl.where(is_v, NUM_KV_HEADS, 0)
        places = slots // BLOCK_SIZE * stride_cache_block + slots % BLOCK_SIZE * stride_cache_token
        places = places[:, None] + (kv_head * stride_cache_head + in_head)[None, :]
        mask = (slots >= 0)[:, None]
        cache_dtype: tl.constexpr = k_cache_ptr.dtype.element_ty
        if k_scales_ptr is not None:
            first = first.to(dtype).to(tl.float32)
            second = second.to(dtype).to(tl.float32)
            largest = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), axis=1)
            scales, inverses = scales_of(largest, LIMIT)
            first = stored_numbers(first, inverses, cache_dtype, LIMIT)
            second = stored_numbers(second, inverses, cache_dtype, LIMIT)
            scale_places = slots // BLOCK_SIZE * stride_scales + slots % BLOCK_SIZE
            scales_ptr = v_scales_ptr if is_v else k_scales_ptr
            scale_places += kv_head * BLOCK_SIZE
            tl.store(scales_ptr + scale_places, scales, mask=slots >= 0)
        if is_v:
            tl.store(v_cache_ptr + places, first.to(cache_dtype), mask=mask)
            tl.store(v_cache_ptr + places + HALF, second.to(cache_dtype), mask=mask)
        else:
            tl.store(k_cache_ptr + places, first.to(cache_dtype), mask=mask)
            tl.store(k_cache_ptr + places + HALF, second.to(cache_dtype), mask=mask)


def scaled_qkv(
    x: torch.Tensor,
    squares: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    metadata: AttentionMetadata,
    cos_sin: torch.Tensor | None,
    k_cache: KVTensor,
    v_cache: KVTensor,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_weight_offset: float = 0.0,
) -> torch.Tensor:
    """See `fused_reference.scaled_qkv`. Rows whose slot is -1 get q rotated as at position 0.

    `head_dim` is a multiple of 32, and a power of two where heads have a norm or the cache 8 bits.
    """
    num_rows, num_inner = x.shape
    q = x.new_empty(num_rows, num_q_heads, head_dim)
    if not num_rows:
        return q
    num_squares = 1 if squares is None else squares.shape[1]
    (keys, k_scales), (values, v_scales) = parts_of(k_cache), parts_of(v_cache)
    needs_whole_heads = (
        k_scales is not None or q_norm_weight is not None or k_norm_weight is not None
    )
    if k_scales is None:
        on_hopper = stream_tiles.qkv_tiles(x, weight, head_dim, needs_whole_heads)
        if on_hopper is not None:
            from engine.kernels.stream_qkv import stream_qkv

            return stream_qkv(
                x,
                squares,
                weight,
                bias,
                metadata,
                cos_sin,
                keys,
                values,
                on_hopper,
                num_q_heads=num_q_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                eps=eps,
                q_norm_weight=q_norm_weight,
                k_norm_weight=k_norm_weight,
                norm_eps=norm_eps,
                norm_weight_offset=norm_weight_offset,
            )
    tiles = tiles_for("qkv", x, weight)
    # As many columns in every program, and the whole head where its norm or scale needs it.
    block_n = head_dim if needs_whole_heads else min(tiles.block_n, head_dim & -head_dim)
    num_tiles = (num_q_heads + 2 * num_kv_heads) * head_dim // block_n
    _scaled_qkv_kernel[(triton.cdiv(num_rows, tiles.block_m) * num_tiles,)](
        x,
        weight,
        bias,
        squares,
        q,
        keys,
        values,
        k_scales,
        v_scales,
        cos_sin,
        metadata.positions,
        metadata.slot_mapping,
        q_norm_weight,
        k_norm_weight,
        num_rows,
        num_inner,
        x.stride(0),
        weight.stride(0),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        0 if k_scales is None else k_scales.stride(0),
        num_squares,
        eps,
        norm_eps,
        norm_weight_offset,
        BLOCK_SIZE=k_cache.shape[1],
        NUM_Q_HEADS=num_q_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        HAS_SCALE=squares is not None,
        HAS_BIAS=bias is not None,
        HAS_Q_NORM=q_norm_weight is not None,
        HAS_K_NORM=k_norm_weight is not None,
        HAS_NORM_OFFSET=norm_weight_offset != 0.0,
        HAS_ROTATION=cos_sin is not None,
        LIMIT=LIMITS.get(keys.dtype, 0.0),
        BLOCK_SQUARES=squares_block(num_squares),
        STARTS_NEXT=starts_kernels_early(x.device),
        **{**tiles.constants(num_inner), "BLOCK_N": block_n},
    )
    return q
