"""Block hashes and the index over them."""

from __future__ import annotations

import hashlib

import hypothesis.strategies as st
import numpy as np
from core_fakes import make_request
from hypothesis import given, settings

from engine.core.block_tables import BlockTables
from engine.core.prefix_cache import (
    PrefixCache,
    extend_block_hashes,
    num_equal_parts,
    root_hash,
)
from engine.core.state import SequenceTable

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


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40), st.binary(max_size=40), st.integers(0, 40), st.integers(1, 5))
def test_equal_parts_are_counted_to_the_first_that_differs(
    one: bytes, other: bytes, num_shared: int, part_bytes: int
) -> None:
    other = one[:num_shared] + other
    expected = 0
    for start in range(0, min(len(one), len(other)) - part_bytes + 1, part_bytes):
        if one[start : start + part_bytes] != other[start : start + part_bytes]:
            break
        expected += 1
    assert num_equal_parts(one, other, part_bytes) == expected


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_prompts_that_begin_alike_have_the_hashes_they_have_alone(data: st.DataObject) -> None:
    tables = BlockTables(SequenceTable(2, 20, 2), 2, 20, enable_prefix_caching=True)
    for _ in range(4):
        prompt = data.draw(st.lists(st.integers(0, 1), min_size=3, max_size=12))
        salt = data.draw(st.sampled_from([None, "a", "b"]))
        (seq,) = make_request(None, prompt, cache_salt=salt).sequences
        tables.plan(seq)
        root = _ROOT if salt is None else root_hash("salt", salt)
        assert seq.block_hashes == _hashes(prompt, root=root)
