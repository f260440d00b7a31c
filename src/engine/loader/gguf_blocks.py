"""GGUF's blocks of 32 numbers, taken apart without expanding them: codes, scales and minima.

A row of a quantised matrix is a run of blocks. `value = code * scale + minimum`, with

| type | block | codes | minimum |
|---|---|---|---|
| Q4_0 | scale fp16, 16 bytes | 0…15 | -8 scale |
| Q4_1 | scale fp16, minimum fp16, 16 bytes | 0…15 | as stored |
| Q8_0 | scale fp16, 32 bytes | -128…127 | 0 |

The 16 bytes of the 4-bit types hold columns 0…15 in their low halves and 16…31 in the high ones.
Source: `block_q4_0`, `block_q4_1` and `block_q8_0` in ggml-org/ggml, src/ggml-common.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

BLOCK_COLUMNS: Final = 32
_CHUNK_BYTES: Final = 1 << 20
BITS_OF_TYPE: Final[Mapping[str, int]] = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
_HEADER_BYTES: Final[Mapping[str, int]] = {"Q4_0": 2, "Q4_1": 4, "Q8_0": 2}


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedRows:
    """Rows of a quantised matrix: `codes * scales + minima`, one scale for 32 columns.

    Attributes:
        codes: [rows, K] uint8 in 0…15, or int8.
        scales: [rows, K / 32] float32.
        minima: [rows, K / 32] float32.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor

    def expand(self) -> torch.Tensor:
        """The numbers, new [rows, K] float32."""
        blocks = self.codes.view(*self.scales.shape, BLOCK_COLUMNS).float()
        return blocks.mul_(self.scales[..., None]).add_(self.minima[..., None]).flatten(1)


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedMatrix:
    """A quantised matrix where it lies in its file; nothing is read before it is asked for.

    Attributes:
        encoded: [rows, bytes per row] uint8, a read-only view of the mapped file, which stays
            mapped while the view lives.
        type_name: A key of `BITS_OF_TYPE`.
        num_heads: Heads whose rows llama.cpp interleaves (see `gguf_names`), 0 for none.
    """

    encoded: npt.NDArray[np.uint8]
    type_name: str
    num_heads: int = 0

    @property
    def bits(self) -> int:
        """Of a code: 4 or 8."""
        return BITS_OF_TYPE[self.type_name]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix."""
        header, bits = _HEADER_BYTES[self.type_name], self.bits
        bytes_per_block = header + BLOCK_COLUMNS * bits // 8
        rows, bytes_per_row = self.encoded.shape
        return rows, bytes_per_row // bytes_per_block * BLOCK_COLUMNS

    def read(self) -> QuantisedRows:
        """All rows, in Hugging Face's order."""
        encoded = self.encoded
        if self.num_heads:
            per_head = encoded.reshape(self.num_heads, -1, 2, encoded.shape[1])
            encoded = per_head.swapaxes(1, 2).reshape(encoded.shape)
        return split_blocks(encoded, self.type_name)

    def chunks(self) -> Iterator[QuantisedRows]:
        """All rows from top to bottom, about a megabyte at a time where their order allows it."""
        if self.num_heads:
            yield self.read()
            return
        step = max(1, _CHUNK_BYTES // self.encoded.shape[1])
        for start in range(0, self.encoded.shape[0], step):
            yield split_blocks(self.encoded[start : start + step], self.type_name)

    def take(self, rows: torch.Tensor) -> QuantisedRows:
        """Rows [R] int64 of a matrix that is not interleaved."""
        assert not self.num_heads, "rows of heads lie in another order"
        return split_blocks(self.encoded[rows.numpy()], self.type_name)


def split_blocks(encoded: npt.NDArray[np.uint8], type_name: str) -> QuantisedRows:
    """Take rows of blocks apart.

    Args:
        encoded: [rows, bytes per row] uint8.
        type_name: A key of `BITS_OF_TYPE`.
    """
    header, bits = _HEADER_BYTES[type_name], BITS_OF_TYPE[type_name]
    rows = encoded.shape[0]
    blocks = encoded.reshape(rows, -1, header + BLOCK_COLUMNS * bits // 8)
    factors = torch.from_numpy(blocks[..., :header].copy().view(np.float16)).float()
    scales = factors[..., 0].contiguous()
    if bits == 8:
        codes = torch.from_numpy(blocks[..., header:].copy().view(np.int8))
        return QuantisedRows(codes.view(rows, -1), scales, torch.zeros_like(scales))
    halves = np.empty((*blocks.shape[:2], 2, BLOCK_COLUMNS // 2), np.uint8)
    np.bitwise_and(blocks[..., header:], 15, out=halves[:, :, 0])
    np.right_shift(blocks[..., header:], 4, out=halves[:, :, 1])
    minima = factors[..., 1].contiguous() if type_name == "Q4_1" else scales * -8.0
    return QuantisedRows(torch.from_numpy(halves).view(rows, -1), scales, minima)
