"""Sizes that steps are captured for."""

from __future__ import annotations

import itertools

import pytest

from engine.runner.buckets import Ladder, decode_sizes, mixed_sizes, token_sizes


@pytest.mark.parametrize("max_seqs", [1, 2, 7, 16, 100, 256, 512, 600])
@pytest.mark.parametrize("max_tokens", [1, 7, 64, 100, 1024, 8192])
def test_every_step_finds_the_smallest_size_that_holds_it(max_seqs: int, max_tokens: int) -> None:
    ladder = Ladder(max_seqs, max(max_tokens, max_seqs))
    for num_seqs in {1, min(2, max_seqs), max_seqs // 2 or 1, max_seqs}:
        size = ladder.decode_size(num_seqs)
        assert size >= num_seqs
        assert not [other for other in ladder.decode if num_seqs <= other < size]
        for num_tokens in {num_seqs, num_seqs + 1, max_tokens // 2, max_tokens}:
            if not num_seqs <= num_tokens <= max_tokens:
                continue
            width, tokens = ladder.mixed_size(num_seqs, num_tokens)
            assert width >= num_seqs
            assert tokens >= num_tokens
            assert (width, tokens) in ladder.mixed
            assert tokens == min(
                t for t in token_sizes(max(max_tokens, max_seqs)) if t >= num_tokens
            )
            assert width == min(w for w, t in ladder.mixed if t == tokens and w >= num_seqs)


def test_the_waste_is_bounded() -> None:
    tokens = token_sizes(8192)
    assert tokens[-1] == 8192
    assert all(above <= 1.51 * below for below, above in itertools.pairwise(tokens))
    long = [size for size in tokens if size >= 1024]
    assert all(above <= 1.26 * below for below, above in itertools.pairwise(long))
    sizes = decode_sizes(512)
    assert sizes[-1] == 512
    large = [size for size in sizes if size >= 64]
    assert all(above <= 1.34 * below for below, above in itertools.pairwise(large))


def test_the_number_of_captures_is_bounded() -> None:
    # Some 40 ms each on a slow host.
    assert len(mixed_sizes(8192, 512)) + len(decode_sizes(512)) <= 60
