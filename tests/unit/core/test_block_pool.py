"""Free runs, reference counts and the order in which idle blocks are given away."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from engine.core.block_pool import PADDING_BLOCK_ID, BlockPool
from engine.core.free_runs import FreeRuns


def _pool(num_blocks: int) -> tuple[BlockPool, list[int]]:
    evicted: list[int] = []
    return BlockPool(num_blocks, on_evict=evicted.append), evicted


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 12), st.integers(-1, 40)), max_size=60)
)
def test_free_runs_behave_like_a_set(steps: list[tuple[bool, int, int]]) -> None:
    runs, free = FreeRuns(3, 40), set(range(3, 40))
    used: list[int] = []
    for takes, count, after in steps:
        if takes:
            count = min(count, len(free))
            taken = runs.take(count, after=after)
            assert len(taken) == len(set(taken)) == count
            assert set(taken) <= free
            if count and after + 1 in free and after not in free:
                assert taken[0] == after + 1
            free -= set(taken)
            used += taken
        else:
            for block_id in used[:count]:
                runs.add(block_id)
                free.add(block_id)
            used = used[count:]
        assert len(runs) == len(free)
    for block_id in used:
        runs.add(block_id)
    # All runs have merged again.
    assert runs.take(37, after=-1) == list(range(3, 40))


def test_several_blocks_are_consecutive() -> None:
    pool, _ = _pool(100)
    first, second = pool.allocate(7), pool.allocate(30)
    assert first == list(range(first[0], first[0] + 7))
    assert second == list(range(second[0], second[0] + 30))


def test_growing_sequences_stay_consecutive_side_by_side() -> None:
    """Four sequences that grow in turns get one run each: a CPU reads them as views."""
    pool, _ = _pool(1 + 160)
    sequences = [pool.allocate(2) for _ in range(4)]
    for _ in range(8):
        for blocks in sequences:
            blocks += pool.allocate(1, after=blocks[-1])
    for blocks in sequences:
        assert blocks == list(range(blocks[0], blocks[0] + 10))


def test_a_shortage_of_runs_is_no_shortage_of_blocks() -> None:
    pool, _ = _pool(21)
    blocks = pool.allocate(20)
    pool.release(sorted(blocks)[::2])
    assert sorted(pool.allocate(10)) == sorted(blocks)[::2]


def test_the_padding_block_is_never_handed_out() -> None:
    pool, _ = _pool(5)
    assert pool.num_usable_blocks == 4
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert PADDING_BLOCK_ID == 0


def test_a_block_is_free_when_its_last_user_is_gone() -> None:
    pool, _ = _pool(5)
    (block_id,) = pool.allocate(1)
    pool.acquire([block_id])
    pool.release([block_id])
    assert (pool.ref_count(block_id), pool.num_used_blocks, pool.num_available_blocks) == (1, 1, 3)
    pool.release([block_id])
    assert (pool.ref_count(block_id), pool.num_used_blocks, pool.num_available_blocks) == (0, 0, 4)
    with pytest.raises(AssertionError, match="more often"):
        pool.release([block_id])


def test_idle_blocks_are_evicted_least_recently_used_first_and_only_when_needed() -> None:
    pool, evicted = _pool(7)
    blocks = pool.allocate(4)
    for block_id in blocks:
        pool.keep(block_id)
    pool.release(reversed(blocks))
    assert (pool.num_idle_blocks, pool.num_available_blocks) == (4, 6)
    assert not set(pool.allocate(2)) & set(blocks)
    assert evicted == []
    pool.acquire([blocks[3]])
    pool.release([blocks[3]])  # used again: now the most recent one
    pool.allocate(1)
    assert evicted == [blocks[2]]
    pool.allocate(2)
    assert evicted == [blocks[2], blocks[1], blocks[0]]
    assert pool.num_idle_blocks == 1


def test_an_evicted_block_is_not_kept_again_by_itself() -> None:
    pool, evicted = _pool(2)
    (block_id,) = pool.allocate(1)
    pool.keep(block_id)
    pool.release([block_id])
    pool.release(pool.allocate(1))
    assert evicted == [block_id]
    assert pool.num_idle_blocks == 0


def test_forget_all_keeps_users_and_nothing_else() -> None:
    pool, evicted = _pool(5)
    used, idle = pool.allocate(2)
    pool.keep(used)
    pool.keep(idle)
    pool.release([idle])
    pool.forget_all()
    assert (pool.num_idle_blocks, pool.num_used_blocks) == (0, 1)
    pool.release([used])
    assert (pool.num_idle_blocks, pool.num_available_blocks, evicted) == (0, 4, [])
