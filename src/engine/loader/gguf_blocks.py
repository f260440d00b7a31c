"""GGUF's blocks taken apart without expanding them: codes, scales, minima.

A row of a quantised matrix is a run of blocks, of 32 numbers or, for K-quants, of 256. Sources:
`block_*` in ggml-org/ggml, src/ggml-common.h, and `dequantize_row_*` in src/ggml-quants.c. What a
type becomes, where d and m are its fp16 numbers and a k-quant's 6-bit factors are written s:

| type | group | codes | scale | minimum |
|---|---|---|---|---|
| Q4_0 | 32 | 4 bits | d | -8 d |
| Q4_1 | 32 | 4 bits | d | m |
| Q5_0 | 32 | 5 bits | d | -16 d |
| Q5_1 | 32 | 5 bits | d | m |
| Q8_0 | 32 | 8 bits | d | -128 d |
| Q2_K | 16 | 2 bits | d s | -m s' |
| Q3_K | 16 | 3 bits | d s | -4 d s |
| Q4_K | 32 | 4 bits | d s | -m s' |
| Q5_K | 32 | 5 bits | d s | -m s' |
| Q6_K | 16 | 6 bits | d s | -32 d s |
| IQ4_NL | 32 | 4 bits of a table | d | |
| IQ4_XS | 32 | 4 bits of the same table | d s | |
| MXFP4 | 32 | 4 bits of a table | power of two | |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch

from engine.layers.quantised_codes import QuantisedCodes
from engine.loader.packed_codes import halves, unpack_dense
from engine.loader.stored_rows import StoredRows

if TYPE_CHECKING:
    from engine.layers.quantised_factory import QuantisedWeight

_Taken = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Codes [R, blocks, numbers] uint8, scales and minima [R, blocks, groups] float32."""

IQ4_VALUES: Final = (
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
)  # fmt: skip
FP4_VALUES: Final = (
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
)  # fmt: skip
"""float4 e2m1, of MXFP4."""


