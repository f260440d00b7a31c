"""`QuantisedEight`: one weight of 8-bit numbers, float8 or int8, whatever file format it had."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class Activations:
    """How a checkpoint's own recipe rounds x before the product.

    A hint: whoever multiplies with x as it is comes nearer to the weights. Where x is rounded, it
    is by this recipe.

    Attributes:
        kind: "none" (x stays as it is), "token" (one scale for a row of x, found when it is met),
            "group" (one for `group` columns of a row, likewise) or "tensor" (`scale`, fixed).
        group: Columns that share a scale; 0 but for "group".
        scale: Of "tensor": x is about code * scale.
    """

    kind: str = "none"
    group: int = 0
    scale: float = 0.0


@dataclass(frozen=True, slots=True)
class QuantisedEight:
    """A weight [N, K] of 8-bit numbers with a scale for each tile of them.

    `w[n, k] = values[n, k] * scales[n // tile[0], k // tile[1]]`. Beside `QuantisedCodes`, which
    has scales for groups of columns alone: this is what products in 8 bits take as it is.

    Attributes:
        values: [N, K] float8_e4m3fn or int8, contiguous.
        tile: Rows and columns that share a scale: (N, K) for one scale, (1, K) for one a row,
            (128, 128) for blocks. N and K need not be multiples.
        scales: [ceil(N / tile[0]), ceil(K / tile[1])] float32.
        activations: How the checkpoint means x to be rounded.
    """

    values: torch.Tensor
    tile: tuple[int, int]
    scales: torch.Tensor
    activations: Activations = Activations()

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.values.shape[0], self.values.shape[1]

    def with_row_scales(self) -> QuantisedEight:
        """The same with a scale for each row, where the tiles are as wide as the weight.

        Weights with different scales can then stand below each other.
        """
        num_rows, num_columns = self.shape
        assert self.tile[1] >= num_columns, "tiles narrower than the weight stay tiles"
        scales = self.scales.repeat_interleave(self.tile[0], 0)[:num_rows].contiguous()
        return replace(self, tile=(1, num_columns), scales=scales)

    def expand(self) -> torch.Tensor:
        """The numbers, new [N, K] float32: the reference of products."""
        num_rows, num_columns = self.shape
        scales = self.scales.repeat_interleave(self.tile[0], 0)[:num_rows]
        if self.scales.shape[1] > 1:
            scales = scales.repeat_interleave(self.tile[1], 1)[:, :num_columns]
        return self.values.float().mul_(scales)
