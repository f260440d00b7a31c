"""`WeightScheme`: how a checkpoint says that the weight of one layer is stored."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """How one layer's weight is stored, from `quantization_config`.

    Attributes:
        layout: Which tensors hold it: "gptq", "awq", "packed" (compressed-tensors' words of codes),
            "eight" (float8 or int8 numbers with scales), "bnb4", "bnb8" (bitsandbytes), "mxfp4"
            (gpt-oss' stacked experts), "mxfp4-packed" (compressed-tensors').
        bits: Of a code.
        group: Columns that share a scale; 0 for all of a row.
        tile: Of "eight": rows and columns that share a scale, 0 for all of them.
        is_symmetric: Of "packed" and "eight": whether the zero point is the middle of the codes, so
            that none is stored. GPTQ and AWQ store theirs in any case.
        zeros_less_one: Of "gptq": stored zero points are one too small (its first format).
        is_float: Of "eight": float8 e4m3, else int8.
        activations: As in `layers.quantised_eight.Activations`.
        activation_group: Columns of "group" activations.
    """

    layout: str
    bits: int
    group: int = 0
    tile: tuple[int, int] = (0, 0)
    is_symmetric: bool = True
    zeros_less_one: bool = False
    is_float: bool = False
    activations: str = "none"
    activation_group: int = 0
