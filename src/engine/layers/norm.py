"""`RMSNorm`: root mean square normalisation, alone or fused with the residual sum."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.kernels import dispatch


class RMSNorm:
    """`x / rms(x) * (offset + weight)` over the last dimension (arXiv 1910.07467).

    Args:
        size: Entries of the last dimension.
        eps: Added to the mean of squares.
        offset: 0, or 1.0 where the checkpoint stores `weight - 1` (Gemma).
        device: Where the weight lives.
        dtype: Of weight, x and y.
    """

    def __init__(
        self, size: int, *, eps: float, offset: float, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.weight = torch.empty(size, device=device, dtype=dtype)
        self.eps = eps
        self.offset = offset

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The one weight [size]."""
        yield "weight", self.weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """New normalised tensor like x."""
        return dispatch.rms_norm(x, self.weight, self.eps, self.offset)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`residual += x` in place: (new normalised residual [T, H], residual)."""
        return dispatch.add_rms_norm(x, residual, self.weight, self.eps, self.offset)
