"""Plain twins of the fused products for batches of decoding rows; see `reference`."""

from __future__ import annotations

import torch

from engine.kernels.kv_cache import KVTensor
from engine.kernels.metadata import AttentionMetadata
from engine.kernels.reference import act_mul, add_linear, embed_rows, rope_write_kv


def scaled_linear(
    x: torch.Tensor,
    squares: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    activation: str | None = None,
) -> torch.Tensor:
    """`x @ weight.T / rms + bias` with the rms of `squares`; with an activation `act_mul` of it.

    Of weighed rows this is the product of their norm: `x / rms` is the norm of the residual stream.

    Args:
        x: [T, K], rows of the residual stream times the weight of their norm.
        squares: [T, P] float32, parts of the sums of squares of the rows before they were weighed;
            None for an rms of 1, where x is normalised already.
        weight: [N, K]; with an activation [2 N, K], gate above up.
        bias: [N] or [2 N].
        eps: Added to the mean of squares.
        activation: As in `act_mul`; None for the plain product.

    Returns:
        New [T, N].

    Raises:
        ConfigError: Unknown activation.
    """
    wide = _wide(x) @ _wide(weight).T
    if squares is not None:
        mean = squares.to(wide.dtype).sum(-1, keepdim=True) / x.shape[-1]
        wide *= torch.rsqrt(mean + eps)
    if bias is not None:
        wide += bias
    y = wide.to(x.dtype)
    return y if activation is None else act_mul(y, activation)


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
    """`rope_write_kv` of `scaled_linear`, for heads that turn as a whole.

    Args:
        x: As in `scaled_linear`, likewise `squares` and `eps`.
        squares: [T, P] float32.
        weight: [(num_q_heads + 2 num_kv_heads) * head_dim, K]: q heads, k heads, v heads.
        bias: As many.
        metadata: As in `rope_write_kv`, likewise the caches, which are written in place.
        cos_sin: [P, 2, head_dim // 2] float32; None for no rotation.
        k_cache: [num_blocks, block_size, num_kv_heads, head_dim].
        v_cache: Likewise.
        num_q_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Entries per head.
        eps: Of the norm of the rows.
        q_norm_weight: [head_dim] of each query head's norm; None for no norm.
        k_norm_weight: Likewise of each key head.
        norm_eps: Of the heads' norms.
        norm_weight_offset: Likewise, as in `rms_norm`.

    Returns:
        New q [T, num_q_heads, head_dim].
    """
    return rope_write_kv(
        scaled_linear(x, squares, weight, bias, eps=eps),
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


def add_weighed_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    hidden: torch.Tensor,
    norm_weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`hidden += x @ weight.T + bias`, both rounded, and what the next `scaled_linear` takes.

    Args:
        x: [T, K].
        weight: [N, K].
        hidden: [T, N], written in place.
        norm_weight: [N], of the norm that follows.
        bias: [N].
        weight_offset: Of that norm, as in `rms_norm`.

    Returns:
        (`hidden * (weight_offset + norm_weight)`, new [T, N]; parts of the sums of squares of
        hidden's rows, new [T, P] float32, P of the kernel's choice).
    """
    squares = add_linear(x, weight, hidden, bias)
    return _weighed(hidden, norm_weight, weight_offset), squares


def embed_weighed(
    input_ids: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    *,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`embed_rows`, and its rows weighed for the first `scaled_linear`.

    Args:
        input_ids: [T] int64.
        weight: [V, H].
        norm_weight: [H], of the norm that follows.
        scale: [] in weight's dtype.
        weight_offset: Of that norm, as in `rms_norm`.

    Returns:
        (hidden, new [T, H]; weighed hidden, new [T, H]; squares, new [T, 1] float32).
    """
    hidden, squares = embed_rows(input_ids, weight, scale)
    return hidden, _weighed(hidden, norm_weight, weight_offset), squares


def _weighed(hidden: torch.Tensor, norm_weight: torch.Tensor, weight_offset: float) -> torch.Tensor:
    """`hidden * (weight_offset + norm_weight)`, rounded once."""
    wide = _wide(hidden)
    return (wide * (norm_weight.to(wide.dtype) + weight_offset)).to(hidden.dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in the precision of the sums: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()
