"""Who gives way. The scheduler says when; nothing is changed here."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from engine.core.block_pool import BlockPool
from engine.core.request import Sequence


def rank(seq: Sequence) -> tuple[int, int]:
    """The largest gives way first: the least urgent class, and in it the latest arrival."""
    return (seq.request.priority, seq.arrival_index)


def fewest_victims(
    candidates: Iterable[tuple[Sequence, list[int]]],
    pool: BlockPool,
    *,
    num_blocks_lacking: int,
    kept_block_ids: Collection[int],
) -> list[Sequence]:
    """The first few candidates whose blocks are enough, at least one; none if all are too few.

    Args:
        candidates: Running sequences with their block ids, who should give way first in front.
        pool: Knows how many sequences use a block.
        num_blocks_lacking: Blocks that have to become available; may be <= 0 where only a row is
            wanted.
        kept_block_ids: Blocks that the admitted sequence will share: no room is gained by them.
    """
    victims: list[Sequence] = []
    num_users_gone: dict[int, int] = {}
    num_freed = 0
    kept = set(kept_block_ids)
    for seq, block_ids in candidates:
        victims.append(seq)
        for block_id in block_ids:
            gone = num_users_gone.get(block_id, 0) + 1
            num_users_gone[block_id] = gone
            # A shared block is free only when its last user gives way too.
            num_freed += gone == pool.ref_count(block_id) and block_id not in kept
        if num_freed >= num_blocks_lacking:
            return victims
    return []
