"""Between files and devices: what a quantised checkpoint hands over, and what makes layers of it.

`models/quantised_loading.py` walks a decoder and asks the factory of its device for a layer for
every product whose weights the file has in codes. What a factory refuses is expanded instead, and
said in the log.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from engine.layers.quantised_codes import QuantisedCodes
from engine.layers.quantised_eight import QuantisedEight

if TYPE_CHECKING:
    from engine.layers.embedding import Embedding
    from engine.layers.linear import Linear
    from engine.layers.moe import MixtureOfExperts

QuantisedWeight = QuantisedCodes | QuantisedEight


class StoredWeight(Protocol):
    """A quantised weight [N, K] where it lies in its file; nothing is read before it is asked for.

    What is read depends on neither device nor the way of reading: all three give the same numbers.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""

    def first_row(self) -> QuantisedWeight:
        """Row 0 on the CPU, by which a factory sees what kind of codes there are."""

    def read(self, device: torch.device) -> QuantisedWeight:
        """The whole weight, unpacked on `device`, to which the file's own bytes are copied."""

    def chunks(self) -> Iterator[QuantisedWeight]:
        """The rows from top to bottom on the CPU, about a megabyte of codes at a time."""

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """Some rows, by number [R] int64, expanded: new [R, K] float32."""


class QuantisedFactory(Protocol):
    """Makes the layers of one device.

    What it does not take (None for the number of bytes) is expanded and becomes an ordinary layer.
    The others are asked for only where it said yes.
    """

    @property
    def room_bytes(self) -> int:
        """Memory that the layers share beside their weights; of all that `num_bytes` has seen."""

    def num_bytes(self, parts: Sequence[StoredWeight], *, is_output: bool) -> int | None:
        """Memory of what `linear` makes of these parts; nothing is read for it."""

    def linear(
        self, parts: Sequence[StoredWeight], bias: torch.Tensor | None, *, is_output: bool
    ) -> Linear:
        """A loaded layer for weights of equal K that stand below each other (q, k and v).

        Args:
            parts: Top to bottom; may be of different formats.
            bias: [sum of N] in the model's dtype on the device, or None.
            is_output: The projection to the logits: float32 results, and all rows are decoding.
        """

    def embedding_bytes(self, stored: StoredWeight) -> int | None:
        """Memory of what `embedding` makes of it."""

    def embedding(self, stored: StoredWeight, scale: torch.Tensor | None) -> Embedding:
        """A loaded lookup of rows; `scale` as in `Embedding`."""

    def expert_bytes(self, parts: Sequence[StoredWeight]) -> int | None:
        """Memory of one expert's product in `experts`."""

    def experts(
        self,
        layer: MixtureOfExperts,
        gate_up: Sequence[Sequence[StoredWeight]],
        down: Sequence[StoredWeight],
    ) -> None:
        """Put the experts' weights into `layer` in place of its own.

        Args:
            layer: Its biases, router and shared feed-forward are loaded separately.
            gate_up: Of each expert, what stands below each other: gate rows, then up rows.
            down: Of each expert.
        """
