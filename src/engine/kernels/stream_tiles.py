"""Which products take the Hopper kernels of `stream_…`, and with which tiles.

A batch: whole layers of narrow models, us of a layer of llama-135m (H100, triton 3.6, November
2026; graphs of 30 layers with attention over 64 keys), by `fused_tiles` and in a trial with these
tiles, whose loops were these kernels' (docs/KERNELS.md, "Early launches with TMA"):

| rows    | 16   | 64   | 160  | 256  |
|---------|------|------|------|------|
| Triton  | 23.8 | 23.6 | 27.9 | 32.5 |
| Hopper  | 20.4 | 22.2 | 25.2 | 28.1 |

At 1024 (0.6B) and 4096 (8B) the kernels of `fused_tiles` and cuBLAS are faster or level.

Prompts: gate_up with its activation, us, by cuBLAS and `act_mul`, and in one launch:

| rows         | 1024     | 2048     | 4096       | 8192       |
|--------------|----------|----------|------------|------------|
| 135M         | 14, 14   | 19, 18   | 42, 33     | 74, 50     |
| 0.6B         | 25, 26   | 49, 39   |            | 197, 151   |
| 8B           | 334, 313 | 746, 708 | 1375, 1461 | 2905, 2749 |

(8B at 4096 rows ran when the clock was falling: cuBLAS came first and had the higher one.)
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

logger = logging.getLogger(__name__)

_LOADER_REGISTERS = 24  # of a thread; the least there is


@dataclass(frozen=True, slots=True)
class StreamTiles:
    """Compile-time settings of one product.

    Attributes:
        consumers: Groups of warps, with 64 rows of x each: 1, or 2 for prompts.
        half: Rows of each of the two groups of weight rows, a power of two.
        shared_kib: Shared memory that a program's rings may take.
        max_registers: Of every thread at the launch; at most a fair share of 64 Ki.
    """

    consumers: int
    half: int
    shared_kib: int = 225
    max_registers: int = 168

    @property
    def launch_registers(self) -> int:
        """Registers of every thread at the launch. The loader's warp group has three idle warps."""
        return min(65536 // (128 * (self.consumers + 1)) // 8 * 8, self.max_registers)

    @property
    def consumer_registers(self) -> int:
        """Of a consumer's thread, once the loader has given up what it does not need."""
        spare = self.launch_registers * (self.consumers + 1) - _LOADER_REGISTERS
        return min(spare // self.consumers // 8 * 8, 240)

    def constants(self, num_inner: int) -> dict[str, Any]:
        """What all kernels take, and the launch options."""
        round_bytes = 128 * (64 * self.consumers + 2 * self.half)
        rounds = num_inner // 64
        return {
            "STAGES": min(self.shared_kib * 1024 // round_bytes, rounds),
            "HALF": self.half,
            "LOADER_REGISTERS": _LOADER_REGISTERS,
            "num_warps": 4,
            "maxnreg": self.launch_registers,
            "launch_pdl": True,
            "enable_fp_fusion": True,
        }


def squares_block(num_squares: int) -> int:
    """BLOCK_SQUARES: one size for all small P, so that one compiled kernel serves them."""
    return max(64, 1 << (num_squares - 1).bit_length())


ACTIVATIONS = ("silu", "gelu_tanh")
"""What a gated product of these kernels can compute."""
_WIDEST = 768
"""Hidden size up to which a batch takes them: 576 was measured to be faster so, 1024 not."""
_FEWEST_ROWS_OF_PROMPTS = 2048
_PROMPTS = StreamTiles(2, 128)
_NARROW = StreamTiles(1, 16, 108, 96)
_Tiles = tuple[tuple[int, StreamTiles], ...]
# kind -> entries of the weight measured -> (rows up to which, tiles), in order of rows.
_MEASURED: dict[str, dict[int, _Tiles]] = {
    "qkv": {960 * 576: ((256, StreamTiles(1, 16)),)},
    "gated": {3072 * 576: ((64, StreamTiles(1, 32)), (256, StreamTiles(1, 64)))},
    "adding": {576 * 576: ((256, _NARROW),), 1536 * 576: ((256, StreamTiles(1, 16)),)},
}


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def _has_gluon() -> bool:
    """Whether this triton has the Gluon that the kernels are written in; if not, warns.

    Gluon is experimental and renames things from release to release; `fused_linear` and
    `fused_qkv` compute the same, up to rounding.
    """
    try:
        for name in ("stream_adding", "stream_gated", "stream_prompts", "stream_qkv"):
            importlib.import_module(f"engine.kernels.{name}")
    except (ImportError, AttributeError):
        logger.warning(
            "this triton lacks what the Hopper products need; prompts run 2 to 5 %% slower, and so "
            "do batches of small models",
            exc_info=True,
        )
        return False
    return True


def is_readable(matrix: torch.Tensor) -> bool:
    """Whether TMA reads a matrix by boxes of 64 columns."""
    return (
        matrix.dtype in (torch.bfloat16, torch.float16)
        and matrix.stride(1) == 1
        and matrix.shape[1] % 64 == 0
        and matrix.stride(0) % 8 == 0
        and matrix.data_ptr() % 16 == 0
    )


def prompt_tiles(num_rows: int, weight: torch.Tensor, activation: str) -> StreamTiles | None:
    """Tiles of a gated product of normalised rows of prompts, where it is faster than cuBLAS."""
    is_taken = (
        num_rows >= _FEWEST_ROWS_OF_PROMPTS
        and activation in ACTIVATIONS
        and _is_hopper(weight.device)
        and weight.shape[0] % (2 * _PROMPTS.half) == 0
        and is_readable(weight)
        and _has_gluon()
    )
    return _PROMPTS if is_taken else None


def tiles_for(
    kind: str, x: torch.Tensor, weight: torch.Tensor, activation: str = "silu"
) -> StreamTiles | None:
    """Tiles of one product of a batch x [T, K]; None where these kernels do not take it.

    Args:
        kind: "gated", "adding" or "qkv".
        x: T > 0.
        weight: [N, K], or [2 N, K] of "gated".
        activation: Of "gated".
    """
    if not (_is_hopper(x.device) and is_readable(x) and is_readable(weight) and _has_gluon()):
        return None
    if kind == "gated" and activation not in ACTIVATIONS:
        return None
    tiles = _tiles_of_batch(kind, x.shape[0], *weight.shape)
    return tiles if tiles is None or weight.shape[0] % (2 * tiles.half) == 0 else None


def qkv_tiles(
    x: torch.Tensor, weight: torch.Tensor, head_dim: int, has_head_norm: bool
) -> StreamTiles | None:
    """Tiles of a "qkv" product whose heads turn as a whole; a program has the same part of each.

    With norms of the heads, that is all of it, and `head_dim` a power of two.
    """
    tiles = tiles_for("qkv", x, weight)
    if tiles is None or has_head_norm:
        return tiles if tiles is None else replace(tiles, half=head_dim // 2)
    turn = head_dim // 2
    return replace(tiles, half=min(tiles.half, turn & -turn))


@functools.cache
def _tiles_of_batch(kind: str, num_rows: int, height: int, num_inner: int) -> StreamTiles | None:
    """Those measured for the nearest size of weight."""
    if (height if kind == "adding" else num_inner) > _WIDEST:
        return None
    tables, size = _MEASURED[kind], height * num_inner
    nearest = tables[min(tables, key=lambda measured: abs(math.log(measured / size)))]
    return next((tiles for most_rows, tiles in nearest if num_rows <= most_rows), None)
