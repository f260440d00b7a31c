"""The ops that layers call. CPU tensors take `cpu`, CUDA tensors the Triton kernels.

Every op has a twin of the same name in one of the `reference` modules, which state formula, shapes
and rounding. Triton is imported by the first call with a CUDA tensor.
"""

from __future__ import annotations

import torch

from engine.kernels import cpu
from engine.kernels.kv_cache import KVTensor
from engine.kernels.metadata import AttentionMetadata
from engine.kernels.moe_reference import Routing
from engine.kernels.quantised_dispatch import quantised_experts as quantised_experts
from engine.kernels.quantised_dispatch import quantised_linear as quantised_linear
from engine.kernels.quantised_dispatch import quantised_rows as quantised_rows

PUBLIC_OPS = (
    "rms_norm",
    "add_rms_norm",
    "act_mul",
    "rope_write_kv",
    "paged_attention",
    "batch_invariant_linear",
    "few_row_linear",
    "normed_linear",
    "normed_qkv",
    "add_linear",
    "embed_rows",
    "scaled_linear",
    "scaled_qkv",
    "add_weighed_linear",
    "embed_weighed",
    "moe_route",
    "moe_experts",
    "quantised_experts",
    "quantised_linear",
    "quantised_rows",
)


def begin_step(metadata: AttentionMetadata) -> None:
    """Forget what earlier forwards derived from `metadata`; call at the start of every forward.

    Layers of one forward then share what depends on the batch alone (the CPU path's plan, the
    decode kernel's work list). Under CUDA graph capture the call belongs inside the capture, so
    that a replay derives it anew. A forward that never calls it is correct, but derives everything
    once per layer.
    """
    metadata.step_cache = {}


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0
) -> torch.Tensor:
    """RMS norm of [..., H] times `weight_offset + weight`; see `reference.rms_norm`."""
    if not x.is_cuda:
        return cpu.rms_norm(x, weight, eps, weight_offset)
    from engine.kernels import rms_norm as kernels

    return kernels.rms_norm(x, weight, eps, weight_offset)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`residual += x` in place, then its RMS norm; see `reference.add_rms_norm`."""
    if not x.is_cuda:
        return cpu.add_rms_norm(x, residual, weight, eps, weight_offset)
    from engine.kernels import rms_norm as kernels

    return kernels.add_rms_norm(x, residual, weight, eps, weight_offset)


def act_mul(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """`activation(gate) * up` of [T, 2 I]; see `reference.act_mul`.

    Raises:
        ConfigError: `activation` is none of "silu", "gelu", "gelu_tanh".
    """
    if not gate_up.is_cuda:
        return cpu.act_mul(gate_up, activation)
    from engine.kernels import act_mul as kernels

    return kernels.act_mul(gate_up, activation)


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
    """Norm and rotate q and k, store k and v in the cache; see `reference.rope_write_kv`.

    Every layer must store all its keys and values before its attention reads the cache: sequences
    of one step may share blocks.
    """
    if qkv.is_cuda:
        from engine.kernels.rope_write_kv import rope_write_kv as op
    else:
        op = cpu.rope_write_kv
    return op(
        qkv,
        metadata,
        cos_sin,
        k_cache,
        v_cache,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        q_norm_weight=q_norm_weight,
        k_norm_weight=k_norm_weight,
        norm_eps=norm_eps,
        norm_weight_offset=norm_weight_offset,
    )


def paged_attention(
    q: torch.Tensor,
    k_cache: KVTensor,
    v_cache: KVTensor,
    metadata: AttentionMetadata,
    *,
    softmax_scale: float,
    sliding_window: int | None = None,
    logit_softcap: float = 0.0,
    batch_invariant: bool = False,
    sinks: torch.Tensor | None = None,
    chunk_size: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the step's tokens over their KV blocks; see `reference.paged_attention`.

    With `batch_invariant`, and on a CPU always, a sequence's result does not depend on the other
    sequences of the batch, bit for bit.
    """
    if q.is_cuda:
        from engine.kernels.attention import paged_attention as op
    else:
        op = cpu.paged_attention
    return op(
        q,
        k_cache,
        v_cache,
        metadata,
        softmax_scale=softmax_scale,
        sliding_window=sliding_window,
        logit_softcap=logit_softcap,
        batch_invariant=batch_invariant,
        sinks=sinks,
        chunk_size=chunk_size,
        out=out,
    )


