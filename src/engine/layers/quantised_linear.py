"""`QuantisedLinear`, `QuantisedEmbedding`: layers whose weight stays in the codes of its file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from engine.layers.embedding import Embedding
from engine.layers.linear import Linear


class StepRows:
    """How many leading rows of the running step decode; a model's layers share one.

    Written by the forward before its first layer, read by the layers; the engine thread's own.
    """

    num_decodes: int = 0


class Product(Protocol):
    """What multiplies with one quantised weight [N, K]."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""

    def __call__(self, x: torch.Tensor, num_decodes: int) -> torch.Tensor:
        """Product with x [M, K], contiguous, whose first rows decode: new [M, N]."""


class JoinedProduct:
    """Products of the same x whose results stand beside each other.

    Args:
        products: Of equal K.
    """

    def __init__(self, products: Sequence[Product]) -> None:
        self.shape = (sum(product.shape[0] for product in products), products[0].shape[1])
        self._products = tuple(products)

    def __call__(self, x: torch.Tensor, num_decodes: int) -> torch.Tensor:
        """See `Product`."""
        return torch.cat([product(x, num_decodes) for product in self._products], -1)


class SortedColumns:
    """A product whose weight has its columns in another order than x (GPTQ's act-order).

    Args:
        product: Column k of its weight
        columns: belongs to column `columns[k]` of x; [K] int64.
    """

    def __init__(self, product: Product, columns: torch.Tensor) -> None:
        self.shape = product.shape
        self._product = product
        self._columns = columns

    def __call__(self, x: torch.Tensor, num_decodes: int) -> torch.Tensor:
        """See `Product`."""
        return self._product(x.index_select(1, self._columns), num_decodes)


class QuantisedLinear(Linear):
    """A `Linear` over a quantised weight; loaded when it is made.

    Args:
        weight: Codes and scales.
        bias: [out_features] or None.
        rows: Which rows decode; None where all do, as those of the output projection.
    """

    def __init__(self, weight: Product, bias: torch.Tensor | None, rows: StepRows | None) -> None:
        self.parts = {}
        self.bias = bias
        self.uses_plain_product = False
        self.packed = None
        self.weight_product = weight
        self._rows = rows

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Nothing: it is loaded already."""
        return iter(())

    def finish_loading(self) -> None:
        """Nothing is left to do."""

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        rows = self._rows
        y = self.weight_product(x, x.shape[0] if rows is None else rows.num_decodes)
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
