"""Gated activation of a merged gate_up projection.

    y = activation(gate) * up        gate = x[:, :I], up = x[:, I:]

silu(g) = g sigmoid(g); gelu(g) = g (1 + erf(g / sqrt 2)) / 2; gelu_tanh(g) = g sigmoid(2 u) with
u = sqrt(2 / pi) (g + 0.044715 g^3), which equals g (1 + tanh u) / 2.

| argument    | shape, dtype                | duty                          |
|-------------|-----------------------------|-------------------------------|
| gate_up_ptr | [T, 2 I] bf16, fp16 or fp32 | stride 1 along 2 I, any in T  |
| out_ptr     | [T, I], same dtype          | contiguous                    |

Grid (T, ceil(I / BLOCK)): one program computes BLOCK entries of one row.

Numerics: fp32 inside, the activation rounded to the dtype before the product, as in Hugging Face.
Row offsets are int64. constexpr: the activation, and BLOCK 1024 with 4 warps: 16 bytes of bf16 per
thread and load. H100, 8192 tokens: 95 to 98 % of 3.0 TB/s in the three measured models; 512 to 4096
entries and 2 to 8 warps are within 3 % of it.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.errors import ConfigError
from engine.kernels.compile_ahead import launchable
from engine.kernels.reference import ACTIVATIONS, unknown_activation_message

_BLOCK = 1024


@triton.jit
def activate(gate, up, dtype: tl.constexpr, ACTIVATION: tl.constexpr):
    """`activation(gate) * up` in dtype, of fp32 tiles."""
    if ACTIVATION == "silu":
        active = gate * tl.sigmoid(gate)
    elif ACTIVATION == "gelu":
        active = gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        active = gate * tl.sigmoid(2.0 * inner)
    return (active.to(dtype).to(tl.float32) * up).to(dtype)


@launchable
@triton.jit
def _act_mul_kernel(
    gate_up_ptr,
    out_ptr,
    stride_row,
    num_cols,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < num_cols
    gate_ptrs = gate_up_ptr + row * stride_row + cols
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + num_cols, mask=mask, other=0.0).to(tl.float32)
    y = activate(gate, up, out_ptr.dtype.element_ty, ACTIVATION)
    tl.store(out_ptr + row * num_cols + cols, y, mask=mask)


def act_mul(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """See `reference.act_mul`."""
    if activation not in ACTIVATIONS:
        raise ConfigError(unknown_activation_message(activation))
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    num_rows, num_cols = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, num_cols), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows:
        _act_mul_kernel[(num_rows, triton.cdiv(num_cols, _BLOCK))](
            gate_up,
            out,
            gate_up.stride(0),
            num_cols,
            ACTIVATION=activation,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out
