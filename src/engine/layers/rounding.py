"""Round plain weights to codes: what `quantization="int4"`, "int8" and "fp8" do to a matrix.

| name | form                                                                 | bits of a weight |
|------|----------------------------------------------------------------------|------------------|
| int4 | 16 levels, one scale for 32 columns; the largest number is level -8, | 4.5              |
|      | as in GGUF's Q4_0                                                    |                  |
| int8 | 255 levels around 0, one scale for a row                             | 8                |
| fp8  | float8 e4m3, one scale for a row; x may be rounded to e4m3, too, one | 8                |
|      | scale for a row                                                      |                  |

Every number becomes the nearest level; no data are looked at.
"""

from __future__ import annotations

import torch

from engine.layers.quantised_codes import QuantisedCodes
from engine.layers.quantised_eight import Activations, QuantisedEight
from engine.layers.quantised_factory import QuantisedWeight

GROUP_COLUMNS = 32
"""Columns of an int4 weight that share a scale."""
_LARGEST_E4M3 = 448.0
_LARGEST_INT8 = 127.0


def round_weight(weight: torch.Tensor, name: str) -> QuantisedWeight:
    """Codes of a weight [N, K] of any float dtype, new on its device.

    Args:
        weight: The numbers. For "int4" K is a multiple of 32.
        name: "int4", "int8" or "fp8".
    """
    if name == "int4":
        return _four_bits(weight.float())
    largest = _LARGEST_INT8 if name == "int8" else _LARGEST_E4M3
    # A row of zeros has any scale.
    scales = weight.abs().amax(1, keepdim=True).float().clamp_(min=1e-30) / largest
    numbers = weight / scales
    tile = (1, weight.shape[1])
    if name == "int8":
        return QuantisedEight(numbers.round_().to(torch.int8), tile, scales)
    codes = numbers.to(torch.float8_e4m3fn)
    return QuantisedEight(codes, tile, scales, Activations("token"))


def _four_bits(numbers: torch.Tensor) -> QuantisedCodes:
    groups = numbers.unflatten(1, (-1, GROUP_COLUMNS))
    at = groups.abs().argmax(-1, keepdim=True)
    # As float16 has them, in which they are kept.
    scales = (groups.gather(-1, at) / -8.0).to(torch.float16).float()
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    levels = (groups * inverse).round_().add_(8.0).clamp_(0.0, 15.0)
    scales = scales.squeeze(-1)
    return QuantisedCodes(
        bits=4,
        group=GROUP_COLUMNS,
        codes=levels.to(torch.uint8).flatten(1),
        scales=scales,
        minima=scales * -8.0,
    )
