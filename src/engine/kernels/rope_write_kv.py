"""What happens to qkv before attention, in one launch: head norms, rotation, KV write.

For each token t and head h of [q heads | k heads | v heads], with x = qkv[t, h], R = rot_dim / 2:

    q, k where a weight is given:  x = x / sqrt(mean(x^2) + eps) * (norm_weight_offset + weight)
    q, k:  y[d] = x[d] cos[d] - x[d + R] sin[d]              for d < R
           y[d] = x[d] cos[d - R] + x[d - R] sin[d - R]      for R <= d < 2 R
           y[d] = x[d]                                       for the rest
    q -> out[t, h];  k, v -> cache[slot // block_size, slot % block_size, head], slot -1: nowhere
    (8-bit caches: in qkv's dtype first, then as `kv_cache.quantise` does)

| argument           | shape, dtype                            | duty                              |
|--------------------|-----------------------------------------|-----------------------------------|
| qkv_ptr            | [T, (Hq + 2 Hkv) D] bf16, fp16 or fp32  | stride 1 along heads, any in T    |
| out_ptr            | [T, Hq, D], same dtype                  | contiguous                        |
| k_cache, v_cache   | [N, block_size, Hkv, D]                 | equal strides, 1 along D; written |
| k_scales, v_scales | [N, Hkv, block_size] fp32               | of 8-bit caches, written; or None |
| cos_sin_ptr        | [P, 2, R] fp32                          | contiguous; None: no rotation     |
| positions_ptr      | [T] int64                               | < P; not read where the slot is -1|
| slots_ptr          | [T] int64                               | -1 marks padding                  |
| q/k_norm_weight    | [D]                                     | contiguous; None: no norm         |

Grid (T, ceil((Hq + 2 Hkv) / BLOCK_H)): one program does BLOCK_H heads of one token, of whatever
kind; masks tell q, k and v apart, so that one program shape serves every head count.

Numerics: fp32 inside; the norm rounds as `rms_norm` does, then the rotation rounds once. The
rotation's partner entry is loaded a second time (from L1) instead of exchanged between threads.
int64: token, slot and block offsets. constexpr: head counts and sizes (few per model), switches.
BLOCK_H 8 with 2 warps: 16 entries per thread at D = 128. H100, us at 8192 tokens for 9, 16 and 32
query heads: 12.1, 50.6, 74.0 (87, 88, 91 % of 3.0 TB/s); with 4 warps 12.6, 57.3, 93.5. At 512
tokens 3.0, 4.4, 6.1 against 2.8, 4.8, 5.8. One choice for all sizes: the norm's sum depends on it.
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
from engine.kernels.kv_cache import LIMITS, KVTensor, parts_of
from engine.kernels.metadata import AttentionMetadata
from engine.kernels.quantise_kv import scales_of, stored_numbers

_BLOCK_H = 8


@triton.jit
def _load_normed(
    head_ptrs,
    columns,
    weight_columns_valid,
    inverse_rms,
    q_norm_weight_ptr,
    k_norm_weight_ptr,
    norm_weight_offset,
    is_q,
    is_k,
    mask,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    HAS_NORM_OFFSET: tl.constexpr,
):
    """Entries `columns` of each head, normalised where its kind has a weight; fp32."""
    raw = tl.load(head_ptrs + columns[None, :], mask=mask, other=0.0)
    x = raw.to(tl.float32)
    if HAS_Q_NORM or HAS_K_NORM:
        scaled = x * inverse_rms[:, None]
        if not HAS_NORM_OFFSET:
            scaled = scaled.to(raw.dtype).to(tl.float32)
        if HAS_Q_NORM:
            weight = tl.load(q_norm_weight_ptr + columns, mask=weight_columns_valid, other=0.0)
            normed = scaled * (weight.to(tl.float32) + norm_weight_offset)[None, :]
            x = tl.where(is_q[:, None], normed.to(raw.dtype).to(tl.float32), x)
        if HAS_K_NORM:
            weight = tl.load(k_norm_weight_ptr + columns, mask=weight_columns_valid, other=0.0)
            normed = scaled * (weight.to(tl.float32) + norm_weight_offset)[None, :]
            x = tl.where(is_k[:, None], normed.to(raw.dtype).to(tl.float32), x)
    return x


@launchable
@triton.jit
def _rope_write_kv_kernel(
    qkv_ptr,
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
    norm_eps,
    norm_weight_offset,
    stride_qkv_token,
    stride_cache_block,
    stride_cache_token,
    stride_cache_head,
    stride_scales,
    BLOCK_SIZE: tl.constexpr,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_ROT: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    HAS_NORM_OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STARTS_NEXT: tl.constexpr,
):
    if STARTS_NEXT:
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    columns = tl.arange(0, BLOCK_D)
    is_q = heads < NUM_Q_HEADS
    is_k = (heads >= NUM_Q_HEADS) & (heads < NUM_Q_HEADS + NUM_KV_HEADS)
    is_v = (heads >= NUM_Q_HEADS + NUM_KV_HEADS) & (heads < NUM_Q_HEADS + 2 * NUM_KV_HEADS)
    is_column = columns < HEAD_DIM
    mask = (is_q | is_k | is_v)[:, None] & is_column[None, :]
    head_ptrs = qkv_ptr + token * stride_qkv_token + (heads * HEAD_DIM)[:, None]
    slot = tl.load(slots_ptr + token)

    inverse_rms = tl.zeros([BLOCK_H], tl.float32)
    if HAS_Q_NORM or HAS_K_NORM:
        raw = tl.load(head_ptrs + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(raw * raw, axis=1) / HEAD_DIM + norm_eps)
    x = _load_normed(
        head_ptrs,
        columns,
        is_column,
        inverse_rms,
        q_norm_weight_ptr,
        k_norm_weight_ptr,
        norm_weight_offset,
        is_q,
        is_k,
        mask,
        HAS_Q_NORM,
        HAS_K_NORM,
        HAS_NORM_OFFSET,
    )
    if HALF_ROT > 0:
        is_first = columns < HALF_ROT
        is_rotated = columns < 2 * HALF_ROT
        partners = tl.where(
            is_rotated, tl.where(is_first, columns + HALF_ROT, columns - HALF_ROT), columns
        )
        partner = _load_normed(
            head_ptrs,
            partners,
            is_column,
            inverse_rms,
            q_norm_weight_ptr,
            k_norm_weight_ptr,
            norm_weight_offset,
            is_q,
            is_k,
            mask,
            HAS_Q_NORM,
            HAS_K_NORM,
            HAS_NORM_OFFSET,
        )
        position = tl.load(positions_ptr + token, mask=slot >= 0, other=0)
        angles_ptr = cos_sin_ptr + position * (2 * HALF_ROT) + columns % HALF_ROT
        cos = tl.load(angles_ptr, mask=is_rotated, other=1.0)
        sin = tl.load(angles_ptr + HALF_ROT, mask=is_rotated, other=0.0)
        sin = tl.where(is_first, -sin, sin)
        x = tl.where(is_v[:, None], x, x * cos[None, :] + partner * sin[None, :])

    dtype = out_ptr.dtype.element_ty
    out_ptrs = out_ptr + token * (NUM_Q_HEADS * HEAD_DIM) + (heads * HEAD_DIM)[:, None]
    tl.store(out_ptrs + columns[None, :], x.to(dtype), mask=mask & is_q[:, None])

    if (slot >= 0) & (tl.program_id(1) * BLOCK_H + BLOCK_H > NUM_Q_HEADS):
        cache_dtype: tl.constexpr = k_cache_ptr.dtype.element_ty
        place = (slot // BLOCK_SIZE) * stride_cache_block + (slot % BLOCK_SIZE) * stride_cache_token
        kv_heads = tl.where(is_k, heads - NUM_Q_HEADS, heads - NUM_Q_HEADS - NUM_KV_HEADS)
        places = place + (kv_heads * stride_cache_head)[:, None] + columns[None, :]
        if k_scales_ptr is not None:
            x = x.to(dtype).to(tl.float32)
            scales, inverses = scales_of(tl.max(tl.abs(x), axis=1), LIMIT)
            x = stored_numbers(x, inverses, cache_dtype, LIMIT)
            scale_places = slot // BLOCK_SIZE * stride_scales + slot % BLOCK_SIZE
            scale_places += kv_heads * BLOCK_SIZE
            tl.store(k_scales_ptr + scale_places, scales, mask=is_k)
            tl.store(v_scales_ptr + scale_places, scales, mask=is_v)
        tl.store(k_cache_ptr + places, x.to(cache_dtype), mask=mask & is_k[:, None])
        tl.store(v_cache_ptr + places, x.to(cache_dtype), mask=mask & is_v[:, None])


def rope_write_kv(
    qkv: torch.Tensor,
    metadata: AttentionMetadata,
    cos_sin: torch.Tensor | None,
    k_cache: KVTensor,
    v_cache: KVTensor,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_weight_offset: float = 0.0,
) -> torch.Tensor:
    """See `reference.rope_write_kv`. Rows whose slot is -1 get q rotated as at position 0."""
    if qkv.stride(1) != 1:
        qkv = qkv.contiguous()
    num_tokens = qkv.shape[0]
    out = torch.empty((num_tokens, num_q_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if not num_tokens:
        return out
    (keys, k_scales), (values, v_scales) = parts_of(k_cache), parts_of(v_cache)
    grid = (num_tokens, triton.cdiv(num_q_heads + 2 * num_kv_heads, _BLOCK_H))
    _rope_write_kv_kernel[grid](
        qkv,
        out,
        keys,
        values,
        k_scales,
        v_scales,
        cos_sin,
        metadata.positions,
        metadata.slot_mapping,
        q_norm_weight,
        k_norm_weight,
        norm_eps,
        norm_weight_offset,
        qkv.stride(0),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        0 if k_scales is None else k_scales.stride(0),
        BLOCK_SIZE=k_cache.shape[1],
        NUM_Q_HEADS=num_q_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HALF_ROT=0 if cos_sin is None else cos_sin.shape[-1],
        HAS_Q_NORM=q_norm_weight is not None,
        HAS_K_NORM=k_norm_weight is not None,
        HAS_NORM_OFFSET=norm_weight_offset != 0.0,
        LIMIT=LIMITS.get(keys.dtype, 0.0),
        BLOCK_H=_BLOCK_H,
        BLOCK_D=triton.next_power_of_2(head_dim),
        STARTS_NEXT=starts_kernels_early(qkv.device),
        num_warps=2,
        enable_fp_fusion=True,
    )
    return out
