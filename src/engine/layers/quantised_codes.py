"""`QuantisedCodes`: one weight of integer codes, whatever file format it came from."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class QuantisedCodes:
    """A weight [N, K] stored as codes: what every format is read into, one weight at a time.

    `w[n, k] = value(codes[n, k]) * scales[n, k // group] + minima[n, k // group]`, where `value` is
    the entry of `table`, or the code itself where there is no table. Loaders unpack a weight into
    this form on its way from the file; layers pack it again as their product reads it. It is
    short-lived: a byte for every code.

    Attributes:
        bits: Of a code: 2, 3, 4, 5, 6 or 8.
        group: Columns that share a scale; divides K. K itself: one scale for a row.
        codes: [N, K] uint8, below 2 to the power of `bits`.
        scales: [N, K / group] float32.
        minima: [N, K / group] float32; None for zeros. A zero point z is the minimum -z * scale.
        table: [2 ** bits] float32, the values of the codes (NF4, IQ4_NL, MXFP4); None for the codes
            themselves.
        columns: [K] int64: column k of this weight multiplies `x[:, columns[k]]` (GPTQ with
            act-order: columns are sorted by group); None where they are in order.
    """

    bits: int
    group: int
    codes: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor | None = None
    table: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    def expand(self) -> torch.Tensor:
        """The numbers, new [N, K] float32, columns in x's order: the reference of products."""
        num_rows, num_columns = self.shape
        values = self.codes.float() if self.table is None else self.table[self.codes.long()]
        grouped = values.view(num_rows, num_columns // self.group, self.group)
        grouped = grouped * self.scales[:, :, None]
        if self.minima is not None:
            grouped = grouped + self.minima[:, :, None]
        weight = grouped.view(num_rows, num_columns)
        if self.columns is None:
            return weight
        in_order = torch.empty_like(weight)
        in_order[:, self.columns] = weight
        return in_order