def batch_invariant_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x @ weight.T + bias`, each row by itself; see `reference.batch_invariant_linear`."""
    if not x.is_cuda:
        return cpu.batch_invariant_linear(x, weight, bias)
    from engine.kernels import batch_invariant_linear as kernels

    return kernels.batch_invariant_linear(x, weight, bias)


def few_row_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x @ weight.T + bias` of few rows; see `reference.few_row_linear`."""
    if not x.is_cuda:
        return cpu.few_row_linear(x, weight, bias, out)
    from engine.kernels import few_row_linear as kernels

    return kernels.few_row_linear(x, weight, bias, out)


def normed_linear(
    hidden: torch.Tensor,
    squares: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    weight_offset: float = 0.0,
    activation: str | None = None,
) -> torch.Tensor:
    """Product of a norm, gated on demand; see `reference.normed_linear`, and `act_mul`."""
    if hidden.is_cuda:
        from engine.kernels.few_row_linear import normed_linear as op
    else:
        op = cpu.normed_linear
    return op(
        hidden,
        squares,
        norm_weight,
        weight,
        bias,
        eps=eps,
        weight_offset=weight_offset,
        activation=activation,
    )


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
    """`rope_write_kv` of `normed_linear`; see `reference.normed_qkv`."""
    if hidden.is_cuda:
        from engine.kernels.few_row_qkv import normed_qkv as op
    else:
        op = cpu.normed_qkv
    return op(
        hidden,
        squares,
        norm_weight,
        weight,
        bias,
        metadata,
        cos_sin,
        k_cache,
        v_cache,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        eps=eps,
        weight_offset=weight_offset,
    )


def add_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    hidden: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`hidden += x @ weight.T + bias` in place, and its squares; see `reference.add_linear`."""
    if not x.is_cuda:
        return cpu.add_linear(x, weight, hidden, bias)
    from engine.kernels import few_row_linear as kernels

    return kernels.add_linear(x, weight, hidden, bias)


def embed_rows(
    input_ids: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of an embedding and their squares; see `reference.embed_rows`."""
    if not weight.is_cuda:
        return cpu.embed_rows(input_ids, weight, scale)
    from engine.kernels import embed_rows as kernels

    return kernels.embed_rows(input_ids, weight, scale)


def scaled_linear(
    x: torch.Tensor,
    squares: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    activation: str | None = None,
) -> torch.Tensor:
    """Product of weighed rows, gated on demand; see `fused_reference.scaled_linear`, `act_mul`."""
    if x.is_cuda:
        from engine.kernels.fused_linear import scaled_linear as op
    else:
        op = cpu.scaled_linear
    return op(x, squares, weight, bias, eps=eps, activation=activation)


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
    """`rope_write_kv` of `scaled_linear`; see `fused_reference.scaled_qkv`."""
    if x.is_cuda:
        from engine.kernels.fused_qkv import scaled_qkv as op
    else:
        op = cpu.scaled_qkv
    return op(
        x,
        squares,
        weight,
        bias,
        metadata,
        cos_sin,
        k_cache,
        v_cache,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        eps=eps,
        q_norm_weight=q_norm_weight,
        k_norm_weight=k_norm_weight,
        norm_eps=norm_eps,
        norm_weight_offset=norm_weight_offset,
    )


def add_weighed_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    hidden: torch.Tensor,
    norm_weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`hidden += x @ weight.T + bias`, then weighed; see `fused_reference.add_weighed_linear`."""
    if x.is_cuda:
        from engine.kernels.fused_linear import add_weighed_linear as op
    else:
        op = cpu.add_weighed_linear
    return op(x, weight, hidden, norm_weight, bias, weight_offset=weight_offset)


def embed_weighed(
    input_ids: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    *,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of an embedding, weighed, and their squares; see `fused_reference.embed_weighed`."""
    if weight.is_cuda:
        from engine.kernels.embed_rows import embed_weighed as op
    else:
        op = cpu.embed_weighed
    return op(input_ids, weight, norm_weight, scale, weight_offset=weight_offset)


def moe_route(
    logits: torch.Tensor, choice_bias: torch.Tensor | None, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, experts) that each token chooses; see `reference.moe_route`."""
    if not logits.is_cuda:
        return cpu.moe_route(logits, choice_bias, routing)
    from engine.kernels import moe_route as kernels

    return kernels.moe_route(logits, choice_bias, routing)


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
    """Weighted sum of each token's experts; see `reference.moe_experts`."""
    if x.is_cuda:
        from engine.kernels.moe_experts import moe_experts as op
    else:
        op = cpu.moe_experts
    return op(
        x,
        gate_up,
        down,
        gate_up_bias,
        down_bias,
        weights,
        experts,
        activation=activation,
        scales_input=scales_input,
        swiglu_limit=swiglu_limit,
        swiglu_alpha=swiglu_alpha,
    )


__all__ = [*PUBLIC_OPS, "begin_step"]
