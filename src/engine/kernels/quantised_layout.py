"""`CodePlanes`: a weight of integer codes in the layout that the GPU's kernels read.

128 columns of a row are a *bundle* of 8 strips of 16 columns. A bundle is 16 words; word i has the
codes of column i of every strip, so that shifting all words at once gives a strip:

    word[i] = sum over strips j of code[16 j + i] << (b j)

where b is the number of bits of a *plane*. Codes of 2, 4 and 8 bits are one plane (of 16-bit and of
32-bit words; 8 bits take 16 words for strips 0 to 3 and 16 for the others), 3 = 2 + 1, 5 = 4 + 1
and 6 = 4 + 2 bits two: the lower bits and the upper ones. No bit is wasted, whatever the size, and
every plane is unpacked by the same shifts. Codes of 8 bits lie there as signed bytes, code - 128,
or as e4m3: the library's products of bytes read them, too, with x in the order of `byte_order`.

Scales and minima lie columns first, [G, N], so that programs read those of neighbouring rows as a
vector. They are float16, relative to one factor of the weight, a power of two that keeps the
largest number near 2^14, so that float16 holds the others, too, and scales have 2^20 of range above
its subnormal numbers: rounding them costs 2^-12 of a weight at most, an eighth of what its bfloat16
costs. Groups of 1024 columns and more or of a row, and e4m3, have float32. Where all minima are the
same multiple of their scale, as in symmetric formats, none are stored.

Memory per weight: `bits` + 16 / group, and as much again with minima, in bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

STRIP = 16
"""Columns of a strip."""
STRIPS = 8
"""Strips of a bundle."""
BUNDLE = STRIP * STRIPS
MAIN_BITS = {2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 8: 8}
"""Bits of a code -> those in `main`."""
MOST_TILES_TO_JOIN = 2048
"""Tiles of a product whose parts may be summed up by the last program (`arrivals`)."""


@dataclass(frozen=True, slots=True, eq=False)
class CodePlanes:
    """A weight [N, K] of codes on a GPU; see the head of this module.

    Attributes:
        shape: (N, K).
        bits: Of a code.
        group: Columns that share a scale, a multiple of 16; 0: one scale for a row.
        main: [N, ceil(K / 128), 16 or 32] int16 or int32, the lower bits.
        extra: [N, ceil(K / 128), 16] uint8 or int16, the upper bits; None where there are none.
        scales: [G, N] float16 or float32.
        minima: Likewise, or None: a minimum is then `-zero * scale`.
        zero: The code of the value 0, where there are no minima.
        factor: Of all scales and minima.
        table: [2 ** bits] float32, values of the codes; None for the codes themselves. Those of 4
            bits are numbers of float16.
        table_words: [8] int32, a table of 4 bits as `quantised_lookup` reads it; else None.
        exponent_bits: Where codes are floats, sign first: 4 for e4m3, 2 for e2m1; else 0.
        columns: [K] int64, as in `QuantisedCodes`; None where they are in order.
        rounds_input: Whether rows of x may be rounded to 8 bits (W8A8).
        arrivals: [`MOST_TILES_TO_JOIN`] int32, zeros between products: how many programs have
            their part of a tile. So one weight's products may not run side by side.
    """

    shape: tuple[int, int]
    bits: int
    group: int
    main: torch.Tensor
    extra: torch.Tensor | None
    scales: torch.Tensor
    minima: torch.Tensor | None
    zero: float
    factor: float
    table: torch.Tensor | None
    table_words: torch.Tensor | None
    exponent_bits: int
    columns: torch.Tensor | None
    rounds_input: bool
    arrivals: torch.Tensor

    @property
    def num_bundles(self) -> int:
        """Of a row."""
        return self.main.shape[1]

    @property
    def main_bits(self) -> int:
        """Bits of a code in `main`."""
        return MAIN_BITS[self.bits]

    @property
    def strips_per_scale(self) -> int:
        """How many strips of a bundle surely share a scale: 8, 4, 2 or 1."""
        if self.group % BUNDLE == 0:
            return STRIPS
        return self.group // STRIP if BUNDLE % self.group == 0 else 1

    @property
    def multiplies_bytes(self) -> bool:
        """Whether the library's products of bytes take it, and x as bytes is wanted."""
        has_row_scales = self.bits == 8 and self.group == 0 and self.minima is None
        is_centred = self.exponent_bits > 0 or (self.zero == 128 and self.table is None)
        return self.rounds_input and has_row_scales and is_centred and self.shape[0] % 16 == 0

    @property
    def planes(self) -> tuple[torch.Tensor | None, ...]:
        """What all kernels read, in the order of their arguments."""
        return self.main, self.extra, self.scales, self.minima, self.table

    @property
    def looked_up_planes(self) -> tuple[torch.Tensor | None, ...]:
        """`planes` for kernels that read tables of 4 bits by `quantised_lookup`."""
        table = self.table if self.table_words is None else self.table_words
        return self.main, self.extra, self.scales, self.minima, table

    @property
    def constants(self) -> dict[str, Any]:
        """What all kernels are compiled for."""
        return {
            "GROUP": self.group,
            "SUB": self.strips_per_scale,
            "MAIN_BITS": self.main_bits,
            "EXTRA": self.bits - self.main_bits,
            "EXPONENT_BITS": self.exponent_bits,
            "ZERO": self.zero,
            "HAS_MINIMA": self.minima is not None,
            "HAS_TABLE": self.table is not None,
        }

    @property
    def device(self) -> torch.device:
        """Where it lives."""
        return self.main.device

    @property
    def num_bytes(self) -> int:
        """Memory of codes, scales and minima."""
        parts = (self.main, self.extra, self.scales, self.minima)
        return sum(part.numel() * part.itemsize for part in parts if part is not None)


@dataclass(frozen=True, slots=True, eq=False)
class NormOfRows:
    """A norm of x that joins a product: `x / rms(x) * (weight + offset)`.

    Attributes:
        weight: [K].
        eps: Added to the mean square.
        offset: 1.0 where weights are stored around 0, as Gemma's.
    """

    weight: torch.Tensor
    eps: float
    offset: float = 0.0


def byte_order(num_bundles: int, device: torch.device) -> torch.Tensor:
    """Column of every byte of a row of 8-bit codes, [128 num_bundles] int64."""
    in_bundle = torch.arange(BUNDLE, device=device).view(2, 4, STRIP).transpose(1, 2).reshape(-1)
    starts = torch.arange(num_bundles, device=device) * BUNDLE
    return (starts[:, None] + in_bundle).view(-1)
