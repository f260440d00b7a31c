"""Which tiles the fused products for a batch of decoding rows run with, and where they are used.

Measured on an H100 (triton 3.6, November 2026) in graphs, with weights colder than L2, 26 tiles per
case. What decides is the whole layer without its attention, us, present kernels against fused ones
("half": qkv and gate_up fused, o and down by cuBLAS):

| rows | 135M | fused | 0.6B | fused | half | 8B | fused | half |
|------|------|-------|------|-------|------|----|-------|------|
| 16   | 21.2 | 15.1  | 32.1 | 28.9  | 28.9 | 175 | 166  | 167  |
| 32   | 21.4 | 14.9  | 32.8 | 29.4  | 29.4 |     |      |      |
| 64   | 21.6 | 16.9  | 33.5 | 30.4  | 30.4 | 180 | 179  | 173  |
| 128  | 22.9 | 19.4  | 35.5 | 35.2  | 33.4 |     |      |      |
| 160  | 23.0 | 20.0  | 36.1 | 40.0  | 34.8 | 199 | 303  | 246  |
| 256  | 23.5 | 22.7  | 40.2 | 41.4  | 38.2 | 223 | 269  | 233  |
| 512  | 26.9 | 30.9  | 50.7 | 60.7  | 48.4 |     |      |      |

cuBLAS multicasts what several programs read, which these kernels cannot: with many rows and long K
it wins. Programs that start early (use_pdl) save 1.5 us of a 135M layer at 16 and 32 rows, nothing
at 64, and cost 1 to 5 us beyond and 10 to 20 with the 0.6B shape: they settle where the kernel
before them leaves room, and no longer evenly over the SMs.

On Hopper the products that `stream_tiles` takes have kernels of their own.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine.kernels import stream_tiles


@dataclass(frozen=True, slots=True)
class FusedTiles:
    """Compile-time settings of one product.

    Attributes:
        block_m: Rows of x per program.
        block_n: Weight rows per program, a power of two; both of a pair count.
        block_k: Entries of K per round.
        num_stages: Rounds whose loads are in flight, and the one that is computed.
        num_warps: Warps per program.
        swapped: Whether the weight is the left operand of the tensor core products.
        use_pdl: Whether programs start before the kernel before them ends.
        prefetch_lines: 128-byte lines of each weight row that a program asks for while it waits.
    """

    block_m: int
    block_n: int
    block_k: int
    num_stages: int = 4
    num_warps: int = 4
    swapped: bool = False
    use_pdl: bool = False
    prefetch_lines: int = 8

    def constants(self, num_inner: int) -> dict[str, Any]:
        """What the kernels take, and the launch options."""
        return {
            "EVEN_K": num_inner % self.block_k == 0,
            "SWAPPED": self.swapped,
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "NUM_STAGES": self.num_stages,
            "USE_PDL": self.use_pdl,
            "PREFETCH_LINES": self.prefetch_lines,
            "num_warps": self.num_warps,
            "enable_fp_fusion": True,
            "launch_pdl": self.use_pdl,
        }


_Tiles = tuple[tuple[int, FusedTiles], ...]
# kind -> entries of the weight measured -> (rows up to which, tiles), in order of rows. The largest
# row count is where separate kernels become faster.
_MEASURED: dict[str, dict[int, _Tiles]] = {
    "qkv": {
        960 * 576: (
            (32, FusedTiles(16, 64, 128, 5, 4, swapped=True, use_pdl=True)),
            (64, FusedTiles(16, 64, 128, 5, 4, swapped=True)),
            (256, FusedTiles(32, 64, 128, 4, 4, swapped=True)),
        ),
        4096 * 1024: (
            (64, FusedTiles(16, 128, 64, 6, 4, swapped=True)),
            (160, FusedTiles(32, 128, 64, 5, 4, swapped=True)),
            (256, FusedTiles(64, 128, 64, 5, 4)),
            (512, FusedTiles(128, 128, 64, 4, 8, swapped=True)),
        ),
        6144 * 4096: (
            (32, FusedTiles(16, 64, 128, 5, 4, swapped=True)),
            (64, FusedTiles(32, 64, 128, 4, 4, swapped=True)),
        ),
    },
    "gated": {
        3072 * 576: (
            (32, FusedTiles(16, 64, 64, 6, 4, swapped=True, use_pdl=True)),
            (64, FusedTiles(32, 64, 64, 6, 4, swapped=True)),
            (128, FusedTiles(64, 64, 64, 7, 4)),
            (160, FusedTiles(32, 128, 64, 5, 4, swapped=True)),
            (256, FusedTiles(64, 128, 64, 5, 4)),
        ),
        6144 * 1024: (
            (16, FusedTiles(16, 64, 128, 5, 4, swapped=True)),
            (32, FusedTiles(32, 64, 128, 4, 4, swapped=True)),
            (64, FusedTiles(64, 64, 64, 7, 4)),
            (128, FusedTiles(128, 64, 64, 5, 4)),
            (160, FusedTiles(32, 128, 64, 5, 4, swapped=True)),
            (256, FusedTiles(64, 64, 64, 4, 4)),
        ),
        28672 * 4096: (
            (32, FusedTiles(32, 128, 128, 4, 8, swapped=True)),
            (64, FusedTiles(64, 128, 64, 5, 8, swapped=True)),
        ),
    },
    "adding": {
        576 * 576: (
            (64, FusedTiles(16, 32, 128, 4, 4)),
            (192, FusedTiles(32, 32, 128, 4, 4)),
            (256, FusedTiles(32, 64, 128, 4, 4)),
        ),
    },
}
_PLAIN = FusedTiles(64, 64, 64, 4, 4)
_WIDEST_WHOLE_LAYER = 768
"""Hidden size up to which whole layers are fused: 576 was measured to be faster so, 1024 not."""
_MOST_ROWS_OF_WHOLE_LAYER = 256


@functools.cache
def _is_served(device: torch.device) -> bool:
    """Whether the tiles fit: they need the shared memory of data centre GPUs from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def most_rows_of_whole_layer(hidden_size: int, device: torch.device) -> int:
    """Rows up to which o and down, too, are faster with what surrounds them fused; 0: never."""
    is_narrow = hidden_size <= _WIDEST_WHOLE_LAYER
    return _MOST_ROWS_OF_WHOLE_LAYER if is_narrow and _is_served(device) else 0


