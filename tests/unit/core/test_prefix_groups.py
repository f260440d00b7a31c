"""Which sequences of a batch share their leading blocks."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.core.prefix_groups import MAX_GROUPS, MIN_BLOCKS, MIN_MEMBERS, PrefixGroups

BLOCK_SIZE = 16


class Tables:
    """Block tables written by hand: (prefix block ids, private blocks) per row."""

    def __init__(self, num_rows: int) -> None:
        self.block_table = np.zeros((num_rows, 64), np.int32)
        self.num_computed = np.zeros(num_rows, np.int32)
        self.epoch = np.zeros(num_rows, np.int64)
        self._next = 1

    def fresh(self, count: int) -> list[int]:
        self._next += count
        return list(range(self._next - count, self._next))

    def put(self, row: int, prefix: list[int], num_private: int) -> None:
        blocks = prefix + self.fresh(num_private)
        self.block_table[row, : len(blocks)] = blocks
        self.num_computed[row] = len(blocks) * BLOCK_SIZE - 3

    def find(self, rows: list[int]) -> list[tuple[list[int], int]]:
        groups = PrefixGroups(self.as_table(), BLOCK_SIZE)
        order = np.array(rows, np.intp)
        found = groups.find(order, self.num_computed[order])
        return [([rows[m] for m in group.members.tolist()], group.num_blocks) for group in found]

    def as_table(self) -> Any:
        return SimpleNamespace(block_table=self.block_table, epoch=self.epoch)


def test_members_of_one_prefix() -> None:
    tables = Tables(20)
    prefix = tables.fresh(30)
    for row in range(10):
        tables.put(row, prefix, 1 + row % 3)
    for row in range(10, 20):
        tables.put(row, [], 40)
    rows = random.Random(1).sample(range(20), 20)
    ((members, num_blocks),) = tables.find(rows)
    assert sorted(members) == list(range(10))
    assert num_blocks == 30


def test_the_last_block_of_a_member_is_never_in_the_prefix() -> None:
    """The token to be computed belongs after the prefix, and its block may still be written."""
    tables = Tables(8)
    prefix = tables.fresh(20)
    for row in range(6):
        tables.put(row, prefix, 2)
    tables.put(6, prefix[:12], 0)
    tables.num_computed[6] = 12 * BLOCK_SIZE - 1
    ((members, num_blocks),) = tables.find(list(range(7)))
    assert members == list(range(7))
    assert num_blocks == 11


@pytest.mark.parametrize("num_members", [MIN_MEMBERS - 1, MIN_MEMBERS])
@pytest.mark.parametrize("num_blocks", [MIN_BLOCKS - 1, MIN_BLOCKS])
def test_small_groups_and_short_prefixes_stay_alone(num_members: int, num_blocks: int) -> None:
    tables = Tables(10)
    prefix = tables.fresh(num_blocks)
    for row in range(num_members):
        tables.put(row, prefix, 9)
    found = tables.find(list(range(num_members)))
    assert bool(found) == (num_members >= MIN_MEMBERS and num_blocks >= MIN_BLOCKS)


def test_several_groups_the_largest_saving_first() -> None:
    tables = Tables(200)
    rows = []
    for group in range(MAX_GROUPS + 3):
        prefix = tables.fresh(MIN_BLOCKS + group)
        for _ in range(5):
            tables.put(len(rows), prefix, 2)
            rows.append(len(rows))
    found = tables.find(rows)
    assert len(found) == MAX_GROUPS
    lengths = [num_blocks for _, num_blocks in found]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] == MIN_BLOCKS + 3
    everybody = [member for members, _ in found for member in members]
    assert len(everybody) == len(set(everybody))


def test_groups_follow_the_batch() -> None:
    """Places are those of the batch at hand, also when a member ends or the order changes."""
    tables = Tables(12)
    prefix = tables.fresh(10)
    for row in range(8):
        tables.put(row, prefix, 1)
    finder = PrefixGroups(tables.as_table(), BLOCK_SIZE)
    for rows in ([0, 1, 2, 3, 4, 5, 6, 7], [7, 3, 5, 1], [7, 3, 5], [9, 7, 3, 5, 1, 2]):
        order = np.array(rows, np.intp)
        found = finder.find(order, tables.num_computed[order])
        assert finder.find(order.copy(), tables.num_computed[order]) == found
        shared = [place for place, row in enumerate(rows) if row < 8]
        expected = [shared] if len(shared) >= MIN_MEMBERS else []
        assert [group.members.tolist() for group in found] == expected


def test_a_new_owner_of_a_row_is_looked_at_anew() -> None:
    tables = Tables(6)
    prefix = tables.fresh(10)
    for row in range(6):
        tables.put(row, prefix, 1)
    finder = PrefixGroups(tables.as_table(), BLOCK_SIZE)
    rows = np.arange(6)
    assert len(finder.find(rows, tables.num_computed[rows])[0].members) == 6
    tables.put(2, [], 11)
    tables.epoch[2] += 1
    ((group),) = finder.find(rows, tables.num_computed[rows])
    assert group.members.tolist() == [0, 1, 3, 4, 5]
