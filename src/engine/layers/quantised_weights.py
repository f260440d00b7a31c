"""Products with weights that stay quantised: 4-bit and 8-bit codes on a CPU with AVX-512.

One object owns a weight's codes and scales and multiplies with them. Both kinds compute a row by
itself, so that its bits depend neither on the rows beside it nor on the number of threads.

`FourBitWeight`, `w = (code - 8) scale + zero` with one scale and zero for 32 to 256 columns: codes
of up to 4 bits as GGUF, GPTQ, AWQ and compressed-tensors have them. Only the scales are rounded, to
bfloat16.

- *Decoding rows* take torch's int4 product: weights are expanded in registers, sums are float32 in
  the order of the columns, for each row alike. It reads a quarter of bfloat16's bytes, and its time
  grows with the rows: 2 threads of a Zen 5 need 66 µs for the four products of a layer of the 135M
  demo model at 1 row, 178 at 8, 341 at 16 and 1330 at 64; oneDNN's bfloat16 product 168, 192, 249
  and 634.
- *Prompt rows* take oneDNN's bfloat16 product with the weight expanded into a buffer that all
  layers share. That is 1.3 ms of one thread for a layer's weights, 40 ms for the model, whatever
  the rows.

Which rows decode is the scheduler's choice (one token of a sequence in a step), as it is for the
attention, and for the same reason: a choice by the number of rows would let neighbours in.

`EightBitWeight`, for all other kinds, has one scale per output row: codes with scales of their own
for groups of columns, float8, and codes with a table are rounded to 8 bits once more. Codes that
have one scale a row already stay as they are. Rows of x become 16-bit integers with one scale each,
taken apart into two bytes, so that oneDNN's product of bytes is exact in int32, and no order of
summation matters. Rows of x in 8 bits would be twice as fast, and too coarse: in all layers of the
demo model they cost a mean KL of 0.016 nats (asymmetric; 0.033 symmetric), where 16 bits cost
nothing measurable.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from engine.layers.quantised_codes import QuantisedCodes
from engine.layers.quantised_eight import QuantisedEight
from engine.layers.row_sizes import in_parts, rows_of_next_part

_GROUPS = (256, 128, 64, 32)
"""Columns that share a scale in torch's int4 product."""
PANEL_ROWS = 64
"""Rows of the weight that torch's int4 layout keeps together on AVX-512."""

_PROMPT_ROWS = (16, 32, 64, 128, 256, 512)
"""Rows of a product of prompts; 2.5 MB of oneDNN's code each for the demo model's shapes."""

_MAX_CODE = 127
_HALF_BYTE = 128
_MOST_X = _MAX_CODE * 256
"""Largest magnitude of x as 16-bit integer: its upper byte must fit after rounding."""
_EIGHT_BIT_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_MOST_SUM_BYTES = 16 << 20
"""float32 sums of one part of an 8-bit product; bounds the memory of a large vocabulary."""

# Not from torch.ops: those calls go through Python, which is felt 120 times a step.
_int4_pack: Any = getattr(torch, "_convert_weight_to_int4pack_for_cpu", None)
_int4_product: Any = getattr(torch, "_weight_int4pack_mm_for_cpu", None)


