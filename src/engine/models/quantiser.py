"""`Quantiser`: a checkpoint's plain weights, seen as if they were stored in codes.

With `quantization=` every product of the layers becomes what `rounding` makes of it, one weight at
a time while it is read: the plain weights are never in memory together. The output projection, on
which the choice of each token hangs, gets 8 bits at least. An embedding of its own stays as it is,
and so does a router.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from engine.layers.quantised_codes import QuantisedCodes
from engine.layers.quantised_eight import QuantisedEight
from engine.layers.quantised_factory import QuantisedWeight
from engine.layers.rounding import GROUP_COLUMNS, round_weight

if TYPE_CHECKING:
    from engine.models.weight_loading import FamilyCheckpoint

_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_PART_NUMBERS = 1 << 24
"""Numbers rounded at a time; bounds the float32 memory beside a large weight."""
_CHUNK_NUMBERS = 1 << 20


class Quantiser:
    """What weights of one model become.

    Args:
        name: "int4", "int8" or "fp8".
        dtype: In which plain weights are read.
        shapes: Full name of each of the model's weights -> shape.
        is_tied: Whether the embedding is the output projection, too.
    """

    def __init__(
        self, name: str, dtype: torch.dtype, shapes: Mapping[str, tuple[int, ...]], *, is_tied: bool
    ) -> None:
        self.name = name
        self._dtype = dtype
        self._shapes = shapes
        self._is_tied = is_tied
        self._made: dict[str, RoundedWeight] = {}

    def stored(self, family: FamilyCheckpoint, name: str) -> RoundedWeight | None:
        """The weight `name` as codes that are made when it is read; None where it stays plain."""
        shape = self._shapes.get(name, ())
        if len(shape) != 2 or (name == _EMBEDDING and not self._is_tied):
            return None
        kind = self.name
        is_output = name in (_EMBEDDING, _OUTPUT)
        if kind == "int4" and (is_output or shape[1] % GROUP_COLUMNS):
            kind = "int8"
        if name not in self._made:
            self._made[name] = RoundedWeight(
                family,
                name,
                (shape[0], shape[1]),
                kind,
                self._dtype,
                keeps_rows=name == _EMBEDDING,
            )
        return self._made[name]


class RoundedWeight:
    """A `StoredWeight` whose codes are made from plain numbers.

    Args:
        family: Reads the numbers.
        name: Of the weight.
        shape: (N, K).
        kind: "int4", "int8" or "fp8".
        dtype: In which the numbers are read.
        keeps_rows: Whether rows are looked up on a CPU after the checkpoint is closed (`take`).
    """

    def __init__(
        self,
        family: FamilyCheckpoint,
        name: str,
        shape: tuple[int, int],
        kind: str,
        dtype: torch.dtype,
        *,
        keeps_rows: bool,
    ) -> None:
        self.shape = shape
        self._family, self._name = family, name
        self._kind, self._dtype = kind, dtype
        self._keeps_rows = keeps_rows
        self._kept: QuantisedWeight | None = None

    def first_row(self) -> QuantisedWeight:
        """A row of the kind; its numbers are not the weight's."""
        return round_weight(torch.ones(1, self.shape[1]), self._kind)

    def read(self, device: torch.device) -> QuantisedWeight:
        """The whole weight; its plain numbers are on `device` meanwhile."""
        rows = max(1, _PART_NUMBERS // self.shape[1])
        return _joined([round_weight(part, self._kind) for part in self._plain(device).split(rows)])

    def chunks(self) -> Iterator[QuantisedWeight]:
        """The rows from top to bottom on the CPU, about a megabyte of codes at a time."""
        rows = max(1, _CHUNK_NUMBERS // self.shape[1])
        parts = []
        for plain in self._plain(torch.device("cpu")).split(rows):
            part = round_weight(plain, self._kind)
            if self._keeps_rows:
                parts.append(part)
            yield part
        if self._keeps_rows:
            self._kept = _joined(parts)

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """Some rows, expanded, of the codes that `chunks` has made."""
        kept = self._kept
        assert isinstance(kept, QuantisedEight), "only of embeddings, after their product was made"
        return replace(kept, values=kept.values[rows], scales=kept.scales[rows]).expand()

    def in_order(self, order: torch.Tensor) -> RoundedWeight:
        """Never asked for: the family reads numbers in the decoder's order."""
        raise AssertionError("rows of rounded weights are in the decoder's order")

    def _plain(self, device: torch.device) -> torch.Tensor:
        numbers = torch.empty(self.shape, dtype=self._dtype, device=device)
        self._family.read_into(self._name, numbers)
        return numbers


def _joined(parts: list[QuantisedWeight]) -> QuantisedWeight:
    """The parts below each other; all of one kind."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, QuantisedCodes):
        codes = [part for part in parts if isinstance(part, QuantisedCodes)]
        minima = [part.minima for part in codes if part.minima is not None]
        return replace(
            first,
            codes=torch.cat([part.codes for part in codes]),
            scales=torch.cat([part.scales for part in codes]),
            minima=torch.cat(minima) if minima else None,
        )
    eights = [part for part in parts if not isinstance(part, QuantisedCodes)]
    return replace(
        first,
        values=torch.cat([part.values for part in eights]),
        scales=torch.cat([part.scales for part in eights]),
    )
