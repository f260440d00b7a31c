"""`PackedTexts`: how the texts of one batch lie one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch

_T = TypeVar("_T")


@dataclass(slots=True)
class PackedTexts:
    """Layout of one batch: B texts, T tokens, shortest text first.

    Attributes:
        lens_host: Tokens of each text, not decreasing.
        starts: [B+1] int32 on the device, running sum of the lengths.
        positions: [T] int64 on the device, position of each token in its text.
        device: Of the batch.
    """

    lens_host: list[int]
    starts: torch.Tensor
    positions: torch.Tensor
    device: torch.device
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def num_texts(self) -> int:
        """B."""
        return len(self.lens_host)

    @property
    def max_len(self) -> int:
        """Tokens of the longest text."""
        return self.lens_host[-1]

    def groups(self) -> list[tuple[int, int, int]]:
        """(first token, texts, their length) of each run of equally long texts."""
        return self.once("groups", self._groups)

    def _groups(self) -> list[tuple[int, int, int]]:
        found: list[tuple[int, int, int]] = []
        start = first = 0
        for index, length in enumerate(self.lens_host):
            if index + 1 == self.num_texts or self.lens_host[index + 1] != length:
                count = index + 1 - first
                found.append((start, count, length))
                start += count * length
                first = index + 1
        return found

    def padded_slots(self) -> torch.Tensor:
        """[T] int64, where each token lies in a padded [B * max_len]."""
        return self.once("slots", self._padded_slots)

    def _padded_slots(self) -> torch.Tensor:
        lens = self.starts.diff().long()
        texts = torch.arange(self.num_texts, device=self.device)
        return self.positions + torch.repeat_interleave(
            texts * self.max_len, lens, output_size=self.positions.shape[0]
        )

    def key_mask(self) -> torch.Tensor:
        """[B, 1, 1, max_len] bool, which keys of the padded batch exist."""

        def make() -> torch.Tensor:
            places = torch.arange(self.max_len, device=self.device)
            return (places < self.starts.diff()[:, None])[:, None, None]

        return self.once("mask", make)

    def once(self, key: object, make: Callable[[], _T]) -> _T:
        """`make()`, or what it returned for this key earlier in the batch."""
        if key not in self._memo:
            self._memo[key] = make()
        return cast("_T", self._memo[key])
