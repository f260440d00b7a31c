"""The CPU path: few torch calls per layer, and results that no batch neighbour can change.

Batch invariance, bit for bit, holds for every op (seen with 1 to 8 threads): see
`batch_invariant_linear` here and `cpu_attention`, which this module completes to all public ops.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.kernels import moe_reference, reference
from engine.kernels.cpu_attention import paged_attention
from engine.kernels.fused_reference import (
    add_weighed_linear,
    embed_weighed,
    scaled_linear,
    scaled_qkv,
)
from engine.kernels.kv_cache import KVTensor, QuantisedCache
from engine.kernels.metadata import AttentionMetadata
from engine.kernels.quantised_reference import (
    quantised_experts,
    quantised_linear,
    quantised_rows,
)
from engine.kernels.reference import (
    add_linear,
    embed_rows,
    few_row_linear,
    moe_route,
    normed_linear,
    normed_qkv,
)

__all__ = [
    "act_mul",
    "add_linear",
    "add_rms_norm",
    "add_weighed_linear",
    "batch_invariant_linear",
    "embed_rows",
    "embed_weighed",
    "few_row_linear",
    "moe_experts",
    "moe_route",
    "normed_linear",
    "normed_qkv",
    "paged_attention",
    "quantised_experts",
    "quantised_linear",
    "quantised_rows",
    "rms_norm",
    "rope_write_kv",
    "scaled_linear",
    "scaled_qkv",
]


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0
) -> torch.Tensor:
    """See `reference.rms_norm`; the same rounding.

    The layer norm of x beside -x is the RMS norm of x: their mean is 0, their variance the mean of
    squares. torch has one kernel for a layer norm and a chain of 15 operations for `rms_norm`: at
    1 row of 576 4 µs against 10 (bfloat16, torch 2.13), and more within a forward, where code and
    data come from cold caches.
    """
    if weight_offset:
        wide = _norm_without_weight(x.float(), eps) * (weight.float() + weight_offset)
        return wide.to(x.dtype)
    normed = _norm_without_weight(x, eps) * weight
    return normed if normed.dtype == x.dtype else normed.to(x.dtype)


def _norm_without_weight(x: torch.Tensor, eps: float) -> torch.Tensor:
    """View of x / sqrt(mean(x^2) + eps)."""
    size = x.shape[-1]
    return torch.layer_norm(torch.cat((x, -x), -1), (2 * size,), None, None, eps)[..., :size]


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.add_rms_norm`."""
    residual.add_(x)
    return rms_norm(residual, weight, eps, weight_offset), residual


def act_mul(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """See `reference.act_mul`."""
    if activation != "silu":
        return reference.act_mul(gate_up, activation)
    gate, up = gate_up.chunk(2, dim=-1)
    # In place: for long prompts fresh memory costs more than the product.
    return F.silu(gate).mul_(up)


def batch_invariant_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """See `reference.batch_invariant_linear`; a row's bits do not depend on the other rows.

    oneDNN's bf16 and fp16 products hold this as they are. MKL's float32 product computes the last
    `M mod 4` rows of a thread's share by another kernel (seen with 1 to 16 threads), so M is
    padded to a multiple of 4.
    """
    missing = -(x.numel() // x.shape[-1]) % 4
    if x.dtype != torch.float32 or not missing:
        plain: torch.Tensor = F.linear(x, weight, bias)
        return plain
    rows = x.reshape(-1, x.shape[-1])
    padded: torch.Tensor = F.linear(F.pad(rows, (0, 0, 0, missing)), weight, bias)
    return padded[: rows.shape[0]].view(*x.shape[:-1], -1)


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
    """See `reference.rope_write_kv`. The caches must be contiguous."""
    heads = qkv.view(-1, num_q_heads + 2 * num_kv_heads, head_dim)
    q_and_k = heads[:, : num_q_heads + num_kv_heads]
    v = heads[:, num_q_heads + num_kv_heads :]
    if q_norm_weight is not None or k_norm_weight is not None:
        q, k = q_and_k[:, :num_q_heads], q_and_k[:, num_q_heads:]
        if q_norm_weight is not None:
            q = rms_norm(q, q_norm_weight, norm_eps, norm_weight_offset)
        if k_norm_weight is not None:
            k = rms_norm(k, k_norm_weight, norm_eps, norm_weight_offset)
        q_and_k = torch.cat((q, k), dim=1)
    if cos_sin is not None:
        q_and_k = _rotate(q_and_k, metadata, cos_sin)
    q, k = q_and_k[:, :num_q_heads], q_and_k[:, num_q_heads:]

    slots, is_real = metadata.once_per_step("slots", lambda: _real_slots(metadata.slot_mapping))
    if is_real is not None:
        k, v = k[is_real], v[is_real]
    for cache, x in ((k_cache, k), (v_cache, v)):
        if isinstance(cache, QuantisedCache):
            reference.store_kv(cache, slots, x)
        else:
            cache.view(-1, num_kv_heads, head_dim).index_copy_(0, slots, x.to(cache.dtype))
    return q.contiguous()


def _rotate(x: torch.Tensor, metadata: AttentionMetadata, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotate [T, heads, D]: `x cos + swap_halves(x) (-sin, sin)`, float32 inside."""
    cos, sin = metadata.once_per_step(
        ("rope", id(cos_sin)),
        lambda: _cos_sin_of_step(metadata.positions, cos_sin),
    )
    rot_dim = cos.shape[-1]
    is_whole = rot_dim == x.shape[-1]
    part = (x if is_whole else x[..., :rot_dim]).float()
    swapped = torch.roll(part, rot_dim // 2, -1)
    rotated = (part * cos).addcmul_(swapped, sin).to(x.dtype)
    return rotated if is_whole else torch.cat((rotated, x[..., rot_dim:]), dim=-1)


def _cos_sin_of_step(
    positions: torch.Tensor, cos_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, cos) and (-sin, sin) of each token, [T, 1, rot_dim] float32."""
    cos, sin = cos_sin.index_select(0, positions)[:, :, None].unbind(1)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _real_slots(slot_mapping: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Slots that are written, and which tokens those are (None: all of them)."""
    is_real = slot_mapping >= 0
    if bool(is_real.all()):
        return slot_mapping, None
    return slot_mapping[is_real], is_real


def moe_experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    weights: torch.Tensor,
    experts: torch.Tensor,
    *,
    activation: str,
    scales_input: bool = False,
    swiglu_limit: float = 0.0,
    swiglu_alpha: float = 1.0,
) -> torch.Tensor:
    """See `reference.moe_experts`; products in x's dtype, a row's bits are its own."""

    def one_expert(expert: int, rows: torch.Tensor) -> torch.Tensor:
        first = None if gate_up_bias is None else gate_up_bias[expert]
        second = None if down_bias is None else down_bias[expert]
        active = moe_reference.expert_activation(
            batch_invariant_linear(rows, gate_up[expert], first),
            activation,
            swiglu_limit,
            swiglu_alpha,
        )
        return batch_invariant_linear(active, down[expert], second)

    return moe_reference.sum_of_experts(x, weights, experts, one_expert, scales_input=scales_input)
