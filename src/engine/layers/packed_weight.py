"""`PackedWeight`: products with codes of any kind, which are expanded a part at a time.

The weight stays in memory in 2, 4 or 8 bits a code. A product expands some rows of it into a room
that all layers share, multiplies, and goes on to the next rows. A byte holds one, two or four codes
and is looked up in a table of 256 entries that holds their values side by side, so tables of any
kind (NF4, float8) cost what integers cost. It works on every CPU and in every dtype, and in float32
it is exact.

It is also slow for few rows: 2 threads of a Zen 5 need about 6 ms for a weight of 4096 x 4096,
whatever the rows, where `EightBitWeight` needs 0.2 ms at one row and `FourBitWeight` 0.24. So it is
for machines and dtypes without those products, and for models that fit no other way.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch

from engine.layers.quantised_codes import QuantisedCodes
from engine.layers.row_sizes import in_parts

_PART_NUMBERS = 1 << 20
"""Numbers expanded at once: 2 MB of bfloat16, which stay in the cache."""
_ROW_SIZES = (16, 32, 64, 128, 256, 512)
"""Rows of x in one product: with so many, sums do not depend on their number."""
_FLOAT32_ROW_SIZES = (16,)
"""In float32 the library's order of summation changes with the rows."""
_LOOKED_UP = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""Bytes of a byte's values -> a dtype of that size that can be looked up."""


class PartRoom:
    """Memory in which a part of a weight is expanded; may be shared by all weights of a thread."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, numbers: int, dtype: torch.dtype) -> torch.Tensor:
        """[numbers] of `dtype`, valid until the next call."""
        num_bytes = numbers * dtype.itemsize
        if self._memory.numel() < num_bytes:
            self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        return self._memory[:num_bytes].view(dtype)


class PackedWeight:
    """A weight [N, K] of packed codes; see the head of this module.

    Args:
        shape: (N, K).
        chunks: Rows from top to bottom, all of one kind; `columns` are not looked at.
        dtype: Of the expanded weight; x is converted to it.
        out_dtype: Of the products.
        room: Where weights are expanded.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        chunks: Iterable[QuantisedCodes],
        dtype: torch.dtype,
        out_dtype: torch.dtype,
        room: PartRoom,
    ) -> None:
        self.shape = shape
        self._dtype, self._out_dtype, self._room = dtype, out_dtype, room
        packed, scales, minima = [], [], []
        bits, group, table, shift = 0, 0, None, 0.0
        for chunk in chunks:
            bits, group, table = stored_bits(chunk.bits, shape[1]), chunk.group, chunk.table
            packed.append(_pack(chunk.codes, bits))
            scales.append(chunk.scales.to(dtype))
            if chunk.minima is not None:
                # Around the middle of the codes what is added is small, and rounded finely.
                middle = 0.0 if table is not None else float(1 << (chunk.bits - 1))
                shift = middle
                minima.append((chunk.minima + chunk.scales * middle).to(dtype))
        self._packed, self._scales = torch.cat(packed), torch.cat(scales)
        self._minima = torch.cat(minima) if any(bool(part.any()) for part in minima) else None
        self._group, self._codes_per_byte = group, 8 // bits
        self._values = _values_of_bytes(table, bits, dtype, shift)

    @staticmethod
    def num_bytes(weight_bits: int, shape: tuple[int, int], group: int, minima: bool) -> int:
        """Memory of such a weight, with scales of 2 bytes."""
        numbers = shape[0] * shape[1]
        factors = numbers // group * (2 if minima else 1) * 2
        return numbers * stored_bits(weight_bits, shape[1]) // 8 + factors

    def __call__(self, x: torch.Tensor, num_decodes: int = 0) -> torch.Tensor:
        """Product with x [M, K]: new [M, N]. Rows that decode are as all others."""
        num_rows, num_columns = self.shape
        x = x.to(self._dtype)
        sizes = _FLOAT32_ROW_SIZES if self._dtype == torch.float32 else _ROW_SIZES
        y = torch.empty(x.shape[0], num_rows, dtype=self._out_dtype)
        step = max(1, _PART_NUMBERS // num_columns)
        for start in range(0, num_rows, step):
            part = self._expanded(start, min(start + step, num_rows)).T
            y[:, start : start + part.shape[1]] = in_parts(x, partial(torch.mm, mat2=part), sizes)
        return y

    def _expanded(self, start: int, stop: int) -> torch.Tensor:
        """[stop - start, K] in the shared room."""
        num_columns = self.shape[1]
        packed = self._packed[start:stop].flatten()
        part = self._room.take((stop - start) * num_columns, self._dtype)
        looked_up = part.view(self._values.dtype)
        torch.index_select(self._values, 0, packed.int(), out=looked_up)
        groups = part.view(stop - start, num_columns // self._group, self._group)
        scales = self._scales[start:stop, :, None]
        if self._minima is None:
            torch.mul(groups, scales, out=groups)
        else:
            torch.addcmul(self._minima[start:stop, :, None], groups, scales, out=groups)
        return part.view(stop - start, num_columns)


def stored_bits(bits: int, num_columns: int) -> int:
    """Bits that a code takes in memory: 2, 4 or 8."""
    for size in (2, 4):
        if bits <= size and num_columns * size % 8 == 0:
            return size
    return 8


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[N, K] uint8 -> [N, K * bits / 8] uint8, neighbouring columns in a byte, the first lowest."""
    if bits == 8:
        return codes
    groups = codes.view(codes.shape[0], -1, 8 // bits)
    packed = groups[..., 0].clone()
    for index in range(1, 8 // bits):
        packed |= groups[..., index] << (index * bits)
    return packed


def _values_of_bytes(
    table: torch.Tensor | None, bits: int, dtype: torch.dtype, shift: float
) -> torch.Tensor:
    """[256], each entry the values of a byte's codes, less `shift`, side by side."""
    values = torch.arange(256.0) - shift if table is None else table
    codes = torch.arange(256)[:, None] >> torch.arange(0, 8, bits) & ((1 << bits) - 1)
    # A table may be shorter than what its codes are stored in.
    entries = values[codes.clamp(max=values.numel() - 1)].to(dtype)
    looked_up = _LOOKED_UP[entries.shape[1] * dtype.itemsize]
    by_byte: torch.Tensor = entries.contiguous().view(looked_up)
    return by_byte.flatten()
