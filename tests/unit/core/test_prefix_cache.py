"""Block hashes and the index over them."""

from __future__ import annotations

import hashlib

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from engine.core.prefix_cache import PrefixCache, extend_block_hashes, root_hash

_ROOT = root_hash("shared", "")


def _hashes(tokens: list[int], block_size: int = 2, root: bytes = _ROOT) -> list[bytes]:
    found: list[bytes] = []
    array = np.array(tokens, dtype=np.int32)
    extend_block_hashes(found, root, array, block_size, len(tokens) // block_size)
    return found


def test_a_hash_covers_parent_and_tokens() -> None:
    block = np.array([5, 6], dtype="<i4").tobytes()
    expected = hashlib.blake2b(_ROOT + block, digest_size=16).digest()
    assert _hashes([5, 6]) == [expected]
    second = np.array([7, 8], dtype="<i4").tobytes()
    assert _hashes([5, 6, 7, 8])[1] == hashlib.blake2b(expected + second, digest_size=16).digest()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 1), max_size=12),
    st.lists(st.integers(0, 1), max_size=12),
    st.integers(1, 4),
)
def test_hashes_agree_exactly_as_far_as_the_prefixes_do(
    one: list[int], other: list[int], block_size: int
) -> None:
    for index, (a, b) in enumerate(
        zip(_hashes(one, block_size), _hashes(other, block_size), strict=False)
    ):
        end = (index + 1) * block_size
        assert (a == b) == (one[:end] == other[:end])


def test_hashes_grow_block_by_block_to_the_same_values() -> None:
    tokens = np.arange(12, dtype=np.int32)
    grown: list[bytes] = []
    for num_blocks in (1, 1, 3, 6):
        extend_block_hashes(grown, _ROOT, tokens, 2, num_blocks)
    assert grown == _hashes(list(range(12)))


def test_roots_of_different_domains_differ() -> None:
    roots = {root_hash("shared", ""), root_hash("salt", ""), root_hash("salt", "a")}
    assert len(roots | {root_hash("request", "a")}) == 4
    assert _hashes([1, 2], root=root_hash("salt", "a")) != _hashes([1, 2])


def test_match_is_the_longest_run_from_the_start() -> None:
    cache = PrefixCache(10)
    hashes = _hashes([1, 2, 3, 4, 5, 6, 7, 8])
    blocks = cache.pool.allocate(4)
    for index in (0, 1, 3):
        cache.register(hashes[index], blocks[index])
    assert cache.match(hashes, 4) == blocks[:2]
    assert cache.match(hashes, 1) == blocks[:1]
    assert cache.match(_hashes([9, 2, 3, 4]), 2) == []


def test_the_first_of_two_equal_blocks_is_found() -> None:
    cache = PrefixCache(10)
    (block_hash,) = _hashes([1, 2])
    first, twin = cache.pool.allocate(2)
    cache.register(block_hash, first)
    cache.register(block_hash, twin)
    assert cache.match([block_hash], 1) == [first]
    cache.pool.release([first, twin])
    assert (cache.pool.num_idle_blocks, cache.num_cached_blocks) == (1, 1)


def test_eviction_and_clear_end_in_a_miss() -> None:
    cache = PrefixCache(3)
    hashes = _hashes([1, 2, 3, 4])
    blocks = cache.pool.allocate(2)
    for block_hash, block_id in zip(hashes, blocks, strict=True):
        cache.register(block_hash, block_id)
    cache.pool.release(reversed(blocks))
    cache.pool.allocate(1)
    assert cache.match(hashes, 2) == blocks[:1], "the end of a prefix goes before its start"
    cache.clear()
    assert cache.match(hashes, 2) == []
    assert (cache.num_cached_blocks, cache.pool.num_idle_blocks) == (0, 0)
