"""Bring the neutral form of a quantised weight into the layout of the GPU's kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from engine.errors import UnsupportedModelError
from engine.kernels.quantised_layout import (
    BUNDLE,
    MAIN_BITS,
    MOST_TILES_TO_JOIN,
    STRIP,
    STRIPS,
    CodePlanes,
)
from engine.layers.quantised_codes import QuantisedCodes

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
_LONG_GROUP = 1024
_LARGEST_EXPONENT = 14
_SIGN_BITS = -0x7F7F7F80
"""0x80808080 as int32: turns bytes into signed ones."""
_HALF_OF_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES = torch.tensor([*_HALF_OF_E2M1, *(-value for value in _HALF_OF_E2M1)])
"""Value of every 4-bit float of MXFP4, [16] float32."""


def can_pack_codes(codes: QuantisedCodes) -> bool:
    """Whether the kernels take a weight: groups of whole strips, or one scale for a row."""
    return codes.group % STRIP == 0 or codes.group == codes.shape[1]


def pack_codes(
    codes: QuantisedCodes, device: torch.device | None = None, *, rounds_input: bool = False
) -> CodePlanes:
    """Pack a weight for the kernels.

    Args:
        codes: The weight.
        device: Where it shall be; by default where it is.
        rounds_input: As in `CodePlanes`.

    Raises:
        UnsupportedModelError: The group is no multiple of 16 columns.
    """
    num_rows, num_columns = codes.shape
    if not can_pack_codes(codes):
        msg = (
            f"Weights with one scale for {codes.group} columns cannot be computed with on a GPU: "
            f"groups must be a multiple of {STRIP} columns. Use device='cpu', or dtype='bfloat16' "
            "to expand the weights."
        )
        raise UnsupportedModelError(msg)
    device = device or codes.codes.device
    main_bits = MAIN_BITS[codes.bits]
    exponent_bits = _exponent_bits(codes)
    strips = codes.codes.to(device)
    strips = F.pad(strips, (0, -num_columns % BUNDLE)).view(num_rows, -1, STRIPS, STRIP)
    if main_bits == 8:
        halves = [_plane(strips[:, :, half : half + 4], 0, 8) for half in (0, 4)]
        main = torch.cat(halves, dim=-1)
        if not exponent_bits:
            main ^= _SIGN_BITS
    else:
        main = _plane(strips, 0, main_bits)
    extra_bits = codes.bits - main_bits
    extra = _plane(strips, main_bits, extra_bits) if extra_bits else None
    scales = codes.scales.to(device=device, dtype=torch.float32)
    minima = None if codes.minima is None else codes.minima.to(scales)
    zero = 0.0 if minima is None else _common_zero(scales, minima)
    if zero is not None:
        minima = None
    dtype = _dtype_of_scales(codes)
    factor = _factor(codes, scales, minima)
    table = None if codes.table is None or exponent_bits else codes.table.to(scales)
    if table is not None and codes.bits == 4:
        table = table.half().float()
    return CodePlanes(
        shape=(num_rows, num_columns),
        bits=codes.bits,
        group=0 if codes.group == num_columns else codes.group,
        main=main,
        extra=extra,
        scales=_columns_first(scales, factor, dtype),
        minima=None if minima is None else _columns_first(minima, factor, dtype),
        zero=zero or 0.0,
        factor=factor,
        table=table,
        table_words=None if table is None or codes.bits != 4 else _table_words(table),
        exponent_bits=exponent_bits,
        columns=None if codes.columns is None else codes.columns.to(device),
        rounds_input=rounds_input,
        arrivals=torch.zeros(MOST_TILES_TO_JOIN, dtype=torch.int32, device=device),
    )


def packed_bytes(row: QuantisedCodes, num_rows: int) -> int:
    """Memory of a weight of `num_rows` rows like the one of `row`, packed."""
    num_columns = row.shape[1]
    num_bundles = -(-num_columns // BUNDLE)
    num_factors = -(-num_columns // row.group)
    if row.minima is not None and _common_zero(row.scales, row.minima) is None:
        num_factors *= 2
    bytes_of_row = num_bundles * BUNDLE * row.bits // 8
    bytes_of_row += num_factors * _dtype_of_scales(row).itemsize
    return num_rows * bytes_of_row + 4 * MOST_TILES_TO_JOIN


def merge_codes(parts: Sequence[QuantisedCodes]) -> QuantisedCodes | None:
    """One weight of the parts below each other; None where their codes are of different kinds."""
    first = parts[0]
    for part in parts[1:]:
        if (part.bits, part.group) != (first.bits, first.group):
            return None
        if not (_same(part.table, first.table) and _same(part.columns, first.columns)):
            return None
        if (part.minima is None) != (first.minima is None):
            return None
    if len(parts) == 1:
        return first
    minima = [part.minima for part in parts if part.minima is not None]
    return QuantisedCodes(
        bits=first.bits,
        group=first.group,
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        minima=torch.cat(minima) if minima else None,
        table=first.table,
        columns=first.columns,
    )


def _dtype_of_scales(codes: QuantisedCodes) -> torch.dtype:
    is_float8 = codes.bits == 8 and _exponent_bits(codes) > 0
    is_rare = codes.group >= _LONG_GROUP or codes.group == codes.shape[1]
    return torch.float32 if is_float8 or is_rare else torch.float16


def _plane(strips: torch.Tensor, shift: int, bits: int) -> torch.Tensor:
    """Words of `bits` bits from bit `shift` on of every strip; strips [N, B, strips, 16] uint8."""
    words = torch.zeros_like(strips[:, :, 0], dtype=torch.int32)
    for strip in range(strips.shape[2]):
        part = strips[:, :, strip].to(torch.int32).bitwise_right_shift_(shift)
        words |= part.bitwise_and_((1 << bits) - 1).bitwise_left_shift_(bits * strip)
    return words.to(_WORDS[bits])


def _table_words(table: torch.Tensor) -> torch.Tensor:
    """Lower bytes of 16 float16, then upper ones, four in a word: [8] int32."""
    both = table.half().view(torch.uint8).view(16, 2)
    return both.T.contiguous().view(torch.int32).view(-1)


def _exponent_bits(codes: QuantisedCodes) -> int:
    """4 where the table is that of e4m3, 2 for e2m1, else 0."""
    if codes.table is None or codes.minima is not None:
        return 0
    if codes.bits == 8 and torch.equal(codes.table.cpu().nan_to_num(), e4m3_values().nan_to_num()):
        return 4
    return 2 if codes.bits == 4 and torch.equal(codes.table.cpu(), E2M1_VALUES) else 0


def e4m3_values() -> torch.Tensor:
    """Value of every byte as e4m3, [256] float32, on the CPU; NaN for 127 and 255."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def _common_zero(scales: torch.Tensor, minima: torch.Tensor) -> float | None:
    """The z where all minima are -z times their scale, else None."""
    has_scale = scales != 0
    if not bool(has_scale.any()):
        return None if bool(minima.any()) else 0.0
    zero = round(float(-minima[has_scale][0] / scales[has_scale][0]))
    rest = torch.addcmul(minima, scales, torch.full_like(scales, float(zero)))
    tolerance = 2.0**-20 * max(1, abs(zero))
    return float(zero) if bool((rest.abs() <= tolerance * scales.abs()).all()) else None


def _factor(codes: QuantisedCodes, scales: torch.Tensor, minima: torch.Tensor | None) -> float:
    """A power of two that brings the largest weight below 2^15, of small floats below 1.

    Slopes of these, 2^126 times a scale, would else be infinite.
    """
    largest_value = 2.0**codes.bits
    if codes.table is not None:
        largest_value = float(codes.table.nan_to_num().abs().max())
    largest = float(scales.abs().max()) * largest_value
    if minima is not None:
        largest = max(largest, float(minima.abs().max()))
    if not largest or not math.isfinite(largest):
        return 1.0
    exponent = 0 if _exponent_bits(codes) else _LARGEST_EXPONENT
    return float(2.0 ** (math.frexp(largest)[1] - exponent))


def _columns_first(values: torch.Tensor, factor: float, dtype: torch.dtype) -> torch.Tensor:
    return (values / factor).T.to(dtype).contiguous()


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    # e4m3 has NaN among its values.
    return one is other or torch.equal(one.nan_to_num(), other.nan_to_num())
