"""From the residual stream to what attention reads, in one launch: norm, qkv, rotation, KV write.

    (q, k, v) = norm(hidden) W^T + b, then as `rope_write_kv` without head norms:
    q, k:  y[d] = x[d] cos[d] - x[d + R] sin[d],  y[d + R] = x[d + R] cos[d] + x[d] sin[d],  d < R

with R = D / 2: whole heads turn. A program that has some columns of the first half of a head and
the same of the second half has all that their rotation needs.

| argument                   | shape, dtype                | duty                                 |
|----------------------------|-----------------------------|---------------------------------------|
| x_ptr                      | [T, K]: the residual stream | as in `few_row_linear`               |
| weight_ptr                 | [(Hq + 2 Hkv) D, K]         | likewise: q, k and v heads           |
| bias_ptr                   | [(Hq + 2 Hkv) D]            | likewise                             |
| norm_weight_ptr            | [K]                         | likewise                             |
| squares_ptr                | [T, P] fp32                 | likewise                             |
| out_ptr                    | [T, Hq, D], x's dtype       | contiguous                           |
| k_cache_ptr, v_cache_ptr   | [N, block_size, Hkv, D]     | equal strides, 1 along D; written    |
| cos_sin_ptr                | [P, 2, R] fp32              | contiguous; None: no rotation        |
| positions_ptr              | [T] int64                   | < P; not read where the slot is -1   |
| slots_ptr                  | [T] int64                   | -1 marks padding, which is not stored|

Grid ((Hq + 2 Hkv) R / BLOCK_N, ceil(T / BLOCK_M)): one program sums all of K for BLOCK_N columns of
the first and as many of the second half of one head.

Numerics: as the kernels that it replaces, qkv rounded to the dtype before the rotation, which
rounds once. int64: token, slot, block and weight row offsets. constexpr: as in `few_row_linear`,
head counts and sizes.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from engine.kernels.attention_tiles import starts_kernels_early
from engine.kernels.compile_ahead import launchable
from engine.kernels.few_row_product import products, row_scales, row_sums
from engine.kernels.few_row_tiles import tiles_for
from engine.kernels.metadata import AttentionMetadata


@launchable
@triton.jit(do_not_specialize=["num_rows"])
def _normed_qkv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    squares_ptr,
    out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    num_rows,
    num_inner,
    stride_x_row,
    stride_weight_row,
    stride_cache_block,
    stride_cache_token,
    stride_cache_head,
    num_squares,
    eps,
    weight_offset,
    BLOCK_SIZE: tl.constexpr,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_ROTATION: tl.constexpr,
    BLOCK_SQUARES: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    STARTS_NEXT: tl.constexpr,
):
    if STARTS_NEXT:
        gdc_launch_dependents()
    tiles_per_head: tl.constexpr = HALF // BLOCK_N
    head = tl.program_id(0) // tiles_per_head
    in_head = tl.program_id(0) % tiles_per_head * BLOCK_N + tl.arange(0, BLOCK_N)
    is_col = in_head < HALF
    cols = head * 2 * HALF + in_head
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < num_rows

    weight_ptrs = weight_ptr + cols.to(tl.int64) * stride_weight_row
    half_offset = HALF * stride_weight_row
    scale = row_scales(squares_ptr, num_squares, rows, is_row, num_inner, eps, BLOCK_SQUARES)
    acc, acc_second = products(
        x_ptr + rows.to(tl.int64) * stride_x_row,
        is_row,
        scale,
        weight_ptrs,
        is_col,
        half_offset,
        norm_weight_ptr,
        num_inner,
        weight_offset,
        True,
        HAS_OFFSET,
        True,
        EVEN_K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        NUM_STAGES,
    )
    dtype = out_ptr.dtype.element_ty
    first = row_sums(acc, bias_ptr, cols, HAS_BIAS, BLOCK_M).to(dtype).to(tl.float32)
    second = row_sums(acc_second, bias_ptr, cols + HALF, HAS_BIAS, BLOCK_M).to(dtype)
    second = second.to(tl.float32)

    slots = tl.load(slots_ptr + rows, mask=is_row, other=-1)
    if HAS_ROTATION:
        is_v = head >= NUM_Q_HEADS + NUM_KV_HEADS
        positions = tl.load(positions_ptr + rows, mask=slots >= 0, other=0)
        angle_ptrs = cos_sin_ptr + positions[None, :] * (2 * HALF) + in_head[:, None]
        cos = tl.load(angle_ptrs)
        sin = tl.load(angle_ptrs + HALF)
        turned = first * cos - second * sin
        second = tl.where(is_v, second, second * cos + first * sin)
        first = tl.where(is_v, first, turned)

    if head < NUM_Q_HEADS:
        out_ptrs = out_ptr + rows.to(tl.int64)[None, :] * (NUM_Q_HEADS * 2 * HALF) + cols[:, None]
        mask = is_col[:, None] & is_row[None, :]
        tl.store(out_ptrs, first.to(dtype), mask=mask)
        tl.store(out_ptrs + HALF, second.to(dtype), mask=mask)
    else:
        is_k = head < NUM_Q_HEADS + NUM_KV_HEADS
        kv_head = head - NUM_Q_HEADS - tl.where(is_k, 0, NUM_KV_HEADS)
        places = slots // BLOCK_SIZE * stride_cache_block + slots % BLOCK_SIZE * stride_cache_token
        places = places[None, :] + (kv_head * stride_cache_head + in_head)[:, None]
        mask = is_col[:, None] & (slots >= 0)[None, :]
        cache_dtype = k_cache_ptr.dtype.element_ty
        if is_k:
            tl.store(k_cache_ptr + places, first.to(cache_dtype), mask=mask)
            tl.store(k_cache_ptr + places + HALF, second.to(cache_dtype), mask=mask)
        else:
            tl.store(v_cache_ptr + places, first.to(cache_dtype), mask=mask)
            tl.store(v_cache_ptr + places + HALF, second.to(cache_dtype), mask=mask)


def normed_qkv(
    hidden: torch.Tensor,
    squares: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    metadata: AttentionMetadata,
    cos_sin: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
    weight_offset: float = 0.0,
) -> torch.Tensor:
    """See `reference.normed_qkv`. Rows whose slot is -1 get q rotated as at position 0."""
    num_rows, num_inner = hidden.shape
    half = head_dim // 2
    q = hidden.new_empty(num_rows, num_q_heads, head_dim)
    if not num_rows:
        return q
    tiles = tiles_for("qkv", hidden, weight)
    block_n = min(tiles.block_n, half & -half)  # as many in every program
    num_tiles = (num_q_heads + 2 * num_kv_heads) * half // block_n
    grid = (num_tiles, triton.cdiv(num_rows, tiles.block_m))
    _normed_qkv_kernel[grid](
        hidden,
        weight,
        bias,
        norm_weight,
        squares,
        q,
        k_cache,
        v_cache,
        cos_sin,
        metadata.positions,
        metadata.slot_mapping,
        num_rows,
        num_inner,
        hidden.stride(0),
        weight.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        squares.shape[1],
        eps,
        weight_offset,
        BLOCK_SIZE=k_cache.shape[1],
        NUM_Q_HEADS=num_q_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=half,
        HAS_BIAS=bias is not None,
        HAS_OFFSET=weight_offset != 0.0,
        HAS_ROTATION=cos_sin is not None,
        BLOCK_SQUARES=triton.next_power_of_2(squares.shape[1]),
        EVEN_K=num_inner % tiles.block_k == 0,
        BLOCK_M=tiles.block_m,
        BLOCK_N=block_n,
        BLOCK_K=tiles.block_k,
        NUM_STAGES=tiles.num_stages,
        STARTS_NEXT=starts_kernels_early(hidden.device),
        num_warps=tiles.num_warps,
        enable_fp_fusion=True,
    )
    return q