def _half_floats(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The fp16 number at byte `start` of each block: [R, blocks, 1] float32."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16).float()


def _split_halves(packed: torch.Tensor) -> torch.Tensor:
    """Bytes whose low halves are the first codes and whose high halves the others."""
    return torch.cat(halves(packed), -1)


def _fifth_bits(packed: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return _split_halves(packed).bitwise_or_(unpack_dense(high, 1, 32) << 4)


def _q4_0(blocks: torch.Tensor) -> _Taken:
    scales = _half_floats(blocks, 0)
    return _split_halves(blocks[..., 2:]), scales, scales * -8.0


def _q4_1(blocks: torch.Tensor) -> _Taken:
    return _split_halves(blocks[..., 4:]), _half_floats(blocks, 0), _half_floats(blocks, 2)


def _q5_0(blocks: torch.Tensor) -> _Taken:
    scales = _half_floats(blocks, 0)
    return _fifth_bits(blocks[..., 6:], blocks[..., 2:6]), scales, scales * -16.0


def _q5_1(blocks: torch.Tensor) -> _Taken:
    codes = _fifth_bits(blocks[..., 8:], blocks[..., 4:8])
    return codes, _half_floats(blocks, 0), _half_floats(blocks, 2)


def _q8_0(blocks: torch.Tensor) -> _Taken:
    scales = _half_floats(blocks, 0)
    # int8 -> offset binary: the sign's bit turned round.
    return blocks[..., 2:] ^ 128, scales, scales * -128.0


def _by_shifts(packed: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    """K-quants' order: a run of bytes holds 8 / bits runs of codes, the lowest bits first."""
    runs = packed.unflatten(-1, (-1, run))
    shifted = [(runs >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.stack(shifted, -2).flatten(-3)


def _six_bit_factors(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minima, [..., 8] each, of Q4_K and Q5_K's 12 bytes."""
    low, middle, both = packed.split(4, -1)
    scales = torch.cat((low & 63, (both & 15) | ((low >> 2) & 48)), -1)
    minima = torch.cat((middle & 63, (both >> 4) | ((middle >> 2) & 48)), -1)
    return scales.float(), minima.float()


def _q2_k(blocks: torch.Tensor) -> _Taken:
    scales, minima = halves(blocks[..., :16])
    codes = _by_shifts(blocks[..., 16:80], 2, 32)
    d, m = _half_floats(blocks, 80), _half_floats(blocks, 82)
    return codes, scales.float() * d, minima.float() * -m


def _q3_k(blocks: torch.Tensor) -> _Taken:
    codes = _by_shifts(blocks[..., 32:96], 2, 32)
    codes |= _by_shifts(blocks[..., :32], 1, 32) << 2
    low = _split_halves(blocks[..., 96:104])
    high = _by_shifts(blocks[..., 104:108], 2, 4)
    factors = (low | (high << 4)).float() - 32.0
    scales = factors * _half_floats(blocks, 108)
    return codes, scales, scales * -4.0


def _q4_k(blocks: torch.Tensor) -> _Taken:
    factors, minima = _six_bit_factors(blocks[..., 4:16])
    codes = _by_shifts(blocks[..., 16:], 4, 32)
    return codes, factors * _half_floats(blocks, 0), minima * -_half_floats(blocks, 2)


def _q5_k(blocks: torch.Tensor) -> _Taken:
    factors, minima = _six_bit_factors(blocks[..., 4:16])
    codes = _by_shifts(blocks[..., 48:], 4, 32)
    codes |= _by_shifts(blocks[..., 16:48], 1, 32) << 4
    return codes, factors * _half_floats(blocks, 0), minima * -_half_floats(blocks, 2)


def _q6_k(blocks: torch.Tensor) -> _Taken:
    codes = _by_shifts(blocks[..., :128], 4, 64)
    codes |= _by_shifts(blocks[..., 128:192], 2, 32) << 4
    factors = blocks[..., 192:208].contiguous().view(torch.int8).float()
    scales = factors * _half_floats(blocks, 208)
    return codes, scales, scales * -32.0


def _iq4_nl(blocks: torch.Tensor) -> _Taken:
    return _split_halves(blocks[..., 2:]), _half_floats(blocks, 0), None


def _iq4_xs(blocks: torch.Tensor) -> _Taken:
    high = unpack_dense(blocks[..., 2:4], 2, 8)
    low = unpack_dense(blocks[..., 4:8], 4, 8)
    factors = (low | (high << 4)).float() - 32.0
    codes = _split_halves(blocks[..., 8:].unflatten(-1, (8, 16))).flatten(-2)
    return codes, factors * _half_floats(blocks, 0), None


def _mxfp4(blocks: torch.Tensor) -> _Taken:
    return _split_halves(blocks[..., 1:]), powers_of_two(blocks[..., :1]), None


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """float8 e8m0 as bytes -> 2 ** (exponent - 127), new float32."""
    ones = torch.ones(exponents.shape, device=exponents.device)
    return torch.ldexp(ones, exponents.to(torch.int32) - 127)


# bits, group, numbers in a block, bytes of a block, table, how it is taken apart
_TYPES: Final[
    Mapping[
        str, tuple[int, int, int, int, tuple[float, ...] | None, Callable[[torch.Tensor], _Taken]]
    ]
] = {
    "Q4_0": (4, 32, 32, 18, None, _q4_0),
    "Q4_1": (4, 32, 32, 20, None, _q4_1),
    "Q5_0": (5, 32, 32, 22, None, _q5_0),
    "Q5_1": (5, 32, 32, 24, None, _q5_1),
    "Q8_0": (8, 32, 32, 34, None, _q8_0),
    "Q2_K": (2, 16, 256, 84, None, _q2_k),
    "Q3_K": (3, 16, 256, 110, None, _q3_k),
    "Q4_K": (4, 32, 256, 144, None, _q4_k),
    "Q5_K": (5, 32, 256, 176, None, _q5_k),
    "Q6_K": (6, 16, 256, 210, None, _q6_k),
    "IQ4_NL": (4, 32, 32, 18, IQ4_VALUES, _iq4_nl),
    "IQ4_XS": (4, 32, 256, 136, IQ4_VALUES, _iq4_xs),
    "MXFP4": (4, 32, 32, 17, FP4_VALUES, _mxfp4),
}
BITS_OF_TYPE: Final[Mapping[str, int]] = {name: row[0] for name, row in _TYPES.items()}
"""Types that stay quantised; others are expanded."""


class GGUFMatrix(StoredRows):
    """A quantised matrix where it lies in its GGUF file.

    Args:
        encoded: [rows, bytes per row] uint8, a read-only view of the mapped file, which stays
            mapped while the view lives.
        type_name: A key of `BITS_OF_TYPE`.
        num_heads: Heads whose rows llama.cpp interleaves (see `gguf_names`), 0 for none.
    """

    def __init__(self, encoded: npt.NDArray[np.uint8], type_name: str, num_heads: int = 0) -> None:
        self._encoded = encoded
        self._type_name = type_name
        _, _, numbers, num_bytes, _, _ = _TYPES[type_name]
        rows, bytes_per_row = encoded.shape
        order = None
        if num_heads:
            order = torch.arange(rows).view(num_heads, -1, 2).transpose(1, 2).flatten()
        super().__init__((rows, bytes_per_row // num_bytes * numbers), order)

    def unpack(self, rows: slice | torch.Tensor, device: torch.device) -> QuantisedWeight:
        """See `StoredRows.unpack`."""
        chosen = rows if isinstance(rows, slice) else rows.numpy()
        # torch warns about memory it must not write to, hence the copy.
        encoded = torch.from_numpy(np.array(self._encoded[chosen])).to(device)
        return split_blocks(encoded, self._type_name)


def split_blocks(encoded: torch.Tensor, type_name: str) -> QuantisedCodes:
    """Take rows of blocks apart.

    Args:
        encoded: [rows, bytes per row] uint8, contiguous.
        type_name: A key of `BITS_OF_TYPE`.
    """
    bits, group, _, num_bytes, values, take_apart = _TYPES[type_name]
    blocks = encoded.unflatten(1, (-1, num_bytes))
    codes, scales, minima = take_apart(blocks)
    return QuantisedCodes(
        bits=bits,
        group=group,
        codes=codes.flatten(1),
        scales=scales.flatten(1),
        minima=None if minima is None else minima.flatten(1),
        table=None if values is None else torch.tensor(values, device=encoded.device),
    )
