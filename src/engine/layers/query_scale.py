"""`QueryScale`: queries that grow with their position, to keep long contexts in focus."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class QueryScale:
    """Queries at position p are multiplied by `1 + factor * log(1 + floor((p + offset) / period))`.

    Scalable softmax (arXiv 2501.19399) as Llama 4 (offset 1) and Ministral 3 (offset 0) have it.

    Attributes:
        factor: Strength, > 0.
        period: Positions per step of the scale, > 0.
        offset: Added to the position.
    """

    factor: float
    period: float
    offset: int

    def table(self, max_model_len: int, device: torch.device) -> torch.Tensor:
        """The factor of every position, [max_model_len] float32."""
        positions = torch.arange(max_model_len, dtype=torch.float32) + self.offset
        scales = torch.log1p(torch.floor(positions / self.period)) * self.factor + 1.0
        return scales.to(device)
