"""Rows of `bench_kernels` for products with weights of integer codes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from engine.kernels import dispatch
from engine.kernels.quantised_layout import CodePlanes
from engine.layers.quantised_codes import QuantisedCodes
from engine.layers.quantised_packing import E2M1_VALUES, e4m3_values, pack_codes

COLD_BYTES = 120e6
"""Of copies of a weight, so that none is found in the L2 cache."""


@dataclass(frozen=True)
class Format:
    """How a weight is stored; group 0 is one scale for a row."""

    name: str
    bits: int
    group: int
    has_minima: bool = False
    table: str = ""


FORMATS = (
    Format("int4-128", 4, 128),
    Format("Q4_0", 4, 32),
    Format("Q4_K", 4, 32, has_minima=True),
    Format("Q6_K", 6, 16),
    Format("int8", 8, 0),
    Format("fp8", 8, 0, table="e4m3"),
    Format("MXFP4", 4, 32, table="e2m1"),
    Format("NF4", 4, 64, table="nf4"),
)
ROWS = (1, 2, 8, 16, 32, 64, 128, 256, 2048)


def random_planes(form: Format, num_rows: int, num_columns: int, device: torch.device) -> Any:
    """A random weight [N, K] of a format, packed."""
    group = form.group or num_columns
    size = (num_rows, num_columns // group)
    codes = torch.randint(
        0, 2**form.bits, (num_rows, num_columns), dtype=torch.uint8, device=device
    )
    scales = torch.rand(size, device=device) * 0.01 + 0.005
    minima = table = None
    if form.table == "e4m3":
        codes[codes % 128 == 127] = 0
        table = e4m3_values()
    elif form.table:
        table = E2M1_VALUES if form.table == "e2m1" else torch.linspace(-1, 1, 16)
    elif form.has_minima:
        minima = torch.rand(size, device=device) * -0.1
    else:
        minima = scales * -float(2 ** (form.bits - 1))
    return pack_codes(QuantisedCodes(form.bits, group, codes, scales, minima, table), device)


def copies_of(weight: CodePlanes, count: int) -> list[CodePlanes]:
    """The weight and copies of it, each in memory of its own."""
    names = ("main", "extra", "scales", "minima", "arrivals")
    parts = {name: getattr(weight, name) for name in names if getattr(weight, name) is not None}
    return [weight] + [
        dataclasses.replace(weight, **{name: part.clone() for name, part in parts.items()})
        for _ in range(count - 1)
    ]


def quantised_rows(
    make_row: Any, num_rows: int, size: tuple[int, int], form: Format, device: torch.device,
    dtype: torch.dtype,
) -> list[Any]:  # fmt: skip
    """Measurements of one format: the product of M rows, and the lookup of as many.

    Args:
        make_row: `bench_kernels.Row`.
        num_rows: M.
        size: (N, K).
        form: Of the weight.
        device: Where to measure.
        dtype: Of x; the baseline's weight has it, too.
    """
    num_cols, num_inner = size
    weight = random_planes(form, num_cols, num_inner, device)
    cold = COLD_BYTES if device.type == "cuda" else 0.0
    weights = copies_of(weight, min(16, max(1, round(cold / weight.num_bytes))))
    plain_bytes = num_cols * num_inner * dtype.itemsize
    plain = [
        torch.randn(num_cols, num_inner, device=device, dtype=dtype) * 0.02
        for _ in range(min(6, max(1, round(cold / plain_bytes))))
    ]
    x = torch.randn(num_rows, num_inner, device=device, dtype=dtype)
    ids = torch.randint(0, num_cols, (num_rows,), device=device)
    case = f"{form.name} M={num_rows} {num_cols} x {num_inner}"
    return [
        make_row(
            "quantised_linear",
            case,
            lambda call: dispatch.quantised_linear(x, weights[call % len(weights)]),
            copies=len(weights),
            num_bytes=weight.num_bytes,
            flops=2.0 * num_rows * num_cols * num_inner,
            baseline=lambda call: F.linear(x, plain[call % len(plain)]),
        ),
        make_row(
            "quantised_rows",
            case,
            lambda call: dispatch.quantised_rows(weights[call % len(weights)], ids, dtype),
            copies=len(weights),
            num_bytes=num_rows * num_inner * (form.bits / 8 + dtype.itemsize),
        ),
    ]


def quantised_expert_rows(
    make_row: Any, shape: Any, num_tokens: int, form: Format, device: torch.device,
    dtype: torch.dtype,
) -> list[Any]:  # fmt: skip
    """Measurements of a layer's experts in one format; `shape` is `bench_kernels.ExpertShape`."""
    num, width, hidden_size = shape.num_experts, shape.width, shape.hidden_size
    weights = [
        (
            random_planes(form, num * 2 * width, hidden_size, device),
            random_planes(form, num * hidden_size, width, device),
        )
        for _ in range(2 if device.type == "cuda" else 1)
    ]
    x = torch.randn(num_tokens, hidden_size, device=device, dtype=dtype)
    scores = torch.rand(num_tokens, num, device=device)
    chosen = torch.topk(scores, shape.num_chosen)
    experts, shares = chosen.indices.int(), chosen.values
    num_read = len(experts.unique())

    def run(call: int) -> torch.Tensor:
        gate_up, down = weights[call % len(weights)]
        return dispatch.quantised_experts(
            x, gate_up, down, None, None, shares, experts, activation="silu"
        )

    return [
        make_row(
            "quantised_experts",
            f"{form.name} {shape.name} T={num_tokens}",
            run,
            copies=len(weights),
            num_bytes=sum(part.num_bytes for part in weights[0]) * num_read / num,
            flops=6.0 * num_tokens * shape.num_chosen * width * hidden_size,
        )
    ]
