"""`StoredRows`: a quantised weight in a mapped file, read in rows; the base of every format."""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, Final

import torch

from engine.layers.quantised_codes import QuantisedCodes
from engine.layers.quantised_eight import QuantisedEight

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.layers.quantised_factory import QuantisedWeight

_CHUNK_CODES: Final = 1 << 20
"""Codes unpacked at once on a CPU, a byte each: what stays in its second-level cache."""
CPU: Final = torch.device("cpu")


class StoredRows(abc.ABC):
    """A quantised weight [N, K] that is read from its file when it is asked for.

    Implements `layers.quantised_factory.StoredWeight`. A format gives `unpack`; rows may stand in
    the file in another order than in the layer (`order`).

    Args:
        shape: (N, K) of the layer's weight.
        order: [N] int64, the file's row of each row of the layer; None where they are the same.
    """

    def __init__(self, shape: tuple[int, int], order: torch.Tensor | None = None) -> None:
        self.shape = shape
        self.order = order

    @abc.abstractmethod
    def unpack(self, rows: slice | torch.Tensor, device: torch.device) -> QuantisedWeight:
        """The file's rows, by range or by number [R] int64, unpacked on `device`."""

    def in_order(self, order: torch.Tensor) -> StoredRows:
        """The same weight with other rows: row i is this one's row `order[i]`, [N'] int64."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.order = order if self.order is None else self.order[order]
        other.shape = (order.shape[0], self.shape[1])
        return other

    def first_row(self) -> QuantisedWeight:
        """Row 0 on the CPU: shows what kind of codes there are."""
        return self.unpack(self._rows(0, 1), CPU)

    def read(self, device: torch.device) -> QuantisedWeight:
        """The whole weight, unpacked on `device`."""
        if device.type != "cpu":
            return self.unpack(self._rows(0, self.shape[0]), device)
        return _stacked(list(self.chunks()), self.shape[0])

    def chunks(self) -> Iterator[QuantisedWeight]:
        """The rows from top to bottom, unpacked on the CPU, about a megabyte at a time."""
        step = max(1, _CHUNK_CODES // self.shape[1])
        for start in range(0, self.shape[0], step):
            yield self.unpack(self._rows(start, min(start + step, self.shape[0])), CPU)

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the layer's weight, by number [R] int64, expanded: new [R, K] float32."""
        return self.unpack(rows if self.order is None else self.order[rows], CPU).expand()

    def expand_into(self, out: torch.Tensor) -> None:
        """Write the numbers to `out` [N, K], of any floating dtype and device, chunk by chunk."""
        start = 0
        for chunk in self.chunks():
            stop = start + chunk.shape[0]
            out[start:stop].copy_(chunk.expand().to(out.dtype))
            start = stop

    def _rows(self, start: int, stop: int) -> slice | torch.Tensor:
        return slice(start, stop) if self.order is None else self.order[start:stop]


def chosen_rows(weight: QuantisedWeight, rows: slice | torch.Tensor) -> QuantisedWeight:
    """Some rows of a weight, by range or by number [R] int64 on any device."""
    if isinstance(rows, slice) and rows.start in (0, None) and rows.stop == weight.shape[0]:
        return weight
    if isinstance(rows, torch.Tensor):
        rows = rows.to(weight.scales.device)
    if isinstance(weight, QuantisedEight):
        # Every row brings its own tiles along: a row's tile is one row high afterwards.
        scales = weight.scales.repeat_interleave(weight.tile[0], 0)[: weight.shape[0]]
        return dataclasses.replace(
            weight,
            values=weight.values.view(torch.int8)[rows].view(weight.values.dtype),
            tile=(1, weight.tile[1]),
            scales=scales[rows],
        )
    minima = None if weight.minima is None else weight.minima[rows]
    return dataclasses.replace(
        weight, codes=weight.codes[rows], scales=weight.scales[rows], minima=minima
    )


def _stacked(chunks: list[QuantisedWeight], num_rows: int) -> QuantisedWeight:
    """Chunks of one weight below each other."""
    if len(chunks) == 1:
        return chunks[0]
    first = chunks[0]
    scales = torch.cat([chunk.scales for chunk in chunks])
    if isinstance(first, QuantisedEight):
        values = [chunk.values for chunk in chunks if isinstance(chunk, QuantisedEight)]
        joined = torch.cat([part.view(torch.int8) for part in values]).view(first.values.dtype)
        return dataclasses.replace(first, values=joined, scales=scales)
    codes = [chunk for chunk in chunks if isinstance(chunk, QuantisedCodes)]
    minima = [chunk.minima for chunk in codes if chunk.minima is not None]
    return dataclasses.replace(
        first,
        codes=torch.cat([chunk.codes for chunk in codes]),
        scales=scales,
        minima=torch.cat(minima) if minima else None,
    )
