"""`QuantisedLinear`, `QuantisedEmbedding`: layers whose weight stays as its GGUF file has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from engine.layers.embedding import Embedding
from engine.layers.linear import Linear
from engine.layers.quantised_weights import EightBitWeight, FourBitWeight


class StepRows:
    """How many leading rows of the running step decode; a model's layers share one.

    Written by the forward before its first layer, read by the layers; the engine thread's own.
    """

    num_decodes: int = 0


class QuantisedLinear(Linear):
    """A `Linear` over a `FourBitWeight` or an `EightBitWeight`; loaded when it is made.

    Args:
        weight: Codes and scales.
        bias: [out_features] or None.
        rows: Which rows decode; None where all do, as those of the output projection.
    """

    def __init__(
        self,
        weight: FourBitWeight | EightBitWeight,
        bias: torch.Tensor | None,
        rows: StepRows | None,
    ) -> None:
        self.parts = {}
        self.bias = bias
        self.uses_plain_product = False
        self.packed = None
        self._weight = weight
        self._rows = rows

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Nothing: it is loaded already."""
        return iter(())

    def finish_loading(self) -> None:
        """Nothing is left to do."""

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        rows = self._rows
        y = self._weight(x, x.shape[0] if rows is None else rows.num_decodes)
        return y if self.bias is None else y.add_(self.bias)


class QuantisedEmbedding(Embedding):
    """Row lookup in a quantised weight [V, H] that stays in its mapped file.

    Args:
        expand_rows: Ids [T] int64 -> rows [T, H] float32.
        scale: As in `Embedding`, or None.
        dtype: Of the hidden states.
    """

    def __init__(
        self,
        expand_rows: Callable[[torch.Tensor], torch.Tensor],
        scale: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.scale = scale
        self._expand_rows = expand_rows
        self._dtype = dtype

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Nothing: it reads its file row by row."""
        return iter(())

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states, new [T, H], of ids [T] int64 in [0, V)."""
        hidden = self._expand_rows(input_ids).to(self._dtype)
        if self.scale is not None:
            hidden *= self.scale
        return hidden
