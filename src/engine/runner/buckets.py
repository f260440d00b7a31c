"""The sizes that steps are captured for: every real step is padded to the next one."""

from __future__ import annotations

import bisect

_FEWEST_TOKENS = 32
_FEW_SEQS = 32
_MOST_TOKENS_OF_FEW_SEQS = 1024


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes of pure decode: fine steps while small, at most 1/8 waste later.

    The first sizes are those where a padded row costs most. A capture takes some 10 ms on a slow
    host, so there are not more of them than help.
    """
    sizes = [1, 2, 4, 8]
    size = 16
    while size < max_num_seqs:
        sizes.append(size)
        size += 16 if size < 128 else 32 if size < 256 else 64
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def token_sizes(max_num_tokens: int) -> list[int]:
    """Token counts of mixed steps: two to an octave, and four where a step computes for long."""
    sizes = []
    octave = _FEWEST_TOKENS
    while octave < max_num_tokens:
        parts = 2 if octave < _MOST_TOKENS_OF_FEW_SEQS else 4
        sizes += [octave + part * octave // parts for part in range(parts)]
        octave *= 2
    return [size for size in sizes if size < max_num_tokens] + [max_num_tokens]


def mixed_sizes(max_num_tokens: int, max_num_seqs: int) -> list[tuple[int, int]]:
    """(sequences, tokens) of mixed steps.

    Short steps come in two widths, because each sequence costs a row of logits: for a small model
    with a large vocabulary those cost more than the tokens. Long steps come in one.
    """
    pairs = []
    for num_tokens in token_sizes(max_num_tokens):
        widest = min(max_num_seqs, num_tokens)
        widths = {widest}
        if num_tokens <= _MOST_TOKENS_OF_FEW_SEQS:
            widths |= {min(_FEW_SEQS, widest)}
        pairs += [(width, num_tokens) for width in sorted(widths)]
    return pairs


class Ladder:
    """Finds the smallest captured size that holds a step.

    Args:
        max_num_seqs: S, sequences of a step at most.
        max_num_tokens: T at most.
    """

    def __init__(self, max_num_seqs: int, max_num_tokens: int) -> None:
        self.decode = decode_sizes(max_num_seqs)
        self.mixed = mixed_sizes(max_num_tokens, max_num_seqs)
        self._tokens = token_sizes(max_num_tokens)
        self._widths: dict[int, list[int]] = {}
        for width, num_tokens in self.mixed:
            self._widths.setdefault(num_tokens, []).append(width)

    def decode_size(self, num_seqs: int) -> int:
        """Captured batch size for `num_seqs` decoding sequences."""
        return self.decode[bisect.bisect_left(self.decode, num_seqs)]

    def mixed_size(self, num_seqs: int, num_tokens: int) -> tuple[int, int]:
        """(sequences, tokens) captured for such a mixed step."""
        tokens = self._tokens[bisect.bisect_left(self._tokens, num_tokens)]
        widths = self._widths[tokens]
        return widths[bisect.bisect_left(widths, num_seqs)], tokens
