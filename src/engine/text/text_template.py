"""`TextTemplate`: what a tokenizer puts around one text and around a pair, and how both are cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

_PROBE_A, _PROBE_B = "a", "b"


@dataclass(frozen=True, slots=True)
class TextTemplate:
    """`prefix text suffix` and `pair_prefix first middle second pair_suffix`, as token ids.

    Attributes:
        prefix: Before a single text, such as [CLS].
        suffix: After it, such as [SEP].
        pair_prefix: Before the first text of a pair.
        middle: Between the two.
        pair_suffix: After the second.
        has_types: Whether the second text has a token type of its own.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    pair_prefix: tuple[int, ...]
    middle: tuple[int, ...]
    pair_suffix: tuple[int, ...]
    has_types: bool

    @classmethod
    def of(
        cls, backend: tokenizers.Tokenizer, prefix: list[int], suffix: list[int]
    ) -> TextTemplate:
        """Read off what the tokenizer's post-processor does.

        Args:
            backend: Without padding and truncation.
            prefix: Of a single text.
            suffix: Likewise.
        """
        first = backend.encode(_PROBE_A, add_special_tokens=False).ids
        second = backend.encode(_PROBE_B, add_special_tokens=False).ids
        pair = backend.encode(_PROBE_A, _PROBE_B)
        ids = pair.ids
        start = _find(ids, first, 0)
        after = start + len(first)
        second_start = _find(ids, second, after)
        end = second_start + len(second)
        return cls(
            tuple(prefix),
            tuple(suffix),
            tuple(ids[:start]),
            tuple(ids[after:second_start]),
            tuple(ids[end:]),
            has_types=1 in pair.type_ids,
        )

    @property
    def num_pair_tokens(self) -> int:
        """Tokens that a pair has beside its two texts."""
        return len(self.pair_prefix) + len(self.middle) + len(self.pair_suffix)

    def single(self, ids: list[int], max_tokens: int | None = None) -> list[int]:
        """A text with what belongs around it, its end cut off where it is longer than that."""
        if max_tokens is not None:
            ids = ids[: max(0, max_tokens - len(self.prefix) - len(self.suffix))]
        return [*self.prefix, *ids, *self.suffix]

    def pair(
        self, first: list[int], second: list[int], max_tokens: int | None = None
    ) -> tuple[list[int], int]:
        """(ids of the pair, where the second text's token type begins).

        What is longer than `max_tokens` loses tokens at the end of the longer text first, as with
        the `longest_first` of tokenizers. Without token types the second number is the length.
        """
        if max_tokens is not None:
            room = max(0, max_tokens - self.num_pair_tokens)
            num_first, num_second = cut_longest_first(len(first), len(second), room)
            first, second = first[:num_first], second[:num_second]
        ids = [*self.pair_prefix, *first, *self.middle, *second, *self.pair_suffix]
        start = len(self.pair_prefix) + len(first) + len(self.middle)
        return ids, start if self.has_types else len(ids)


def cut_longest_first(num_first: int, num_second: int, room: int) -> tuple[int, int]:
    """How much of two texts is kept so that both together have at most `room` tokens."""
    if num_first + num_second <= room:
        return num_first, num_second
    short, long = sorted((num_first, num_second))
    long = max(short, room - short)
    if short + long > room:
        short = room // 2
        long = room - short
    return (long, short) if num_first > num_second else (short, long)


def _find(ids: list[int], part: list[int], start: int) -> int:
    """Where `part` first lies in `ids` from `start` on; `start` itself if nowhere."""
    for place in range(start, len(ids) - len(part) + 1):
        if ids[place : place + len(part)] == part:
            return place
    return start
