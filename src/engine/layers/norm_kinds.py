"""The norms of a decoder beside `RMSNorm`, and which one a family has."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from engine.layers.norm import RMSNorm


class LayerNorm:
    """`(x - mean) / std * weight + bias` over the last dimension (arXiv 1607.06450).

    Args:
        size: Entries of the last dimension.
        eps: Added to the variance.
        has_bias: Whether there is one.
        device: Where weight and bias live.
        dtype: Of weight, bias, x and y; inside it is float32.
    """

    def __init__(
        self, size: int, *, eps: float, has_bias: bool, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.weight = torch.empty(size, device=device, dtype=dtype)
        self.bias = torch.empty(size, device=device, dtype=dtype) if has_bias else None
        self.eps = eps

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Weight and bias, [size] each."""
        yield "weight", self.weight
        if self.bias is not None:
            yield "bias", self.bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """New normalised tensor like x."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`residual += x` in place: (new normalised residual [T, H], residual)."""
        residual += x
        return self(residual), residual


class NoNorm:
    """Where other families have a norm and this one has none."""

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Nothing."""
        return iter(())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """X itself, not a copy."""
        return x

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`residual += x` in place: (residual, residual)."""
        residual += x
        return residual, residual


Norm = RMSNorm | LayerNorm | NoNorm
