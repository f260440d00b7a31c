"""`Linear`: one matrix product of a layer, for one weight or several merged ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F

from engine.kernels import dispatch, few_row_tiles, fused_tiles
from engine.layers.norm import RMSNorm
from engine.layers.row_sizes import ROW_SIZES, in_parts

_product: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""oneDNN's product with a packed weight, where torch was built with oneDNN (see `can_pack`)."""


class Linear:
    """`y = x @ weight.T + bias`, x [T, in_features] -> y [T, out_features].

    The layer owns one weight [out_features, in_features], which may hold several weights of the
    checkpoint below each other (q, k and v; gate and up): one product reads them all, and
    `named_weights` shows each as a view of its own for the loader to fill.

    The weight is allocated when it is first asked for: a layer that is replaced by a quantised one
    never takes memory.

    Callers know `named_weights`, `finish_loading` and the call; whoever stores weights in another
    form (quantised, with adapters) offers these three.

    On the CPU `finish_loading` moves the weight into oneDNN's blocked layout and drops the plain
    one. That is 1.5-2 times faster at 1 to 8 rows, and it makes a row's result independent of the
    rows beside it, bit by bit, in float32 and bfloat16 (1 to 600 rows compared, torch 2.13), which
    plain `F.linear` is not: it picks another summation order for each small number of rows.

    Args:
        in_features: Columns of the weight.
        parts: Name -> rows of each merged weight, top to bottom.
        bias: Whether each part has a bias.
        device: Where the weight lives.
        dtype: Of weight, bias, x and y.
        batch_invariant: On a GPU use the kernel whose rows do not depend on their neighbours.
    """

    weight: torch.Tensor

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        *,
        bias: bool = False,
        device: torch.device,
        dtype: torch.dtype,
        batch_invariant: bool = False,
    ) -> None:
        self.parts = dict(parts)
        out_features = sum(parts.values())
        self._allocate = partial(torch.empty, out_features, in_features, device=device, dtype=dtype)
        self.bias = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.uses_plain_product = device.type != "cpu" and not batch_invariant
        self.packed: torch.Tensor | None = None

    def __getattr__(self, name: str) -> torch.Tensor:
        # Only asked for what is not there: `weight`, once.
        if name != "weight" or "_allocate" not in self.__dict__:
            raise AttributeError(name)
        self.weight = self._allocate()
        return self.weight

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """("q_proj.weight", view [rows, in_features]), … to be filled before `finish_loading`."""
        start = 0
        for name, rows in self.parts.items():
            yield f"{name}.weight", self.weight[start : start + rows]
            if self.bias is not None:
                yield f"{name}.bias", self.bias[start : start + rows]
            start += rows

    def finish_loading(self) -> None:
        """Bring the filled weight into the layout of the product; call once, before the first x."""
        if can_pack(self.weight):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)
            self.weight = self.weight.new_empty(0)

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Product with x [T, in_features], contiguous.

        Returns:
            `out` [T, out_features], contiguous, written in place; new where it is None.
        """
        if self.packed is None and self.uses_plain_product:
            if few_row_tiles.beats_library(x.shape[0], self.weight):
                return dispatch.few_row_linear(x, self.weight, self.bias, out)
            if self.bias is None:
                return torch.mm(x, self.weight.t(), out=out)
        y = self._product(x)
        return y if out is None else out.copy_(y)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is not None:
            return packed_linear(x, self.packed, self.bias)
        if self.uses_plain_product:
            return F.linear(x, self.weight, self.bias)
        return dispatch.batch_invariant_linear(x, self.weight, self.bias)

    def of_normed(
        self,
        hidden: torch.Tensor,
        squares: torch.Tensor,
        norm: RMSNorm,
        activation: str | None = None,
    ) -> torch.Tensor:
        """`self(norm(hidden))`, or the gated activation of it, in one kernel for few rows.

        Args:
            hidden: [T, in_features], the residual stream.
            squares: [T, P] float32, parts of the sums of squares of its rows, as `add_to` and
                `Embedding.with_squares` return them.
            norm: Applied to `hidden`.
            activation: As in `dispatch.normed_linear`.
        """
        return dispatch.normed_linear(
            hidden,
            squares,
            norm.weight,
            self.weight,
            self.bias,
            eps=norm.eps,
            weight_offset=norm.offset,
            activation=activation,
        )

    def add_to(self, hidden: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`hidden += self(x)` in place, in one kernel for few rows; returns the new `squares`."""
        return dispatch.add_linear(x, self.weight, hidden, self.bias)

    def accumulates(self, num_rows: int) -> bool:
        """Whether `accumulate` can, and is faster than `self` and a sum, for so many rows."""
        return (
            self.packed is None
            and self.uses_plain_product
            and self.bias is None
            and not few_row_tiles.beats_library(num_rows, self.weight)
        )

    def accumulate(self, hidden: torch.Tensor, x: torch.Tensor) -> None:
        """`hidden += self(x)` in place, by the library, where `accumulates`; rounded once."""
        hidden.addmm_(x, self.weight.t())

    def beats_library(self, kind: str, x: torch.Tensor, activation: str = "silu") -> bool:
        """Whether this product of x is faster together with what follows it.

        Args:
            kind: "qkv" with rotation and KV write, or "gated" with the activation.
            x: [T, in_features], normalised.
            activation: Of "gated".
        """
        return (
            self.packed is None
            and self.uses_plain_product
            and fused_tiles.beats_library(kind, x.shape[0], self.weight, activation)
        )

    def gated(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """`act_mul(self(x))` in one kernel, where `beats_library` says so."""
        return dispatch.scaled_linear(
            x, None, self.weight, self.bias, eps=0.0, activation=activation
        )

    def of_weighed(
        self, x: torch.Tensor, squares: torch.Tensor, eps: float, activation: str | None = None
    ) -> torch.Tensor:
        """`self` of the norm of weighed rows x [T, in_features]; see `dispatch.scaled_linear`."""
        return dispatch.scaled_linear(
            x, squares, self.weight, self.bias, eps=eps, activation=activation
        )

    def add_weighed(
        self, hidden: torch.Tensor, x: torch.Tensor, next_norm: RMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`hidden += self(x)` in place; returns (hidden weighed for `next_norm`, `squares`)."""
        return dispatch.add_weighed_linear(
            x, self.weight, hidden, next_norm.weight, self.bias, weight_offset=next_norm.offset
        )


class TiedLinear(Linear):
    """The output projection that shares the embedding's weight, which stays with the embedding."""

    def __init__(self, weight: torch.Tensor, *, batch_invariant: bool = False) -> None:
        self.parts = {}
        self.weight = weight
        self.bias = None
        self.uses_plain_product = weight.device.type != "cpu" and not batch_invariant
        self.packed = None

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Nothing: the embedding is loaded under its own name."""
        return iter(())


def can_pack(weight: torch.Tensor) -> bool:
    """Whether this torch and this CPU have oneDNN's blocked layout for the weight's dtype."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Product of x [T, K] with a weight in oneDNN's layout, new [T, N].

    Runs in parts of `ROW_SIZES` rows, the last one padded. So never with a single row, for which
    oneDNN has a vector kernel that sums in another order; two rows and more all agree.
    """
    if x.shape[0] == 1:
        # The same row again: one call, where padding takes three.
        fewest = torch.cat((x,) * ROW_SIZES[0])
        return cast("torch.Tensor", _product(fewest, packed, bias, "none", [], ""))[:1]
    return in_parts(x, lambda rows: _product(rows, packed, bias, "none", [], ""))
