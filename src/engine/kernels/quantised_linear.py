"""Products with weights of integer codes on a GPU: which kernel takes how many rows.

| rows                  | kernel                                                                 |
|-----------------------|------------------------------------------------------------------------|
| 1                     | `quantised_one_row`; for odd groups `quantised_vector`                 |
| several, as many as   | `quantised_hopper`; on other GPUs, in float32, and for odd groups      |
| `quantised_tiles` has | `quantised_product`                                                    |
| tiles for             |                                                                        |
| more                  | the weight is expanded a part at a time, in memory that stays in the   |
|                       | L2 cache, for the library's product                                    |
| above 64, where x may | x is rounded to bytes for the library's product of bytes,              |
| be bytes              | `quantised_bytes`                                                      |

With `batch_invariant` all numbers of rows take one kernel of several rows with the same tiles, so
that a row's bits do not depend on its neighbours.

`quantised_one_row` and `quantised_hopper` are written in Gluon, which is experimental and renames
things from release to release: where it is another one, the portable kernels compute all.
"""

from __future__ import annotations

import functools
import importlib
import logging
from dataclasses import dataclass
from types import ModuleType

import torch
import triton

from engine.errors import ConfigError
from engine.kernels.act_mul import act_mul
from engine.kernels.quantised_bytes import bytes_product
from engine.kernels.quantised_expand import expand_rows
from engine.kernels.quantised_layout import CodePlanes
from engine.kernels.quantised_product import matrix_product
from engine.kernels.quantised_tiles import (
    MOST_ROWS_BEFORE_BYTES,
    ProductTiles,
    hopper_tiles,
    invariant_tiles,
    product_tiles,
)
from engine.kernels.quantised_vector import vector_product
from engine.kernels.reference import ACTIVATIONS, unknown_activation_message

_PART_BYTES = 32 << 20
"""Of an expanded weight at a time: less than the L2 cache of an H100, 50 MB."""


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GluonKernels:
    """The modules of the kernels that are written in Gluon."""

    one_row: ModuleType
    hopper: ModuleType


@functools.cache
def gluon_kernels() -> GluonKernels | None:
    """The kernels in Gluon; None, with a warning, where triton has another one."""
    try:
        return GluonKernels(
            *(
                importlib.import_module(f"engine.kernels.quantised_{name}")
                for name in ("one_row", "hopper")
            )
        )
    except (ImportError, AttributeError):
        logger.warning(
            "triton %s lacks what the kernels over codes need; decoding is up to 1.6 times slower",
            triton.__version__,
            exc_info=True,
        )
        return None


def quantised_linear(
    x: torch.Tensor,
    weight: CodePlanes,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    batch_invariant: bool = False,
    activation: str | None = None,
) -> torch.Tensor:
    """See `quantised_reference.quantised_linear`."""
    num_rows = x.shape[0]
    gluon = gluon_kernels() if x.is_cuda else None
    is_one_row = (
        num_rows == 1
        and not batch_invariant
        and gluon is not None
        and gluon.one_row.multiplies_one_row(weight)
    )
    if activation is not None and not is_one_row:
        y = quantised_linear(x, weight, bias, batch_invariant=batch_invariant)
        return act_mul(y, activation)
    if activation is not None and activation not in ACTIVATIONS:
        raise ConfigError(unknown_activation_message(activation))
    if weight.columns is not None:
        x = x.index_select(1, weight.columns)
    elif x.stride(1) != 1:
        x = x.contiguous()
    if out is None:
        out = x.new_empty(num_rows, weight.shape[0] // (1 if activation is None else 2))
    if not num_rows:
        return out
    hopper = None
    if gluon is not None and gluon.hopper.multiplies_on_hopper(x, weight):
        hopper = gluon.hopper
    if batch_invariant:
        _several_rows(hopper, x, weight, bias, out, invariant_tiles(x.dtype))
    elif gluon is not None and is_one_row:
        gluon.one_row.one_row_product(x, weight, bias, out, activation=activation)
    elif num_rows == 1:
        vector_product(x, weight, bias, out)
    elif weight.multiplies_bytes and num_rows > MOST_ROWS_BEFORE_BYTES:
        bytes_product(x, weight, bias, out)
    else:
        choose = product_tiles if hopper is None else hopper_tiles
        tiles = choose(num_rows, weight, x.dtype)
        if tiles is not None:
            _several_rows(hopper, x, weight, bias, out, tiles)
        else:
            _expanded_product(x, weight, bias, out)
    return out


def quantised_rows(
    weight: CodePlanes, rows: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """See `quantised_reference.quantised_rows`."""
    num_rows = weight.shape[0] if rows is None else rows.shape[0]
    out = torch.empty((num_rows, weight.shape[1]), dtype=dtype, device=weight.device)
    expand_rows(weight, rows, out)
    return out


def _several_rows(
    hopper: ModuleType | None,
    x: torch.Tensor,
    weight: CodePlanes,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tiles: ProductTiles,
) -> None:
    product = matrix_product if hopper is None else hopper.hopper_product
    product(x, weight, bias, out, tiles)


def _expanded_product(
    x: torch.Tensor, weight: CodePlanes, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    num_cols, num_inner = weight.shape
    part = max(256, _PART_BYTES // (num_inner * x.itemsize) // 256 * 256)
    room = x.new_empty(min(part, num_cols), num_inner)
    for first in range(0, num_cols, part):
        expanded = room[: min(part, num_cols - first)]
        expand_rows(weight, None, expanded, first)
        columns = out[:, first : first + part]
        if bias is None:
            torch.mm(x, expanded.t(), out=columns)
        else:
            torch.addmm(bias[first : first + part], x, expanded.t(), out=columns)
