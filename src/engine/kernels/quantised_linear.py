"""Products with weights of integer codes on a GPU: which kernel takes how many rows.

| rows            | kernel                                                                       |
|-----------------|------------------------------------------------------------------------------|
| 1               | `quantised_vector`                                                           |
| up to 128; 256, | `quantised_product`                                                          |
| if it is large  |                                                                              |
| more            | the weight is expanded a part at a time, in memory that stays in the L2      |
|                 | cache, for the library's product                                             |
| above 64, where | x is rounded to bytes for the library's product of bytes, `quantised_bytes`  |
| x may be bytes  |                                                                              |

With `batch_invariant` all numbers of rows take `quantised_product` with the same tiles, so that a
row's bits do not depend on its neighbours.
"""

from __future__ import annotations

import torch

from engine.kernels.quantised_bytes import bytes_product
from engine.kernels.quantised_expand import expand_rows
from engine.kernels.quantised_layout import CodePlanes
from engine.kernels.quantised_product import matrix_product
from engine.kernels.quantised_tiles import (
    MOST_ROWS_BEFORE_BYTES,
    invariant_tiles,
    product_tiles,
)
from engine.kernels.quantised_vector import vector_product

_PART_BYTES = 32 << 20
"""Of an expanded weight at a time: less than the L2 cache of an H100, 50 MB."""


def quantised_linear(
    x: torch.Tensor,
    weight: CodePlanes,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """See `quantised_reference.quantised_linear`."""
    if weight.columns is not None:
        x = x.index_select(1, weight.columns)
    elif x.stride(1) != 1:
        x = x.contiguous()
    num_rows = x.shape[0]
    if out is None:
        out = x.new_empty(num_rows, weight.shape[0])
    if not num_rows:
        return out
    if batch_invariant:
        matrix_product(x, weight, bias, out, invariant_tiles(x.dtype))
    elif num_rows == 1:
        vector_product(x, weight, bias, out)
    elif weight.multiplies_bytes and num_rows > MOST_ROWS_BEFORE_BYTES:
        bytes_product(x, weight, bias, out)
    elif (tiles := product_tiles(num_rows, weight, x.dtype)) is not None:
        matrix_product(x, weight, bias, out, tiles)
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
