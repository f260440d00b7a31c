"""RMS norm, alone and with the residual's addition before it.

    r = x + residual            (only `add_rms_norm`; rounded to the dtype, written to residual)
    y = r / sqrt(mean(r^2) + eps) * (weight_offset + weight)

| argument     | shape, dtype               | duty                                              |
|--------------|----------------------------|---------------------------------------------------|
| x_ptr        | [T, H] bf16, fp16 or fp32  | stride 1 along H, any along T                     |
| residual_ptr | [T, H], x's dtype          | likewise; read and written, None without residual |
| weight_ptr   | [H], any float dtype       | contiguous                                        |
| out_ptr      | [T, H], x's dtype          | contiguous                                        |

Grid (T,): one program holds one row in registers, so that it is read once.

Numerics: fp32 inside; x / rms is rounded to the dtype before the weight, as in Hugging Face's
Llama, unless there is an offset, when everything is rounded once, as in its Gemma. A row's bits
depend on that row alone. Row offsets are int64.

constexpr: BLOCK, the power of two >= H (register layout), and the two switches. Tuning: 512
entries per warp keep 16 in each thread's registers, two 16-byte loads of bf16; not yet measured.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.compile_ahead import launchable


@triton.jit
def apply_norm(wide, scale, weight, weight_offset, dtype: tl.constexpr, HAS_OFFSET: tl.constexpr):
    """`wide * scale * (weight_offset + weight)` in dtype, rounded as described above."""
    normed = wide * scale
    weight = weight.to(tl.float32)
    if HAS_OFFSET:
        normed = normed * (weight_offset + weight)
    else:
        normed = normed.to(dtype).to(tl.float32) * weight
    return normed.to(dtype)


@launchable
@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    stride_x_row,
    stride_residual_row,
    num_cols,
    eps,
    weight_offset,
    HAS_RESIDUAL: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < num_cols
    x = tl.load(x_ptr + row * stride_x_row + cols, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + row * stride_residual_row + cols
        residual = tl.load(residual_ptrs, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(residual.dtype)
        tl.store(residual_ptrs, x, mask=mask)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / num_cols + eps)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    y = apply_norm(wide, scale, weight, weight_offset, out_ptr.dtype.element_ty, HAS_OFFSET)
    tl.store(out_ptr + row * num_cols + cols, y, mask=mask)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0
) -> torch.Tensor:
    """See `reference.rms_norm`. Copies `x` first where its last two dimensions cannot be rows."""
    return _launch(_as_rows(x), None, weight, eps, weight_offset).view(x.shape)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.add_rms_norm`. `residual` needs stride 1 along H, being written in place."""
    return _launch(_as_rows(x), residual, weight, eps, weight_offset), residual


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
) -> torch.Tensor:
    num_rows, num_cols = x.shape
    out = torch.empty((num_rows, num_cols), dtype=x.dtype, device=x.device)
    if not num_rows:
        return out
    block = triton.next_power_of_2(num_cols)
    _rms_norm_kernel[(num_rows,)](
        x,
        residual,
        weight,
        out,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        num_cols,
        eps,
        weight_offset,
        HAS_RESIDUAL=residual is not None,
        HAS_OFFSET=weight_offset != 0.0,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
        enable_fp_fusion=True,
    )
    return out
