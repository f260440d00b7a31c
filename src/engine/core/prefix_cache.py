"""`PrefixCache`: finds KV blocks by the tokens they and all blocks before them hold."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from engine.core.block_pool import BlockPool

_DIGEST_BYTES = 16


def root_hash(domain: str, name: str) -> bytes:
    """The parent of a sequence's first block; sequences with different roots never share.

    Args:
        domain: What `name` is, so that a salt never equals a request id.
        name: A salt or a request id.
    """
    return blake2b(f"{domain}\0{name}".encode(), digest_size=_DIGEST_BYTES).digest()


def extend_block_hashes(
    hashes: list[bytes],
    root: bytes,
    token_ids: npt.NDArray[np.int32],
    block_size: int,
    num_blocks: int,
) -> None:
    """Append to `hashes` until it covers `num_blocks` full blocks.

    A block's hash is taken over its parent's hash and its own token ids, so one lookup compares
    the whole prefix (vLLM's scheme). It is cryptographic: a wrong hit, which would show one user's
    text to another, cannot be constructed.

    Args:
        hashes: Hashes of the leading blocks; extended in place.
        root: Parent of the first block.
        token_ids: [>= num_blocks * block_size] int32, contiguous.
        block_size: Tokens per block.
        num_blocks: Full blocks to cover.
    """
    parent = hashes[-1] if hashes else root
    data = token_ids.data.cast("B")
    num_bytes = block_size * token_ids.itemsize
    for start in range(len(hashes) * num_bytes, num_blocks * num_bytes, num_bytes):
        digest = blake2b(parent, digest_size=_DIGEST_BYTES)
        digest.update(data[start : start + num_bytes])
        parent = digest.digest()
        hashes.append(parent)


def num_equal_parts(one: bytes, other: bytes, part_bytes: int) -> int:
    """How many leading parts of `part_bytes` bytes are equal; an incomplete last part is none."""
    low, high = 0, min(len(one), len(other)) // part_bytes
    while low < high:
        middle = (low + high + 1) // 2
        part = slice(low * part_bytes, middle * part_bytes)
        if one[part] == other[part]:
            low = middle
        else:
            high = middle - 1
    return low


class PrefixCache:
    """Index of full KV blocks by chained hash.

    Only full blocks are in it: a full block is never written again. A block may be registered as
    soon as the step that writes it is scheduled, so that sequences of one step share a prefix; the
    step has to write the KV of all its tokens, in each layer, before attention reads any.

    The cache makes and owns the block pool: both have to agree on what an idle block holds.

    Args:
        num_blocks: Blocks of the KV cache.
    """

    def __init__(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, on_evict=self._forget)
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that can be found, in use or idle."""
        return len(self._block_of)

    def match(self, hashes: list[bytes], limit: int) -> list[int]:
        """Block ids of the longest cached run of `hashes[:limit]`; users are not added."""
        block_ids: list[int] = []
        for index in range(limit):
            block_id = self._block_of.get(hashes[index])
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def register(self, block_hash: bytes, block_id: int) -> None:
        """Make a full block in use findable.

        The first block with some contents is the one that is found; later twins (two sequences
        computed the same prompt's last block) stay private.
        """
        if block_hash not in self._block_of:
            self._block_of[block_hash] = block_id
            self._hash_of[block_id] = block_hash
            self.pool.keep(block_id)

    def clear(self) -> None:
        """Forget all contents; blocks in use stay in use."""
        self._block_of.clear()
        self._hash_of.clear()
        self.pool.forget_all()

    def _forget(self, block_id: int) -> None:
        del self._block_of[self._hash_of.pop(block_id)]
