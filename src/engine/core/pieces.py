"""Long arrays in pieces: NumPy gives up the GIL for operations on more than 500 elements.

Beside a busy thread of the application it then takes up to 5 ms to come back, a few times per
hundred operations, and a step makes dozens of them: with 512 running sequences steps took three
times as long. Pieces cost a second call each, and only where there are more than 500 elements.
Concatenating pieces of at most 500 keeps the GIL, whatever their sum (counted with NumPy 2.4).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

MAX_PIECE = 500
"""NPY_BEGIN_THREADS_THRESHOLDED's limit in NumPy's source."""


def pieces(length: int) -> list[slice]:
    """Slices of about equal length that cover [0, length), of at most `MAX_PIECE` each."""
    if length <= MAX_PIECE:
        return [slice(0, length)]
    size = -(-length // -(-length // MAX_PIECE))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def joined(parts: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """The pieces as one array; a single one is returned as it is."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def appended(array: npt.NDArray[Any], values: list[int]) -> npt.NDArray[Any]:
    """`array` with `values` behind it, new, with the GIL kept."""
    tail = np.array(values, dtype=array.dtype)
    return np.concatenate(
        [*(array[one] for one in pieces(len(array))), *(tail[one] for one in pieces(len(tail)))]
    )


def gathered(array: npt.NDArray[Any], indices: npt.NDArray[np.intp]) -> npt.NDArray[Any]:
    """`array[indices]`, new, with the GIL kept."""
    if len(indices) <= MAX_PIECE:
        return array[indices]
    return np.concatenate([array[indices[piece]] for piece in pieces(len(indices))])
