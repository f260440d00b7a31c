"""Random weights of integer codes, in every form that the engine knows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.layers.quantised_codes import QuantisedCodes
from engine.layers.quantised_packing import E2M1_VALUES, e4m3_values


@dataclass(frozen=True)
class CodeKind:
    """A form of codes; group 0 is one scale for a row."""

    name: str
    bits: int
    group: int
    values: str = "centred"  # or "minima", "table", "e4m3", "e2m1", "plain"
    in_order: bool = True

    def __str__(self) -> str:
        return self.name


KINDS = [
    CodeKind("q4_0", 4, 32),
    CodeKind("q4_1", 4, 32, "minima"),
    CodeKind("gptq-128", 4, 128),
    CodeKind("gptq-act-order", 4, 128, "minima", in_order=False),
    CodeKind("awq-64", 4, 64, "minima"),
    CodeKind("int4-row", 4, 0),
    CodeKind("nf4-64", 4, 64, "table"),
    CodeKind("mxfp4", 4, 32, "e2m1"),
    CodeKind("q2_k", 2, 16, "minima"),
    CodeKind("q3_k", 3, 16),
    CodeKind("q5_0", 5, 32),
    CodeKind("q5_k", 5, 32, "minima"),
    CodeKind("q6_k", 6, 16),
    CodeKind("q8_0", 8, 32),
    CodeKind("int8-row", 8, 0),
    CodeKind("unsigned-8", 8, 64, "plain"),
    CodeKind("int8-96", 8, 96, "minima"),
    CodeKind("fp8-row", 8, 0, "e4m3"),
    CodeKind("fp8-block", 8, 128, "e4m3"),
]


def random_codes(kind: CodeKind, num_rows: int, num_columns: int, seed: int = 0) -> QuantisedCodes:
    """A weight [N, K] whose product with x of order 1 is of order 1, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    group = kind.group or num_columns

    def numbers(low: float, high: float) -> torch.Tensor:
        shape = (num_rows, num_columns // group)
        return torch.empty(shape).uniform_(low, high, generator=generator)

    codes = torch.randint(
        0, 2**kind.bits, (num_rows, num_columns), generator=generator, dtype=torch.uint8
    )
    table = minima = None
    if kind.values == "e4m3":
        codes[codes % 128 == 127] = 3  # no NaN
        table = e4m3_values()
    elif kind.values == "e2m1":
        table = E2M1_VALUES
    elif kind.values == "table":
        table = torch.randn(2**kind.bits, generator=generator)
    spread = codes.float().std() if table is None else table.nan_to_num()[codes.long()].std()
    scales = numbers(0.5, 1.5) / (spread * num_columns**0.5)
    if kind.values == "centred":
        minima = scales * -float(2 ** (kind.bits - 1))
    elif kind.values == "minima":
        minima = scales * 2**kind.bits * numbers(-1.0, 0.0)
    elif kind.values == "plain":
        scales *= 0.3
    columns = None
    if not kind.in_order:
        columns = torch.randperm(num_columns, generator=generator)
    return QuantisedCodes(kind.bits, group, codes, scales, minima, table, columns)
