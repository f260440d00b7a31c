"""`GPUFactory`: layers whose weights stay in codes on a GPU.

Every format becomes `CodePlanes` (`kernels/quantised_layout` has the layout, and what a weight
takes), whose kernels unpack as they multiply. Parts that stand below each other (q, k and v) are
one product where they are of one kind, else several into one result.

What a checkpoint says about rounding x to 8 bits is done where it helps: for more rows than a
decoding batch has, and if the weight has one scale for a row. There x gets a scale for each of its
rows, which is never coarser than what recipes with fixed scales do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from engine.errors import UnsupportedModelError
from engine.kernels import dispatch
from engine.kernels.quantised_layout import CodePlanes, NormOfRows
from engine.layers.embedding import Embedding
from engine.layers.linear import Linear
from engine.layers.moe import MixtureOfExperts
from engine.layers.norm import RMSNorm
from engine.layers.quantised_codes import QuantisedCodes
from engine.layers.quantised_eight import QuantisedEight
from engine.layers.quantised_factory import QuantisedWeight, StoredWeight
from engine.layers.quantised_packing import (
    can_pack_codes,
    e4m3_values,
    merge_codes,
    pack_codes,
    packed_bytes,
)

_FIRST_FLOAT8_GPU = (8, 9)
"""Compute capability from which the library multiplies e4m3."""


class CodedLinear(Linear):
    """A `Linear` over weights of codes; loaded when it is made.

    Args:
        weights: Of equal K, top to bottom.
        bias: [sum of N] or None.
        batch_invariant: As in `Linear`.
    """

    def __init__(
        self, weights: Sequence[CodePlanes], bias: torch.Tensor | None, *, batch_invariant: bool
    ) -> None:
        self.parts = {}
        self.bias = bias
        self.uses_plain_product = False
        self.packed = None
        self.weights = tuple(weights)
        self._batch_invariant = batch_invariant

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Nothing: it is loaded already."""
        return iter(())

    def finish_loading(self) -> None:
        """Nothing is left to do."""

    def beats_library(self, kind: str, x: torch.Tensor, activation: str = "silu") -> bool:
        """See `Linear`; the activation is one op with the product of a single weight."""
        return kind == "gated" and len(self.weights) == 1

    def gated(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """See `Linear`."""
        return self._of_single(x, None, activation=activation)

    def of_normed(
        self,
        hidden: torch.Tensor,
        squares: torch.Tensor,
        norm: RMSNorm,
        activation: str | None = None,
    ) -> torch.Tensor:
        """See `Linear`; `squares` is not read: the product of one row sums them up by itself."""
        joined = NormOfRows(norm.weight, norm.eps, norm.offset)
        if len(self.weights) == 1:
            return self._of_single(hidden, None, activation=activation, norm=joined)
        y = self._of_several(hidden, None, norm=joined)
        return y if activation is None else dispatch.act_mul(y, activation)

    def add_to(self, hidden: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """See `Linear`; what it returns stands for `squares`, which nobody reads."""
        if len(self.weights) == 1:
            return self._of_single(x, hidden, adds=True)
        return hidden.add_(self._of_several(x, None))

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `Linear`."""
        multiply = self._of_single if len(self.weights) == 1 else self._of_several
        return multiply(x, out)

    def _of_single(
        self,
        x: torch.Tensor,
        out: torch.Tensor | None,
        *,
        activation: str | None = None,
        norm: NormOfRows | None = None,
        adds: bool = False,
    ) -> torch.Tensor:
        return dispatch.quantised_linear(
            x,
            self.weights[0],
            self.bias,
            out,
            batch_invariant=self._batch_invariant,
            activation=activation,
            norm=norm,
            adds=adds,
        )

    def _of_several(
        self, x: torch.Tensor, out: torch.Tensor | None, *, norm: NormOfRows | None = None
    ) -> torch.Tensor:
        if out is None:
            out = x.new_empty(x.shape[0], sum(weight.shape[0] for weight in self.weights))
        start = 0
        for weight in self.weights:
            rows = slice(start, start + weight.shape[0])
            bias = None if self.bias is None else self.bias[rows]
            dispatch.quantised_linear(
                x, weight, bias, out[:, rows], batch_invariant=self._batch_invariant, norm=norm
            )
            start = rows.stop
        return out


class CodedEmbedding(Embedding):
    """Row lookup in a weight of codes [V, H].

    Args:
        weight: Its columns are in order.
        scale: As in `Embedding`, or None.
        dtype: Of the hidden states.
    """

    def __init__(self, weight: CodePlanes, scale: torch.Tensor | None, dtype: torch.dtype) -> None:
        self.scale = scale
        self._planes = weight
        self._dtype = dtype

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Nothing: it is loaded already."""
        return iter(())

    def with_squares(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Embedding`; products over codes do not read `squares`, and these are none."""
        hidden = self(input_ids)
        return hidden, hidden

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states, new [T, H], of ids [T] int64 in [0, V)."""
        hidden = dispatch.quantised_rows(self._planes, input_ids, self._dtype)
        if self.scale is not None:
            hidden *= self.scale
        return hidden


class GPUFactory:
    """See `QuantisedFactory` and the head of this module.

    Args:
        device: Of the layers.
        dtype: Of activations.
        batch_invariant: As in `Linear`.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, *, batch_invariant: bool) -> None:
        self._device, self._dtype = device, dtype
        self._batch_invariant = batch_invariant
        self._has_float8 = (
            device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FIRST_FLOAT8_GPU
        )
        # A tied embedding shares the output projection's planes.
        self._planned_output: StoredWeight | None = None
        self._output: CodePlanes | None = None

    @property
    def room_bytes(self) -> int:
        """Nothing: what a product needs for a moment belongs to the step, which is measured."""
        return 0

    def num_bytes(self, parts: Sequence[StoredWeight], *, is_output: bool) -> int | None:
        """Memory of `linear`; None where a group of columns is no multiple of 16."""
        if is_output:
            self._planned_output = parts[0]
        total = 0
        for part in parts:
            row = as_integers(part.first_row())
            if not can_pack_codes(row):
                return None
            total += packed_bytes(row, part.shape[0])
        return total

    def linear(
        self, parts: Sequence[StoredWeight], bias: torch.Tensor | None, *, is_output: bool
    ) -> Linear:
        """See `QuantisedFactory.linear`; the projection to the logits gives the model's dtype."""
        weights: list[CodePlanes] = []
        for _, run in itertools.groupby(parts, key=lambda part: _kind(part.first_row())):
            read = [part.read(self._device) for part in run]
            rounds_input = all(self._rounds_input(weight) for weight in read)
            codes = [as_integers(weight) for weight in read]
            merged = merge_codes(codes)
            for one in codes if merged is None else [merged]:
                weights.append(pack_codes(one, self._device, rounds_input=rounds_input))
        if is_output:
            self._output = weights[0]
        return CodedLinear(weights, bias, batch_invariant=self._batch_invariant)

    def embedding_bytes(self, stored: StoredWeight) -> int | None:
        """Memory of `embedding`: nothing where it is the output projection's weight."""
        if as_integers(stored.first_row()).columns is not None:
            return None
        if stored is self._planned_output:
            return 0
        return self.num_bytes([stored], is_output=False)

    def embedding(self, stored: StoredWeight, scale: torch.Tensor | None) -> Embedding:
        """See `QuantisedFactory.embedding`."""
        planes = self._output if stored is self._planned_output else None
        if planes is None:
            planes = pack_codes(as_integers(stored.read(self._device)), self._device)
        return CodedEmbedding(planes, scale, self._dtype)

    def expert_bytes(self, parts: Sequence[StoredWeight]) -> int | None:
        """Memory of one expert's product; None where its parts are of several kinds."""
        rows = [part.first_row() for part in parts]
        has_order = any(as_integers(row).columns is not None for row in rows)
        if has_order or len({_kind(row) for row in rows}) > 1:
            return None
        return self.num_bytes(parts, is_output=False)

    def experts(
        self,
        layer: MixtureOfExperts,
        gate_up: Sequence[Sequence[StoredWeight]],
        down: Sequence[StoredWeight],
    ) -> None:
        """See `QuantisedFactory.experts`; all experts of a layer become one weight.

        Raises:
            UnsupportedModelError: They are of several kinds.
        """
        gates_and_ups = [part for expert in gate_up for part in expert]
        layer.use_planes(self._stacked(gates_and_ups), self._stacked(down))

    def _stacked(self, parts: Sequence[StoredWeight]) -> CodePlanes:
        merged = merge_codes([as_integers(part.read(self._device)) for part in parts])
        if merged is None:
            msg = (
                "The experts of a layer are quantised in several ways, and their product on a GPU "
                "takes one. Use device='cpu', or a checkpoint whose experts are alike."
            )
            raise UnsupportedModelError(msg)
        return pack_codes(merged, self._device)

    def _rounds_input(self, weight: QuantisedWeight) -> bool:
        if isinstance(weight, QuantisedCodes) or weight.activations.kind == "none":
            return False
        return weight.values.dtype == torch.int8 or self._has_float8


def as_integers(weight: QuantisedWeight) -> QuantisedCodes:
    """A weight as codes: int8 around 128, float8 with the table of e4m3's values."""
    if isinstance(weight, QuantisedCodes):
        return weight
    num_rows, num_columns = weight.shape
    scales = weight.scales.repeat_interleave(weight.tile[0], 0)[:num_rows]
    codes = weight.values.view(torch.uint8)
    minima = table = None
    if weight.values.dtype == torch.int8:
        codes = codes ^ 0x80
        minima = scales * -128.0
    else:
        table = e4m3_values()
    group = min(weight.tile[1], num_columns)
    return QuantisedCodes(8, group, codes, scales, minima, table)


def _kind(row: QuantisedWeight) -> tuple[object, ...]:
    """What parts that become one product have in common, as far as a row shows it."""
    if isinstance(row, QuantisedEight):
        return row.values.dtype, row.tile[1], row.activations.kind
    return row.bits, row.group, row.minima is None, row.table is None, row.columns is None
