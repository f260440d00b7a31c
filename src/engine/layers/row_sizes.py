"""Row counts that oneDNN products are run with, so that its generated code stays small.

oneDNN keeps about 1 MiB and a few milliseconds of generated code for every (row count, weight
shape) it meets, up to 1024 of them: 1.2 GiB measured for prompts of all lengths (torch 2.13). With
these few, it stays below 90 MiB.

Fewer than 4 rows are no faster: all layers of the 135M demo model take 19.8 ms with 2 rows, 16.8
with 4 and with 6, 20.4 with 8, 26 with 16 and 1.0 per row from there on (bfloat16, one thread of a
Zen 4 core, torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

ROW_SIZES = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
_MOST_PADDING = 16
"""Padding rows that are cheaper than another pass over the weight, by the same measurement."""


def in_parts(
    x: torch.Tensor,
    product: Callable[[torch.Tensor], torch.Tensor],
    sizes: Sequence[int] = ROW_SIZES,
) -> torch.Tensor:
    """`product` of the rows of x [T, K] in parts of `sizes` rows, the last one padded: [T, N]."""
    num_rows = x.shape[0]
    part = rows_of_next_part(num_rows, sizes)
    if part == num_rows:
        return product(x)
    if part > num_rows:
        return product(F.pad(x, (0, 0, 0, part - num_rows)))[:num_rows]
    parts = []
    start = 0
    while start < num_rows:
        part = rows_of_next_part(num_rows - start, sizes)
        rows = x[start : start + part]
        missing = part - rows.shape[0]
        y = product(F.pad(rows, (0, 0, 0, missing)) if missing else rows)
        parts.append(y[: part - missing])
        start += part
    return torch.cat(parts)


def rows_of_next_part(num_rows: int, sizes: Sequence[int] = ROW_SIZES) -> int:
    """Rows of the next product: the next size up where little of it is padding, else one below."""
    below = sizes[0]
    for size in sizes:
        if size >= num_rows:
            return size if size - num_rows <= _MOST_PADDING else below
        below = size
    return below
