"""Plain-torch twins of the ops on weights of integer codes."""

from __future__ import annotations

import torch

from engine.kernels import reference
from engine.kernels.quantised_layout import STRIP, STRIPS, CodePlanes, NormOfRows


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
    """`x @ w.T + bias` with a weight of codes, with what stands before and after it on demand.

    Args:
        x: [T, K].
        weight: [N, K].
        bias: [N], any float dtype, or None.
        out: [T, N] with stride 1 along N, to be written; None makes a new one of x's dtype. There
            is none with an activation.
        batch_invariant: Whether a row's bits may not depend on the number of rows.
        activation: As in `act_mul`: the upper half of the weight's rows is the gate's.
        norm: Of x.
        adds: Add to what is in `out`.

    Returns:
        `out`, or new [T, N]; [T, N / 2] with an activation. For one row what joins the product may
        stay in float32 where several kernels round in between. Rows may be rounded to 8 bits where
        `weight.multiplies_bytes`.
    """
    if norm is not None:
        x = reference.rms_norm(x, norm.weight, norm.eps, norm.offset)
    if weight.columns is not None:
        x = x.index_select(1, weight.columns)
    expanded = quantised_rows(weight, None, torch.float32).to(x.dtype)
    y = torch.nn.functional.linear(x, expanded, None if bias is None else bias.to(x.dtype))
    if activation is not None:
        return reference.act_mul(y, activation)
    if out is None:
        return y
    return out.add_(y) if adds else out.copy_(y)


def quantised_rows(
    weight: CodePlanes, rows: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Rows of a weight of codes as numbers, its columns in the weight's own order.

    Args:
        weight: [N, K].
        rows: [R] int64 in [0, N), or None for all.
        dtype: Of the result.

    Returns:
        New [R, K].
    """
    planes = (weight.main, weight.extra, weight.scales.T, None)
    minima = None if weight.minima is None else weight.minima.T
    main, extra, scales, _ = planes
    if rows is not None:
        main, scales = main[rows], scales[rows]
        extra = None if extra is None else extra[rows]
        minima = None if minima is None else minima[rows]
    codes = _codes(main, weight)
    if extra is not None:
        codes |= _strips(extra, weight.bits - weight.main_bits, STRIPS) << weight.main_bits
    num_columns = weight.shape[1]
    codes = codes.view(codes.shape[0], -1)[:, :num_columns]
    group = weight.group or num_columns
    in_group = torch.arange(num_columns, device=codes.device) // group
    scale = scales.float()[:, in_group]
    values = _values(codes, weight)
    minimum = -weight.zero * scale if minima is None else minima.float()[:, in_group]
    return ((values * scale + minimum) * weight.factor).to(dtype)


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
    """`moe_experts` with weights of codes.

    Args:
        x: [T, H].
        gate_up: [E 2 I, H]: experts below each other, each with its gate above its up.
        down: [E H, I].
        gate_up_bias: [E, 2 I] or None.
        down_bias: [E, H] or None.
        weights: [T, K] float32.
        experts: [T, K] int32 in [0, E).
        activation: As in `reference.moe_experts`, as are the others.
        scales_input: Likewise.
        swiglu_limit: Likewise.
        swiglu_alpha: Likewise.

    Returns:
        New [T, H] of x's dtype.
    """
    width = down.shape[1]
    return reference.moe_experts(
        x,
        quantised_rows(gate_up, None, x.dtype).view(-1, 2 * width, x.shape[1]),
        quantised_rows(down, None, x.dtype).view(-1, x.shape[1], width),
        gate_up_bias,
        down_bias,
        weights,
        experts,
        activation=activation,
        scales_input=scales_input,
        swiglu_limit=swiglu_limit,
        swiglu_alpha=swiglu_alpha,
    )


def _codes(main: torch.Tensor, weight: CodePlanes) -> torch.Tensor:
    """[R, bundles, 8, 16] int32 of the lower bits."""
    if weight.main_bits < 8:
        return _strips(main, weight.main_bits, STRIPS)
    halves = main.unflatten(-1, (2, STRIP))
    codes = torch.cat([_strips(halves[:, :, half], 8, 4) for half in (0, 1)], dim=2)
    return codes if weight.exponent_bits else codes ^ 0x80


def _strips(words: torch.Tensor, bits: int, num_strips: int) -> torch.Tensor:
    """[R, bundles, strips, 16] int32 of words [R, bundles, 16]."""
    shifts = torch.arange(num_strips, device=words.device, dtype=torch.int32) * bits
    return (words.to(torch.int32)[:, :, None] >> shifts[:, None]) & ((1 << bits) - 1)


def _values(codes: torch.Tensor, weight: CodePlanes) -> torch.Tensor:
    if weight.table is not None:
        return weight.table[codes.long()]
    if not weight.exponent_bits:
        return codes.float()
    mantissa_bits = weight.bits - 1 - weight.exponent_bits
    mantissa = (codes & ((1 << mantissa_bits) - 1)).float() / (1 << mantissa_bits)
    exponent = (codes >> mantissa_bits) & ((1 << weight.exponent_bits) - 1)
    bias = 2 ** (weight.exponent_bits - 1) - 1
    is_normal = exponent > 0
    size = (mantissa + is_normal) * 2.0 ** (exponent.clamp(min=1) - bias).float()
    return torch.where(codes >> (weight.bits - 1) > 0, -size, size)