class ExpansionRoom:
    """Memory in which one weight at a time is expanded; grows to the largest."""

    def __init__(self) -> None:
        self._codes = torch.empty(0, dtype=torch.uint8)
        self._weight = torch.empty(0, dtype=torch.bfloat16)

    @staticmethod
    def num_bytes(numbers: int) -> int:
        """Memory of the room once a weight of so many numbers has been expanded."""
        return numbers // 2 + numbers * torch.bfloat16.itemsize

    def take(self, numbers: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for half a weight's codes [numbers / 2] uint8, and for the weight [numbers]."""
        if self._weight.numel() < numbers:
            self._codes = torch.empty(numbers // 2, dtype=torch.uint8)
            self._weight = torch.empty(numbers, dtype=torch.bfloat16)
        return self._codes[: numbers // 2], self._weight[:numbers]


class FourBitWeight:
    """A weight [N, K] of 4-bit codes; see the head of this module.

    Args:
        codes: [N, K] uint8 in 0…15. N is a multiple of 64.
        scales: [N, G] float32; K / G is a multiple of 32.
        minima: [N, G] float32, the value of code 0.
        room: Where weights are expanded for prompts; may be shared.
    """

    def __init__(
        self, codes: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor, room: ExpansionRoom
    ) -> None:
        self.shape = (codes.shape[0], codes.shape[1])
        self._packed = _pack_four_bits(codes)
        columns_of_scale = codes.shape[1] // scales.shape[1]
        self._group = next(size for size in _GROUPS if columns_of_scale % size == 0)
        if self._group < columns_of_scale:
            scales = scales.repeat_interleave(columns_of_scale // self._group, 1)
            minima = minima.repeat_interleave(columns_of_scale // self._group, 1)
        zeros = torch.add(minima, scales, alpha=8.0)
        # [K / group, N, 2]
        self._scales_and_zeros = torch.stack((scales.T, zeros.T), -1).to(torch.bfloat16)
        self._room = room

    @staticmethod
    def accepts(num_rows: int, columns_of_scale: int) -> bool:
        """Whether the product takes a weight of so many rows, with a scale for so many columns."""
        return num_rows % PANEL_ROWS == 0 and columns_of_scale % _GROUPS[-1] == 0

    @staticmethod
    def num_bytes(shape: tuple[int, int], columns_of_scale: int) -> int:
        """Memory of such a weight."""
        group = next(size for size in _GROUPS if columns_of_scale % size == 0)
        return shape[0] * shape[1] // 2 + shape[0] * shape[1] // group * 4

    def __call__(self, x: torch.Tensor, num_decodes: int) -> torch.Tensor:
        """Product with x [M, K] bfloat16, contiguous, whose first rows decode: new [M, N]."""
        if num_decodes >= x.shape[0]:
            return self.of_decoding(x)
        if num_decodes == 0:
            return self.of_prompts(x)
        y = x.new_empty(x.shape[0], self.shape[0])
        y[:num_decodes] = self.of_decoding(x[:num_decodes])
        self.of_prompts(x[num_decodes:], y[num_decodes:])
        return y

    def of_decoding(self, x: torch.Tensor) -> torch.Tensor:
        """Product with x [M, K] bfloat16, contiguous: new [M, N] bfloat16."""
        product: torch.Tensor = _int4_product(x, self._packed, self._group, self._scales_and_zeros)
        return product

    def of_prompts(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The same for rows of prompts, into `out` [M, N] if that is given."""
        weight = self._expanded()
        y = x.new_empty(x.shape[0], self.shape[0]) if out is None else out
        start = 0
        while start < x.shape[0]:
            part = rows_of_next_part(x.shape[0] - start, _PROMPT_ROWS)
            rows = x[start : start + part]
            missing = part - rows.shape[0]
            if missing:
                y[start:] = torch.mm(F.pad(rows, (0, 0, 0, missing)), weight)[: rows.shape[0]]
            else:
                torch.mm(rows, weight, out=y[start : start + part])
            start += part
        return y

    def _expanded(self) -> torch.Tensor:
        """[K, N] bfloat16 in the shared room, valid until the next weight is expanded."""
        num_rows, num_columns = self.shape
        half, weight = self._room.take(num_rows * num_columns)
        packed = self._packed.view(num_rows // PANEL_ROWS, num_columns, PANEL_ROWS // 2)
        half = half.view(packed.shape)
        panels = weight.view(num_columns, num_rows // PANEL_ROWS, 2, PANEL_ROWS // 2)
        torch.bitwise_and(packed, 15, out=half)
        panels[:, :, 0].copy_(half.transpose(0, 1))
        torch.bitwise_right_shift(packed, 4, out=half)
        panels[:, :, 1].copy_(half.transpose(0, 1))
        scales, zeros = self._scales_and_zeros.unbind(-1)
        minima = torch.add(zeros.float(), scales.float(), alpha=-8.0).to(torch.bfloat16)
        groups = weight.view(-1, self._group, num_rows)
        torch.addcmul(minima[:, None], groups, scales.contiguous()[:, None], out=groups)
        return weight.view(num_columns, num_rows)


class EightBitWeight:
    """A weight [N, K] of 8-bit codes; see the head of this module.

    Args:
        num_rows: N.
        num_columns: K.
        chunks: Rows from top to bottom. In small parts, since what a large allocation leaves behind
            is not given back.
        out_dtype: Of the products.
    """

    def __init__(
        self,
        num_rows: int,
        num_columns: int,
        chunks: Iterable[QuantisedCodes | QuantisedEight],
        out_dtype: torch.dtype,
    ) -> None:
        self.shape = (num_rows, num_columns)
        self.row_scales = torch.empty(num_rows, dtype=torch.float32)
        # Not from the allocator: freeing so large a piece makes GNU's keep all smaller ones.
        room = mmap.mmap(-1, num_rows * num_columns)
        rounded = torch.frombuffer(room, dtype=torch.int8).view(num_rows, num_columns)
        start = 0
        for chunk in chunks:
            rows = slice(start, start + chunk.shape[0])
            self.row_scales[rows] = _round_to_rows(chunk, rounded[rows])
            start = rows.stop
        assert start == num_rows, "the chunks are not the weight's rows"
        self._packed = torch.ops.onednn.qlinear_prepack(rounded, [_EIGHT_BIT_ROWS[0], num_columns])
        self._zero_points = torch.zeros(num_rows, dtype=torch.int64)
        self._out_dtype = out_dtype
        most_rows = max(1, _MOST_SUM_BYTES // (2 * 4 * num_rows))
        self._part_sizes = tuple(size for size in _EIGHT_BIT_ROWS if size <= most_rows)

    def __call__(self, x: torch.Tensor, num_decodes: int = 0) -> torch.Tensor:
        """Product with x [M, K], contiguous: new [M, N]. Rows that decode are as all others."""
        return in_parts(x, self._of_part, self._part_sizes)

    def _of_part(self, x: torch.Tensor) -> torch.Tensor:
        num_rows = x.shape[0]
        x_scales = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True, dtype=torch.float32)
        # A row of zeros has any scale.
        x_scales = x_scales.clamp_(min=1e-30).div_(_MOST_X)
        x_codes = torch.div(x, x_scales).to(torch.int16)
        # upper 256 + lower = x_code + 128 · 257, so that both bytes are unsigned around 128.
        x_codes.add_(_HALF_BYTE).bitwise_xor_(-32768)
        bytes_last = x_codes.view(torch.uint8).view(num_rows, self.shape[1], 2)
        lower_then_upper = bytes_last.permute(2, 0, 1).reshape(2 * num_rows, self.shape[1])
        sums = _byte_product(lower_then_upper, self._packed, self.row_scales, self._zero_points)
        product = torch.add(sums[:num_rows], sums[num_rows:], alpha=256.0).mul_(x_scales)
        return product if self._out_dtype == torch.float32 else product.to(self._out_dtype)


def _round_to_rows(chunk: QuantisedCodes | QuantisedEight, rounded: torch.Tensor) -> torch.Tensor:
    """Write a chunk under one scale per row to `rounded` [n, K] int8; these scales, new [n]."""
    num_columns = rounded.shape[1]
    if isinstance(chunk, QuantisedEight):
        if chunk.values.dtype == torch.int8 and chunk.tile[1] >= num_columns:
            rounded.copy_(chunk.values)
            return chunk.with_row_scales().scales[:, 0]
    elif _is_signed_bytes(chunk, num_columns):
        rounded.copy_((chunk.codes ^ _HALF_BYTE).view(torch.int8))
        return chunk.scales[:, 0]
    values = chunk.expand()
    row_scales = values.abs().amax(-1).clamp_(min=1e-30).div_(_MAX_CODE)
    rounded.copy_(values.div_(row_scales[:, None]).round_())
    return row_scales


def _is_signed_bytes(chunk: QuantisedCodes, num_columns: int) -> bool:
    """Whether codes are 8-bit integers around 128 with one scale a row."""
    if chunk.bits != 8 or chunk.group != num_columns or chunk.minima is None:
        return False
    if chunk.table is not None or chunk.columns is not None:
        return False
    return torch.equal(chunk.minima, chunk.scales * -float(_HALF_BYTE))


def _byte_product(
    x: torch.Tensor, packed: torch.Tensor, row_scales: torch.Tensor, zero_points: torch.Tensor
) -> torch.Tensor:
    """`(x - 128) @ codes.T * row_scales`, x [M, K] uint8 -> new [M, N] float32."""
    product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, _HALF_BYTE, packed, row_scales, zero_points, None, 1.0, 0, torch.float32,
        "none", [], "",
    )  # fmt: skip
    return product


def _pack_four_bits(codes: torch.Tensor) -> torch.Tensor:
    """Codes [N, K] in torch's int4 layout: panels of 64 rows, column by column."""
    num_rows, num_columns = codes.shape
    panels = codes.view(-1, 2, PANEL_ROWS // 2, num_columns)
    bytes_of_pairs = panels[:, 1].bitwise_left_shift(4).bitwise_or_(panels[:, 0])
    return bytes_of_pairs.transpose(1, 2).contiguous().view(num_rows, num_columns // 2)


@cache
def has_four_bit_product() -> bool:
    """Whether torch has its int4 product here, in the layout of `_pack_four_bits`."""
    if _int4_pack is None or _int4_product is None:
        return False
    codes = torch.arange(PANEL_ROWS * _GROUPS[-1]).view(PANEL_ROWS, -1).remainder_(15)
    return _works(lambda: torch.equal(
        _int4_pack(codes.to(torch.int32), 1), _pack_four_bits(codes.to(torch.uint8))
    ))  # fmt: skip


@cache
def has_eight_bit_product() -> bool:
    """Whether oneDNN's product of bytes is exact here: without VNNI its sums saturate."""
    has_vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
    if not hasattr(torch.ops.onednn, "qlinear_pointwise") or not has_vnni():
        return False

    def agrees() -> bool:
        num_columns = 32
        codes = torch.full((64, num_columns), _MAX_CODE, dtype=torch.int8)
        packed = torch.ops.onednn.qlinear_prepack(codes, [1, num_columns])
        x = torch.full((2, num_columns), 255, dtype=torch.uint8)
        sums = _byte_product(x, packed, torch.ones(64), torch.zeros(64, dtype=torch.int64))
        return bool((sums == float(num_columns * _MAX_CODE * _MAX_CODE)).all())

    return _works(agrees)


def _works(check: Callable[[], bool]) -> bool:
    """`check()`; False where this build of torch has the op's name but not the op."""
    try:
        return check()
    except (RuntimeError, NotImplementedError):
        return False
