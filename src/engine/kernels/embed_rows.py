"""Rows of an embedding, and the sums of squares that the first norm divides by.

    out[t] = weight[input_ids[t]] * scale        squares[t] = sum_h out[t, h]^2

| argument      | shape, dtype                 | duty                                   |
|---------------|------------------------------|----------------------------------------|
| input_ids_ptr | [T] int64                    | contiguous, in [0, V)                  |
| weight_ptr    | [V, H] bf16, fp16 or fp32    | stride 1 along H, any along V          |
| scale_ptr     | [] in weight's dtype         | None: no scale                         |
| out_ptr       | [T, H], weight's dtype       | contiguous                             |
| squares_ptr   | [T, 1] fp32                  | contiguous                             |

Grid (T,): one program holds one row in registers. Numerics: the scaled row is rounded to the dtype
first, then squared and summed in fp32. Row offsets are int64. constexpr: BLOCK, the power of two
>= H, and the switch.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.compile_ahead import launchable


@launchable
@triton.jit
def _embed_kernel(
    input_ids_ptr,
    weight_ptr,
    scale_ptr,
    out_ptr,
    squares_ptr,
    stride_weight_row,
    num_cols,
    HAS_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < num_cols
    token_id = tl.load(input_ids_ptr + row)
    x = tl.load(weight_ptr + token_id * stride_weight_row + cols, mask=mask, other=0.0)
    if HAS_SCALE:
        x = (x.to(tl.float32) * tl.load(scale_ptr).to(tl.float32)).to(x.dtype)
    wide = x.to(tl.float32)
    tl.store(out_ptr + row * num_cols + cols, x, mask=mask)
    tl.store(squares_ptr + row, tl.sum(wide * wide, axis=0))


def embed_rows(
    input_ids: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.embed_rows`."""
    num_rows, num_cols = input_ids.shape[0], weight.shape[1]
    out = weight.new_empty(num_rows, num_cols)
    squares = torch.empty((num_rows, 1), dtype=torch.float32, device=weight.device)
    if num_rows:
        block = triton.next_power_of_2(num_cols)
        _embed_kernel[(num_rows,)](
            input_ids,
            weight,
            scale,
            out,
            squares,
            weight.stride(0),
            num_cols,
            HAS_SCALE=scale is not None,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 16),
            enable_fp_fusion=True,
        )
    return out, squares
