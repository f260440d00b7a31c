"""`LayerNorm`: normalisation by mean and variance, as encoders have it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F


class LayerNorm:
    """`(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension (arXiv 1607.06450).

    Args:
        size: Entries of the last dimension.
        eps: Added to the variance.
        bias: Whether there is one.
        device: Where the weights live.
        dtype: Of weights, x and y; sums are float32.
    """

    def __init__(
        self, size: int, *, eps: float, bias: bool, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.weight = torch.empty(size, device=device, dtype=dtype)
        self.bias = torch.empty(size, device=device, dtype=dtype) if bias else None
        self.eps = eps

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Weight [size], and the bias [size] if there is one."""
        yield "weight", self.weight
        if self.bias is not None:
            yield "bias", self.bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """New normalised tensor like x."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
