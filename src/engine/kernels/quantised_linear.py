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
from engine.kernels.quantised_layout import CodePlanes, NormOfRows
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
from engine.kernels.rms_norm import rms_norm

_PART_BYTES = 32 << 20
"""Of an expanded weight at a time: less than the L2 cache of an H100, 50 MB."""
_FEWEST_PART_ROWS = 4096
"""Of a part, whatever it takes: the library's product of fewer does not fill the GPU."""

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
    norm: NormOfRows | None = None,
    adds: bool = False,
) -> torch.Tensor:
    """See `quantised_reference.quantised_linear`."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ConfigError(unknown_activation_message(activation))
    num_rows = x.shape[0]
    gluon = gluon_kernels() if x.is_cuda else None
    if (
        gluon is not None
        and num_rows == 1
        and not batch_invariant
        and gluon.one_row.multiplies_one_row(weight)
        and (norm is None or weight.columns is None)
    ):
        x = _columns_of(x, weight)
        if out is None:
            out = x.new_empty(1, weight.shape[0] // (1 if activation is None else 2))
        gluon.one_row.one_row_product(
            x, weight, bias, out, activation=activation, norm=norm, adds=adds
        )
        return out
    if norm is not None:
        x = rms_norm(x, norm.weight, norm.eps, norm.offset)
    x = _columns_of(x, weight)
    is_direct = out is not None and activation is None and not adds
    y = out if out is not None and is_direct else x.new_empty(num_rows, weight.shape[0])
    if num_rows:
        hopper = None
        if gluon is not None and gluon.hopper.multiplies_on_hopper(x, weight):
            hopper = gluon.hopper
        _product(hopper, x, weight, bias, y, batch_invariant=batch_invariant)
    if activation is not None:
        y = act_mul(y, activation)
    if out is None or is_direct:
        return y
    return out.add_(y) if adds else out.copy_(y)


def _columns_of(x: torch.Tensor, weight: CodePlanes) -> torch.Tensor:
    """X in the order of the weight's columns, stride 1 along them."""
    if weight.columns is not None:
        return x.index_select(1, weight.columns)
    return x if x.stride(1) == 1 else x.contiguous()


def _product(
    hopper: ModuleType | None,
    x: torch.Tensor,
    weight: CodePlanes,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    batch_invariant: bool,
) -> None:
    """Write the product of x [M, K] to `out` [M, N] by the kernel for so many rows."""
    num_rows = x.shape[0]
    if num_rows == 1 and not batch_invariant:
        vector_product(x, weight, bias, out)
        return
    if weight.multiplies_bytes and num_rows > MOST_ROWS_BEFORE_BYTES and not batch_invariant:
        bytes_product(x, weight, bias, out)
        return
    if batch_invariant:
        tiles: ProductTiles | None = invariant_tiles(x.dtype)
    elif hopper is None:
        tiles = product_tiles(num_rows, weight, x.dtype)
    else:
        tiles = hopper_tiles(num_rows, weight)
    if tiles is None:
        _expanded_product(x, weight, bias, out)
    else:
        multiply = matrix_product if hopper is None else hopper.hopper_product
        multiply(x, weight, bias, out, tiles)


def quantised_rows(
    weight: CodePlanes, rows: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """See `quantised_reference.quantised_rows`."""
    num_rows = weight.shape[0] if rows is None else rows.shape[0]
    out = torch.empty((num_rows, weight.shape[1]), dtype=dtype, device=weight.device)
    expand_rows(weight, rows, out)
    return out


def _expanded_product(
    x: torch.Tensor, weight: CodePlanes, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    num_cols, num_inner = weight.shape
    part = max(_FEWEST_PART_ROWS, _PART_BYTES // (num_inner * x.itemsize) // 256 * 256)
    room = x.new_empty(min(part, num_cols), num_inner)
    for first in range(0, num_cols, part):
        expanded = room[: min(part, num_cols - first)]
        expand_rows(weight, None, expanded, first)
        columns = out[:, first : first + part]
        if bias is None:
            torch.mm(x, expanded.t(), out=columns)
        else:
            torch.addmm(bias[first : first + part], x, expanded.t(), out=columns)
