"""Plain-torch twin of every kernel: the oracle of the tests, readable on any device.

Each function states its formula and nothing else; none is tuned. Arithmetic is in float32 (float64
for float64 tensors) and rounded to the tensors' dtype where Hugging Face rounds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.errors import ConfigError
from engine.kernels.kv_cache import KVTensor, QuantisedCache, expand, quantise
from engine.kernels.metadata import AttentionMetadata
from engine.kernels.moe_reference import moe_experts as moe_experts
from engine.kernels.moe_reference import moe_route as moe_route

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0
) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * (weight_offset + weight)` over the last dimension.

    Args:
        x: [..., H], any strides.
        weight: [H].
        eps: Added to the mean of squares.
        weight_offset: 0 rounds to x's dtype before the multiplication, as Llama does; anything
            else multiplies in float32 and rounds once, as Gemma (1.0) does.

    Returns:
        New tensor like `x`.
    """
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight_offset:
        return (normed * (weight_offset + weight.to(wide.dtype))).to(x.dtype)
    return (weight * normed.to(x.dtype)).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`residual += x`, then `rms_norm(residual)`.

    Args:
        x: [T, H].
        residual: [T, H], written in place.
        weight: [H].
        eps: As in `rms_norm`.
        weight_offset: As in `rms_norm`.

    Returns:
        (new normed tensor, `residual` itself).
    """
    residual += x
    return rms_norm(residual, weight, eps, weight_offset), residual


def act_mul(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """`activation(gate) * up` for a merged projection.

    Args:
        gate_up: [T, 2 I], gate in the first half.
        activation: "silu", "gelu" (exact, by erf) or "gelu_tanh".

    Returns:
        New [T, I]; the activation is rounded before the product, as in Hugging Face.

    Raises:
        ConfigError: Unknown activation.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "silu":
        return F.silu(gate) * up
    if activation == "gelu":
        return F.gelu(gate) * up
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    raise ConfigError(unknown_activation_message(activation))


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
    """Split qkv, normalise q and k per head, rotate them, and store k and v in the cache.

    `y1 = x1 cos - x2 sin; y2 = x2 cos + x1 sin` with x1, x2 the halves of the first `rot_dim`
    entries of a head (NeoX pairing, Hugging Face's `rotate_half`); the rest passes through.

    Args:
        qkv: [T, (num_q_heads + 2 num_kv_heads) * head_dim]: q heads, k heads, v heads.
        metadata: `positions` and `slot_mapping` are read; slot -1 stores nothing.
        cos_sin: [P, 2, rot_dim // 2] float32, cos and sin by position; None for no rotation.
        k_cache: [num_blocks, block_size, num_kv_heads, head_dim], written in place; plain, or 8
            bits, to which keys are rounded from qkv's dtype (`kv_cache.quantise`).
        v_cache: Likewise.
        num_q_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Entries per head.
        q_norm_weight: [head_dim], RMS norm of each query head before rotation.
        k_norm_weight: [head_dim], likewise for keys.
        norm_eps: As in `rms_norm`.
        norm_weight_offset: As in `rms_norm`.

    Returns:
        New q [T, num_q_heads, head_dim].
    """
    heads = qkv.unflatten(-1, (num_q_heads + 2 * num_kv_heads, head_dim))
    q, k, v = heads.split([num_q_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_norm_weight is not None:
        q = rms_norm(q, q_norm_weight, norm_eps, norm_weight_offset)
    if k_norm_weight is not None:
        k = rms_norm(k, k_norm_weight, norm_eps, norm_weight_offset)
    q = _rotate(q, cos_sin, metadata.positions)
    k = _rotate(k, cos_sin, metadata.positions)

    is_real = metadata.slot_mapping >= 0
    slots = metadata.slot_mapping[is_real]
    store_kv(k_cache, slots, k[is_real])
    store_kv(v_cache, slots, v[is_real])
    return q.contiguous()


def store_kv(cache: KVTensor, slots: torch.Tensor, x: torch.Tensor) -> None:
    """Put x [T, Hkv, D] into the slots [T] of a cache, as it stores numbers."""
    block_size = cache.shape[1]
    blocks, offsets = slots // block_size, slots % block_size
    if isinstance(cache, QuantisedCache):
        stored, scales = quantise(x, cache.values.dtype)
        # torch moves the bytes of float8 numbers, but does not index them.
        as_bytes = cache.values.view(torch.int8)
        as_bytes[blocks, offsets] = stored.view(torch.int8)
        cache.scales[blocks, :, offsets] = scales
        return
    cache[blocks, offsets] = x.to(cache.dtype)


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
    """Causal attention of each sequence's new tokens over its KV blocks.

    `softmax(cap * tanh(q k^T * scale / cap) + mask) v`; the token at position i sees positions j
    with `j <= i`, `j > i - sliding_window` where a window is set, and `j >= i - i % chunk_size`
    where there are chunks. A sink takes part in the softmax as one more score without a value.

    Args:
        q: [T, Hq, D], rotated.
        k_cache: [num_blocks, block_size, Hkv, D], plain or 8 bits; Hq is a multiple of Hkv.
        v_cache: Likewise.
        metadata: Layout of the batch; its `shared_prefixes` change nothing here.
        softmax_scale: Factor of the scores.
        sliding_window: Tokens a position sees, itself included; None for all.
        logit_softcap: Bound of the scores; 0 for none.
        batch_invariant: On a GPU make a sequence's bits independent of the rest of the batch;
            elsewhere they are, whatever it says.
        sinks: [Hq], the sink's score of each query head; neither scaled nor bounded.
        chunk_size: Tokens of a chunk, a multiple of 64; None for no chunks.
        out: [T, Hq * D] to write into, any row stride.

    Returns:
        `out`, or a new [T, Hq * D]. Rows of padding are zero; with `device_counts` arbitrary.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    if out is None:
        out = q.new_empty(num_tokens, num_q_heads * head_dim)
    out.zero_()
    group = num_q_heads // k_cache.shape[2]
    num_seqs = metadata.num_seqs
    if metadata.device_counts is not None:
        num_seqs = int(metadata.device_counts[1])
    rows = range(num_seqs) if metadata.block_rows is None else metadata.block_rows.tolist()
    start = 0
    for row, seq_len, query_len in zip(
        rows[:num_seqs],
        metadata.seq_lens.tolist()[:num_seqs],
        metadata.query_lens.tolist()[:num_seqs],
        strict=True,
    ):
        end = start + query_len
        if seq_len:
            k = _wide(gather_kv(k_cache, metadata.block_table[row], seq_len))
            v = _wide(gather_kv(v_cache, metadata.block_table[row], seq_len))
            scores = torch.einsum(
                "qhd,khd->hqk", _wide(q[start:end]), k.repeat_interleave(group, dim=1)
            )
            scores *= softmax_scale
            if logit_softcap:
                scores = logit_softcap * torch.tanh(scores / logit_softcap)
            visible = visible_keys(seq_len, query_len, sliding_window, q.device, chunk_size)
            scores = scores.masked_fill(~visible, float("-inf"))
            if sinks is not None:
                sink = _wide(sinks)[:, None, None].expand(-1, query_len, 1)
                scores = torch.cat((scores, sink), dim=-1)
            probs = scores.softmax(-1)[..., :seq_len]
            mixed = torch.einsum("hqk,khd->qhd", probs, v.repeat_interleave(group, dim=1))
            out[start:end] = mixed.flatten(1).to(out.dtype)
        start = end
    return out


def batch_invariant_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x @ weight.T + bias`.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N].

    Returns:
        New [..., N].
    """
    wide = _wide(x) @ _wide(weight).T
    if bias is not None:
        wide += bias
    return wide.to(x.dtype)


def few_row_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x @ weight.T + bias`, made for few rows.

    Args:
        x: [T, K].
        weight: [N, K].
        bias: [N].
        out: [T, N], stride 1 along N, to be written in place.

    Returns:
        `out`, or a new [T, N].
    """
    y = batch_invariant_linear(x, weight, bias)
    return y if out is None else out.copy_(y)


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
    """`rms_norm(hidden) @ weight.T + bias`, with an activation then `act_mul` of it.

    Args:
        hidden: [T, K].
        squares: [T, P] float32, parts of each row's sum of squares, as `add_linear` returns them.
        norm_weight: [K].
        weight: [N, K]; with an activation [2 N, K], gate above up.
        bias: [N] or [2 N].
        eps: As in `rms_norm`.
        weight_offset: As in `rms_norm`.
        activation: As in `act_mul`; None for the plain product.

    Returns:
        New [T, N].

    Raises:
        ConfigError: Unknown activation.
    """
    wide = _wide(hidden)
    mean = squares.to(wide.dtype).sum(-1, keepdim=True) / hidden.shape[-1]
    normed = wide * torch.rsqrt(mean + eps)
    if weight_offset:
        x = (normed * (weight_offset + norm_weight.to(wide.dtype))).to(hidden.dtype)
    else:
        x = (norm_weight * normed.to(hidden.dtype)).to(hidden.dtype)
    y = few_row_linear(x, weight, bias)
    return y if activation is None else act_mul(y, activation)


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
    """`rope_write_kv` of `normed_linear`, for whole heads that turn and have no norm.

    Args:
        hidden: As in `normed_linear`, likewise `squares`, `norm_weight`, `eps`, `weight_offset`.
        squares: [T, P] float32.
        norm_weight: [K].
        weight: [(num_q_heads + 2 num_kv_heads) * head_dim, K]: q heads, k heads, v heads.
        bias: As many.
        metadata: As in `rope_write_kv`, likewise the caches, which are written in place.
        cos_sin: [P, 2, head_dim // 2] float32; None for no rotation.
        k_cache: [num_blocks, block_size, num_kv_heads, head_dim].
        v_cache: Likewise.
        num_q_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Entries per head.
        eps: Of the norm of `hidden`.
        weight_offset: Likewise.

    Returns:
        New q [T, num_q_heads, head_dim].
    """
    qkv = normed_linear(
        hidden, squares, norm_weight, weight, bias, eps=eps, weight_offset=weight_offset
    )
    return rope_write_kv(
        qkv,
        metadata,
        cos_sin,
        k_cache,
        v_cache,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )


def add_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    hidden: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`hidden += x @ weight.T + bias`, both rounded, and what the next norm divides by.

    Args:
        x: [T, K].
        weight: [N, K].
        hidden: [T, N], written in place.
        bias: [N].

    Returns:
        New [T, P] float32: parts of the new rows' sums of squares, P of the kernel's choice.
    """
    hidden += few_row_linear(x, weight, bias)
    return _wide(hidden).pow(2).sum(-1, keepdim=True).float()


def embed_rows(
    input_ids: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight[input_ids] * scale`, and its rows' sums of squares for `normed_linear`.

    Args:
        input_ids: [T] int64.
        weight: [V, H].
        scale: [] in weight's dtype.

    Returns:
        (new [T, H], new [T, 1] float32).
    """
    hidden = weight[input_ids]
    if scale is not None:
        hidden = hidden * scale
    return hidden, _wide(hidden).pow(2).sum(-1, keepdim=True).float()


def gather_kv(cache: KVTensor, block_ids: torch.Tensor, seq_len: int) -> torch.Tensor:
    """The first `seq_len` tokens of one sequence, [seq_len, Hkv, D], copied out of its blocks.

    8-bit numbers come as float32.
    """
    ids = block_ids[: -(-seq_len // cache.shape[1])].long()
    if isinstance(cache, QuantisedCache):
        values = cache.values.view(torch.int8)[ids].view(cache.values.dtype)
        blocks = expand(QuantisedCache(values, cache.scales[ids]), torch.float32)
    else:
        blocks = cache[ids]
    return blocks.flatten(0, 1)[:seq_len]


def visible_keys(
    seq_len: int,
    query_len: int,
    sliding_window: int | None,
    device: torch.device,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """[query_len, seq_len] bool: which positions each of the last `query_len` tokens sees."""
    i = torch.arange(seq_len - query_len, seq_len, device=device)[:, None]
    j = torch.arange(seq_len, device=device)[None, :]
    visible = j <= i
    if sliding_window is not None:
        visible &= j > i - sliding_window
    if chunk_size is not None:
        visible &= j >= i - i % chunk_size
    return visible


def unknown_activation_message(activation: str) -> str:
    """What to tell a caller whose activation is none of `ACTIVATIONS`."""
    return f"activation={activation!r} must be one of {', '.join(ACTIVATIONS)}."


def _rotate(x: torch.Tensor, cos_sin: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
    """Rotate [T, heads, D] by position; float32 inside, rounded once."""
    if cos_sin is None:
        return x
    rot_dim = 2 * cos_sin.shape[-1]
    cos, sin = cos_sin[positions][:, :, None].unbind(1)
    x1, x2 = _wide(x[..., :rot_dim]).chunk(2, dim=-1)
    rotated = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    return torch.cat((rotated.to(x.dtype), x[..., rot_dim:]), dim=-1)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in the precision of the sums: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()