@functools.cache
def _table(kind: str, size: int) -> _Tiles:
    """The tiles measured for the weight whose size is nearest to `size` entries."""
    tables = _MEASURED["qkv" if kind == "scaled" else kind]
    return tables[min(tables, key=lambda measured: abs(math.log(measured / size)))]


def beats_library(kind: str, num_rows: int, weight: torch.Tensor, activation: str = "silu") -> bool:
    """Whether a "gated" or "qkv" product of normalised rows is faster fused than by cuBLAS."""
    if weight.dtype.itemsize != 2 or not _is_served(weight.device):
        return False
    if kind == "gated" and stream_tiles.prompt_tiles(num_rows, weight, activation):
        return True
    return num_rows <= _table(kind, weight.numel())[-1][0]


def squares_block(num_squares: int) -> int:
    """BLOCK_SQUARES: one size for all small P, so that one compiled kernel serves them."""
    return max(32, 1 << (num_squares - 1).bit_length())


def tiles_for(kind: str, x: torch.Tensor, weight: torch.Tensor) -> FusedTiles:
    """Tiles of one product of `kind` "scaled", "gated", "qkv" or "adding"."""
    if x.dtype.itemsize == 4:  # no tensor cores: smaller tiles keep registers free
        return FusedTiles(16, 32, 32, 2)
    num_rows = x.shape[0]
    for most_rows, tiles in _table(kind, weight.numel()):
        if num_rows <= most_rows:
            # Starting early needs such a GPU as well, and the interpreter knows nothing of it.
            return tiles if _is_served(x.device) else replace(tiles, use_pdl=False)
    return _PLAIN
