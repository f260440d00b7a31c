"""`CPUFactory`: which product a quantised weight gets on a CPU.

| what the file has | with AVX-512's products, in bfloat16 | otherwise, or where memory is short |
|---|---|---|
| codes of up to 4 bits, one scale for a multiple of 32 columns | `FourBitWeight` | `PackedWeight` |
| other integers, float8, tables | `EightBitWeight` | `PackedWeight` |
| the projection to the logits, whatever it is | `EightBitWeight` | `PackedWeight` |

`EightBitWeight` is as fast as `FourBitWeight` and takes twice the memory; a weight of 2 or 3 bits
with scales for 16 columns, or of 4 bits with a table, is kept in 8 for it. `PackedWeight` takes
what the file takes and is 20 times slower for a row (`packed_weight` has the figures).

Parts that stand below each other (q, k and v) become one product where they are of one kind, else
several: q and k in 4 bits beside v in 6, as llama.cpp's mixtures have them, is no reason to widen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.layers.embedding import Embedding
from engine.layers.linear import Linear
from engine.layers.moe import MixtureOfExperts
from engine.layers.packed_weight import PackedWeight, PartRoom
from engine.layers.quantised_codes import QuantisedCodes
from engine.layers.quantised_eight import QuantisedEight
from engine.layers.quantised_factory import QuantisedWeight, StoredWeight
from engine.layers.quantised_linear import (
    JoinedProduct,
    Product,
    QuantisedEmbedding,
    QuantisedLinear,
    SortedColumns,
    StepRows,
)
from engine.layers.quantised_weights import (
    PANEL_ROWS,
    EightBitWeight,
    ExpansionRoom,
    FourBitWeight,
    has_eight_bit_product,
    has_four_bit_product,
)

_CPU = torch.device("cpu")


def has_quick_products(dtype: torch.dtype) -> bool:
    """Whether this CPU has products for quantised weights that are as fast as plain ones."""
    return dtype is torch.bfloat16 and has_four_bit_product() and has_eight_bit_product()


class CPUFactory:
    """See `QuantisedFactory` and the head of this module.

    Args:
        dtype: Of activations.
        rows: Which rows of the running step decode.
        saves_memory: Keep all codes in their own size, see `PackedWeight`.
    """

    def __init__(self, dtype: torch.dtype, rows: StepRows, *, saves_memory: bool = False) -> None:
        self._dtype = dtype
        self._rows = rows
        self._room, self._part_room = ExpansionRoom(), PartRoom()
        self._is_quick = has_quick_products(dtype) and not saves_memory
        self._most_numbers = 0

    @property
    def room_bytes(self) -> int:
        """Of the room in which one 4-bit weight at a time is expanded for prompts."""
        return ExpansionRoom.num_bytes(self._most_numbers)

    def num_bytes(self, parts: Sequence[StoredWeight], *, is_output: bool) -> int:
        """Memory of `linear`."""
        return sum(self._bytes_of(run) for run in self._runs(parts, is_output=is_output))

    def linear(
        self, parts: Sequence[StoredWeight], bias: torch.Tensor | None, *, is_output: bool
    ) -> Linear:
        """See `QuantisedFactory.linear`."""
        product = self._product(parts, is_output=is_output)
        return QuantisedLinear(product, bias, None if is_output else self._rows)

    def embedding_bytes(self, stored: StoredWeight) -> int:
        """Nothing: rows are read from the file when they are needed."""
        return 0

    def embedding(self, stored: StoredWeight, scale: torch.Tensor | None) -> Embedding:
        """See `QuantisedFactory.embedding`; the weight stays in its mapped file."""
        return QuantisedEmbedding(stored.take, scale, self._dtype)

    def expert_bytes(self, parts: Sequence[StoredWeight]) -> int:
        """Memory of one expert's product."""
        return self.num_bytes(parts, is_output=False)

    def experts(
        self,
        layer: MixtureOfExperts,
        gate_up: Sequence[Sequence[StoredWeight]],
        down: Sequence[StoredWeight],
    ) -> None:
        """See `QuantisedFactory.experts`."""
        products = [
            (self._product(both, is_output=False), self._product([one], is_output=False))
            for both, one in zip(gate_up, down, strict=True)
        ]
        layer.use_products(products, self._rows)

    def _product(self, parts: Sequence[StoredWeight], *, is_output: bool) -> Product:
        out_dtype = torch.float32 if is_output else self._dtype
        runs = self._runs(parts, is_output=is_output)
        products = [self._of_run(run, out_dtype) for run in runs]
        return products[0] if len(products) == 1 else JoinedProduct(products)

    def _runs(self, parts: Sequence[StoredWeight], *, is_output: bool) -> list[_Run]:
        """The parts that become one product each."""
        kinds = [self._kind(part.first_row(), is_output=is_output) for part in parts]
        runs: list[_Run] = []
        for kind, members in itertools.groupby(
            zip(kinds, parts, strict=True), key=lambda pair: pair[0]
        ):
            run = _Run(kind, [part for _, part in members])
            if kind.product == "four" and run.shape[0] % PANEL_ROWS:
                run = _Run(_Kind("eight"), run.parts)
            if runs and runs[-1].kind == run.kind:
                runs[-1] = _Run(run.kind, runs[-1].parts + run.parts)
            else:
                runs.append(run)
        return runs

    def _kind(self, row: QuantisedWeight, *, is_output: bool) -> _Kind:
        if self._is_quick:
            if isinstance(row, QuantisedEight) or is_output or row.table is not None:
                return _Kind("eight")
            if row.bits > 4 or not FourBitWeight.accepts(0, row.group):
                return _Kind("eight")
            return _Kind("four", row.bits, row.group, columns=_numbers(row.columns))
        codes = as_codes(row)
        return _Kind(
            "packed",
            codes.bits,
            codes.group,
            codes.minima is not None,
            _numbers(codes.table),
            _numbers(codes.columns),
        )

    def _bytes_of(self, run: _Run) -> int:
        kind = run.kind
        if kind.product == "four":
            self._most_numbers = max(self._most_numbers, math.prod(run.shape))
            return FourBitWeight.num_bytes(run.shape, kind.group)
        if kind.product == "eight":
            return run.shape[0] * run.shape[1]
        return PackedWeight.num_bytes(kind.bits, run.shape, kind.group, kind.has_minima)

    def _of_run(self, run: _Run, out_dtype: torch.dtype) -> Product:
        chunks = (chunk for part in run.parts for chunk in part.chunks())
        if run.kind.product == "eight":
            return EightBitWeight(*run.shape, chunks, out_dtype)
        columns = as_codes(run.parts[0].first_row()).columns
        product: Product
        if run.kind.product == "four":
            product = self._four_bits(run)
        else:
            # Logits are summed in float32: rounded they would tie.
            product = PackedWeight(
                run.shape,
                (as_codes(chunk) for chunk in chunks),
                out_dtype,
                out_dtype,
                self._part_room,
            )
        return product if columns is None else SortedColumns(product, columns)

    def _four_bits(self, run: _Run) -> FourBitWeight:
        codes, scales, minima = [], [], []
        for part in run.parts:
            weight = part.read(_CPU)
            assert isinstance(weight, QuantisedCodes)
            # Codes of fewer bits move to the middle of the sixteen, where the product has its zero:
            # what it adds to them is then small, and rounded finely.
            shift = 8 - (1 << (weight.bits - 1))
            codes.append(weight.codes + shift)
            scales.append(weight.scales)
            least = weight.scales * -float(shift)
            minima.append(least if weight.minima is None else least.add_(weight.minima))
        return FourBitWeight(torch.cat(codes), torch.cat(scales), torch.cat(minima), self._room)


@dataclass(frozen=True)
class _Kind:
    """What parts must have in common to be one product."""

    product: str
    bits: int = 8
    group: int = 0
    has_minima: bool = False
    table: tuple[float, ...] = ()
    columns: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Run:
    """Parts below each other that become one product."""

    kind: _Kind
    parts: list[StoredWeight]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]


def as_codes(weight: QuantisedWeight) -> QuantisedCodes:
    """A weight as codes with scales for groups of columns; 8-bit numbers become table entries."""
    if isinstance(weight, QuantisedCodes):
        return weight
    num_rows, num_columns = weight.shape
    group = math.gcd(num_columns, weight.tile[1])
    scales = weight.scales.repeat_interleave(weight.tile[0], 0)[:num_rows]
    firsts = torch.arange(0, num_columns, group) // weight.tile[1]
    every_byte = torch.arange(256, dtype=torch.uint8)
    return QuantisedCodes(
        bits=8,
        group=group,
        codes=weight.values.view(torch.uint8),
        scales=scales[:, firsts],
        table=every_byte.view(weight.values.dtype).float(),
    )


def _numbers(values: torch.Tensor | None) -> tuple[float, ...]:
    return () if values is None else tuple(values.tolist())
