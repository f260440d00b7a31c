"""Attention that looks both ways, over texts packed one after the other.

Three ways to the same sums, by what the device has:

- *CPU:* texts of equal length are neighbours (batches are sorted by length), so each such group is
  one call without padding or mask. A text's result does not depend on its neighbours.
- *GPU, half precision:* PyTorch's FlashAttention over ragged rows: one launch, nothing padded. The
  operator is called by its name in `aten`, which has kept its signature while the public wrapper
  (`torch.nn.attention.varlen`) changed between torch 2.10 and 2.13.
- *GPU, float32, or with a bias on the scores:* rows are spread to [B, L] and masked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F

from engine.kernels.packed_texts import PackedTexts

PositionBias = Callable[[int], torch.Tensor]
"""Length L -> what is added to the scores, [heads, L, L]."""


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    texts: PackedTexts,
    *,
    window: int | None = None,
    bias: PositionBias | None = None,
) -> torch.Tensor:
    """`softmax(q k^T / sqrt(D) + bias) v` within each text, new [T, heads * D].

    Args:
        q: [T, heads, D]; the last two dimensions contiguous.
        k: Likewise.
        v: Likewise.
        texts: Layout of the batch.
        window: Tokens seen to either side; None for all.
        bias: Added to the scores.
    """
    if q.device.type == "cpu":
        return _by_length(q, k, v, texts, window, bias)
    if bias is None and q.dtype != torch.float32:
        return _flash(q, k, v, texts, window)
    return _padded(q, k, v, texts, window, bias)


def _by_length(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    texts: PackedTexts,
    window: int | None,
    bias: PositionBias | None,
) -> torch.Tensor:
    _, num_heads, head_dim = q.shape
    groups = texts.groups()
    mixed = []
    for start, count, length in groups:
        mask = _scores_mask(texts, length, window, bias, q.dtype)
        rows = slice(start, start + count * length)
        queries, keys, values = (
            x[rows].view(count, length, num_heads, head_dim).transpose(1, 2) for x in (q, k, v)
        )
        group = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        mixed.append(group.transpose(1, 2).reshape(count * length, num_heads * head_dim))
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, texts: PackedTexts, window: int | None
) -> torch.Tensor:
    limits = {} if window is None else {"window_size_left": window, "window_size_right": window}
    mixed = torch.ops.aten._flash_attention_forward(
        q, k, v, texts.starts, texts.starts, texts.max_len, texts.max_len, 0.0, False, False,
        **limits,
    )[0]  # fmt: skip
    return cast("torch.Tensor", mixed.reshape(q.shape[0], -1))


def _padded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    texts: PackedTexts,
    window: int | None,
    bias: PositionBias | None,
) -> torch.Tensor:
    _, num_heads, head_dim = q.shape
    slots, shape = texts.padded_slots(), (texts.num_texts, texts.max_len, num_heads, head_dim)

    def spread(x: torch.Tensor) -> torch.Tensor:
        rows = x.new_zeros(texts.num_texts * texts.max_len, num_heads, head_dim)
        return rows.index_copy_(0, slots, x).view(shape).transpose(1, 2)

    mask = texts.key_mask()
    scores = _scores_mask(texts, texts.max_len, window, bias, q.dtype)
    if scores is not None and scores.dtype == torch.bool:
        mask = mask & scores
    elif scores is not None:
        mask = torch.where(mask, scores, float("-inf"))
    mixed = F.scaled_dot_product_attention(spread(q), spread(k), spread(v), attn_mask=mask)
    rows = mixed.transpose(1, 2).reshape(-1, num_heads * head_dim)
    return rows.index_select(0, slots)


def _scores_mask(
    texts: PackedTexts,
    length: int,
    window: int | None,
    bias: PositionBias | None,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """What SDPA takes for texts of one length: None, bool [L, L] or scores [1, heads, L, L]."""
    if bias is not None:
        return texts.once(("bias", length), lambda: bias(length).to(dtype)[None])
    if window is None or length <= window + 1:
        return None
    return texts.once(("window", length, window), lambda: _band(length, window, texts.device))


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    places = torch.arange(length, device=device)
    return (places[:, None] - places).abs() <= window
