"""`Embedding`: token ids to hidden states."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from engine.kernels import dispatch
from engine.layers.norm import RMSNorm


class Embedding:
    """Row lookup in a weight [V, H], times a scale.

    Args:
        vocab_size: V.
        hidden_size: H.
        scale: Factor on the rows, rounded to `dtype` first as transformers does.
        device: Where the weight lives.
        dtype: Of weight and hidden states.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        scale: float = 1.0,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.weight = torch.empty(vocab_size, hidden_size, device=device, dtype=dtype)
        self.scale = torch.tensor(scale, device=device, dtype=dtype) if scale != 1.0 else None

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The one weight [V, H]."""
        yield "weight", self.weight

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states, new [T, H], of ids [T] int64 in [0, V)."""
        hidden = F.embedding(input_ids, self.weight)
        if self.scale is not None:
            hidden *= self.scale
        return hidden

    def with_squares(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden states, their rows' sums of squares [T, 1] float32), for `Linear.of_normed`."""
        return dispatch.embed_rows(input_ids, self.weight, self.scale)

    def weighed(
        self, input_ids: torch.Tensor, norm: RMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(hidden states, the same weighed for `norm`, `squares`), for `Linear.of_weighed`."""
        return dispatch.embed_weighed(
            input_ids, self.weight, norm.weight, self.scale, weight_offset=norm.offset
        )
