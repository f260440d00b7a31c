"""Matrix product whose rows do not depend on how many rows there are.

    y[m, n] = sum_k x[m, k] weight[n, k] + bias[n]

cuBLAS picks tiles and split-K by M, so the same row is summed in another order when its neighbours
change. Here every M runs the same tiles, and one program sums all of K in order (Thinking Machines
Lab, "Defeating nondeterminism in LLM inference", 2025). The price is speed at small M, where 64-row
tiles leave most rows empty, and at large M, where they are small.

| argument   | shape, dtype                | duty                                |
|------------|-----------------------------|-------------------------------------|
| x_ptr      | [M, K] bf16, fp16 or fp32   | stride 1 along K, any along M       |
| weight_ptr | [N, K], same dtype          | likewise                            |
| bias_ptr   | [N], any float dtype        | contiguous; None: no bias           |
| out_ptr    | [M, N], same dtype          | contiguous                          |

Grid (ceil(M / BLOCK_M) * ceil(N / BLOCK_N),): one program computes one tile of y. Programs walk
GROUP_M tiles of rows before the next tile of columns, so that weight tiles are reused from L2
(Triton's matrix multiplication tutorial).

Numerics: fp32 accumulators in the order of k, bias added in fp32, one rounding. fp32 inputs are
multiplied as IEEE fp32, not tf32. Row offsets are int64. constexpr: the tile sizes; M is never
specialised, so that no M compiles a kernel of its own. Tuning: 64 x 128 x 64, 4 warps, 4 stages,
which is 96 KiB of shared memory in bf16, two programs to an SM: 406 TFLOP/s at
8192 x 4096 x 14336 on an H100, 0.55 of cuBLAS (November 2026).
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.compile_ahead import launchable


@launchable
@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_cols,
    num_inner,
    stride_x_row,
    stride_weight_row,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    program = tl.program_id(0)
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    tiles_n = tl.cdiv(num_cols, BLOCK_N)
    band = program // (GROUP_M * tiles_n)
    band_height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    in_band = program % (GROUP_M * tiles_n)
    rows = (band * GROUP_M + in_band % band_height) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (in_band // band_height) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)

    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_x_row + inner[None, :]
    weight_ptrs = weight_ptr + cols.to(tl.int64)[:, None] * stride_weight_row + inner[None, :]
    is_row = (rows < num_rows)[:, None]
    is_col = (cols < num_cols)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, num_inner, BLOCK_K):
        is_inner = (k + inner < num_inner)[None, :]
        x = tl.load(x_ptrs + k, mask=is_row & is_inner, other=0.0)
        weight = tl.load(weight_ptrs + k, mask=is_col & is_inner, other=0.0)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=cols < num_cols, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * num_cols + cols[None, :]
    mask = is_row & (cols < num_cols)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def batch_invariant_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """See `reference.batch_invariant_linear`."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    num_rows, num_inner = rows.shape
    num_cols = weight.shape[0]
    out = torch.empty((num_rows, num_cols), dtype=x.dtype, device=x.device)
    if num_rows:
        is_wide = x.dtype == torch.float32  # no tensor cores: smaller tiles keep registers free
        block_m, block_n, block_k = (32, 64, 32) if is_wide else (64, 128, 64)
        _linear_kernel[(triton.cdiv(num_rows, block_m) * triton.cdiv(num_cols, block_n),)](
            rows,
            weight,
            bias,
            out,
            num_rows,
            num_cols,
            num_inner,
            rows.stride(0),
            weight.stride(0),
            HAS_BIAS=bias is not None,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            GROUP_M=8,
            num_warps=4,
            num_stages=2 if is_wide else 4,
            enable_fp_fusion=True,
        )
    return out.view(*x.shape[:-1], num_cols)
