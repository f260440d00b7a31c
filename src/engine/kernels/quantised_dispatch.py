"""The ops over weights of codes; layers call them through `dispatch`, whose rules hold here."""

from __future__ import annotations

import torch

from engine.kernels import cpu
from engine.kernels.quantised_layout import CodePlanes, NormOfRows


def quantised_linear(
    x: torch.Tensor,
    weight: CodePlanes,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    batch_invariant: bool = False,
    activation: str | None = None,
    norm: NormOfRows | None = None,
    adds: bool = False,
) -> torch.Tensor:
    """`x @ w.T + bias` with codes; see `quantised_reference.quantised_linear`."""
    if x.is_cuda:
        from engine.kernels.quantised_linear import quantised_linear as op
    else:
        op = cpu.quantised_linear
    return op(
        x,
        weight,
        bias,
        out,
        batch_invariant=batch_invariant,
        activation=activation,
        norm=norm,
        adds=adds,
    )


def quantised_rows(
    weight: CodePlanes, rows: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Rows of a weight of codes as numbers; see `quantised_reference.quantised_rows`."""
    if weight.device.type != "cuda":
        return cpu.quantised_rows(weight, rows, dtype)
    from engine.kernels import quantised_linear as kernels

    return kernels.quantised_rows(weight, rows, dtype)


def quantised_experts(
    x: torch.Tensor,
    gate_up: CodePlanes,
    down: CodePlanes,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    weights: torch.Tensor,
    experts: torch.Tensor,
    *,
    activation: str,
    scales_input: bool = False,
    swiglu_limit: float = 0.0,
    swiglu_alpha: float = 1.0,
) -> torch.Tensor:
    """The chosen experts, weights of codes; see `quantised_reference.quantised_experts`."""
    if x.is_cuda:
        from engine.kernels.quantised_experts import quantised_experts as op
    else:
        op = cpu.quantised_experts
    return op(
        x,
        gate_up,
        down,
        gate_up_bias,
        down_bias,
        weights,
        experts,
        activation=activation,
        scales_input=scales_input,
        swiglu_limit=swiglu_limit,
        swiglu_alpha=swiglu_alpha,
    )
