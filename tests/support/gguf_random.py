"""Random blocks of every GGUF type, also of those that the `gguf` package cannot write."""

from __future__ import annotations

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

# Type -> the byte of each fp16 number in a block.
HALF_FLOATS: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "MXFP4": (),
}


def random_blocks(
    type_name: str, num_rows: int, num_columns: int, *, scale: float = 1.0, seed: int = 7
) -> np.ndarray:
    """[rows, bytes per row] uint8: any codes and small factors, fp16 numbers of size `scale`."""
    generator = np.random.default_rng(seed)
    numbers, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    shape = (num_rows, num_columns // numbers)
    blocks = generator.integers(0, 256, (*shape, num_bytes), np.uint8)
    for place in HALF_FLOATS[type_name]:
        halves = (generator.uniform(0.5, 1.0, (*shape, 1)) * scale).astype(np.float16)
        blocks[..., place : place + 2] = halves.view(np.uint8)
    if type_name == "MXFP4":
        exponent = 127 + int(np.floor(np.log2(scale)))
        blocks[..., 0] = generator.integers(exponent - 3, exponent, shape)
    return blocks.reshape(num_rows, -1)
