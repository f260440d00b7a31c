"""`BlockTables`: gives sequences their KV blocks, shared ones first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.core.batch import BlockUpdate
from engine.core.prefix_cache import (
    PrefixCache,
    extend_block_hashes,
    num_equal_parts,
    root_hash,
)
from engine.core.request import Request, Sequence
from engine.core.state import IndexArray, Int32Array, SequenceTable, reports_prompt_logprobs

_NOTHING_TO_REGISTER = np.iinfo(np.int32).max


@dataclass(slots=True, frozen=True)
class Admission:
    """What a waiting sequence would get and need if it were admitted now.

    Attributes:
        num_tokens: Tokens it has: the prompt, and new ones from before a preemption.
        num_cached_tokens: Leading tokens whose KV is there.
        cached_block_ids: Their blocks.
        num_new_blocks: Blocks to allocate, so that all its tokens have a place.
        num_available_needed: `num_new_blocks` plus those cached blocks that are idle.
    """

    num_tokens: int
    num_cached_tokens: int
    cached_block_ids: list[int]
    num_new_blocks: int
    num_available_needed: int


class BlockTables:
    """Fills `SequenceTable.block_table` from the block pool and the prefix cache.

    A sequence gets the blocks of all its known tokens at admission, also of those that later
    chunks compute: it can then not run out of blocks half way through its prompt, its blocks are
    consecutive, and a preempted sequence is not admitted again before it really fits. Afterwards
    it grows block by block.

    Args:
        table: State of the running sequences.
        block_size: Tokens per block.
        num_blocks: Blocks of the KV cache, the padding block included.
        enable_prefix_caching: Share among all requests with the same salt. Otherwise only the
            n answers of one request share, in the same way, with the request's id as a salt.
    """

    def __init__(
        self, table: SequenceTable, block_size: int, num_blocks: int, enable_prefix_caching: bool
    ) -> None:
        self._table = table
        self._block_size = block_size
        self._enable_prefix_caching = enable_prefix_caching
        self.prefix_cache = PrefixCache(num_blocks)
        self.pool = self.prefix_cache.pool
        # Leading blocks of each row that are in the prefix cache, or twins of some that are.
        self._num_registered = np.zeros(table.max_num_seqs, dtype=np.int32)
        # Root, tokens and block hashes of the prompt hashed last.
        self._last_hashed: tuple[bytes, bytes, list[bytes]] = (b"", b"", [])

    # ---------------------------------------------------------------- admission

    def plan(self, seq: Sequence) -> Admission:
        """What admitting the waiting `seq` takes. Changes nothing but its block hashes."""
        num_tokens = seq.num_tokens
        cached: list[int] = []
        if self.reads_cache(seq):
            self._hash_known_blocks(seq)
            # One token at least is computed: the next one is sampled from its logits.
            limit = (num_tokens - 1) // self._block_size
            cached = self.prefix_cache.match(seq.block_hashes, limit)
        num_new_blocks = -(-num_tokens // self._block_size) - len(cached)
        num_idle = sum(self.pool.ref_count(block_id) == 0 for block_id in cached)
        return Admission(
            num_tokens=num_tokens,
            num_cached_tokens=len(cached) * self._block_size,
            cached_block_ids=cached,
            num_new_blocks=num_new_blocks,
            num_available_needed=num_new_blocks + num_idle,
        )

    def reads_cache(self, seq: Sequence) -> bool:
        """False for sequences that share with nobody, or need the logits of the whole prompt."""
        return self._is_hashed(seq) and not reports_prompt_logprobs(seq)

    def admit(self, row: int, admission: Admission) -> BlockUpdate:
        """Give the newly admitted sequence in `row` the blocks of its plan."""
        seq = self._owner(row)
        cached = admission.cached_block_ids
        self.pool.acquire(cached)
        after = cached[-1] if cached else -1
        block_ids = cached + self.pool.allocate(admission.num_new_blocks, after=after)
        self._table.block_table[row, : len(block_ids)] = block_ids
        self._table.num_blocks[row] = len(block_ids)
        if self._is_hashed(seq):
            self._hash_known_blocks(seq)
            self._num_registered[row] = len(cached)
        else:
            self._num_registered[row] = _NOTHING_TO_REGISTER
        return BlockUpdate(row, 0, block_ids)

    # ---------------------------------------------------------------- while it runs

    def grow(self, row: int, num_tokens: int) -> BlockUpdate:
        """Append blocks until `num_tokens` tokens of `row` have a place."""
        start = int(self._table.num_blocks[row])
        end = -(-num_tokens // self._block_size)
        last = int(self._table.block_table[row, start - 1])
        block_ids = self.pool.allocate(end - start, after=last)
        self._table.block_table[row, start:end] = block_ids
        self._table.num_blocks[row] = end
        return BlockUpdate(row, start, block_ids)

    def register_scheduled(self, row: int, num_computed_tokens: int) -> None:
        """Make the blocks that a chunk fills findable, in the very step that computes them.

        Args:
            row: State index.
            num_computed_tokens: Tokens computed once this step has run, all known at admission.
        """
        if self._num_registered[row] != _NOTHING_TO_REGISTER:
            self._register(row, num_computed_tokens // self._block_size)

    def register_completed(self, rows: IndexArray, num_computed_tokens: Int32Array) -> None:
        """Register blocks filled with new tokens, for the next turn of a conversation.

        Called when the step that filled them is complete, because only then are all their tokens
        known on the host.

        Args:
            rows: [B] state indices of live sequences.
            num_computed_tokens: [B] tokens whose KV exists, all known on the host.
        """
        num_full = num_computed_tokens // self._block_size
        for index in np.flatnonzero(num_full > self._num_registered[rows]).tolist():
            row, num_blocks = int(rows[index]), int(num_full[index])
            seq = self._owner(row)
            extend_block_hashes(
                seq.block_hashes,
                self._root(seq),
                self._table.token_ids[row],
                self._block_size,
                num_blocks,
            )
            self._register(row, num_blocks)

    def release(self, row: int) -> None:
        """Give the blocks of `row` back."""
        self.pool.release(reversed(self.block_ids(row)))
        self._table.num_blocks[row] = 0

    def block_ids(self, row: int) -> list[int]:
        """Physical block ids of `row`, in logical order."""
        return self._table.block_table[row, : self._table.num_blocks[row]].tolist()  # type: ignore[no-any-return]

    # ---------------------------------------------------------------- hashes

    def _is_hashed(self, seq: Sequence) -> bool:
        return self._enable_prefix_caching or len(seq.request.sequences) > 1

    def _root(self, seq: Sequence) -> bytes:
        request = seq.request
        if not self._enable_prefix_caching:
            return root_hash("request", request.request_id)
        if request.cache_salt is not None:
            return root_hash("salt", request.cache_salt)
        return root_hash("shared", "")

    def _hash_known_blocks(self, seq: Sequence) -> None:
        """Hash all full blocks of a sequence that has no row yet, or got it just now."""
        num_full = seq.num_tokens // self._block_size
        if len(seq.block_hashes) >= num_full:
            return
        request, root = seq.request, self._root(seq)
        prompt = request.prompt_array()
        num_prompt_blocks = len(prompt) // self._block_size
        if len(request.prompt_block_hashes) < num_prompt_blocks:
            self._hash_prompt(request, root)
        if len(seq.block_hashes) < num_prompt_blocks:
            seq.block_hashes = request.prompt_block_hashes.copy()
        if seq.output_token_ids:
            tokens = np.concatenate([prompt, np.array(seq.output_token_ids, dtype=np.int32)])
            extend_block_hashes(seq.block_hashes, root, tokens, self._block_size, num_full)

    def _hash_prompt(self, request: Request, root: bytes) -> None:
        """Hash a prompt's full blocks, but for those it shares with the prompt hashed last.

        Comparing tokens is far faster, and what comes in together often begins alike.
        """
        prompt, hashes = request.prompt_array(), request.prompt_block_hashes
        data = prompt.tobytes()
        last_root, last_data, last_hashes = self._last_hashed
        if root == last_root:
            num_bytes = self._block_size * prompt.itemsize
            num_shared = num_equal_parts(data, last_data, num_bytes)
            hashes += last_hashes[len(hashes) : num_shared]
        num_blocks = len(prompt) // self._block_size
        extend_block_hashes(hashes, root, prompt, self._block_size, num_blocks)
        self._last_hashed = (root, data, hashes)

    def _register(self, row: int, num_full: int) -> None:
        hashes = self._owner(row).block_hashes
        start = int(self._num_registered[row])
        block_ids = self._table.block_table[row, start:num_full].tolist()
        for block_hash, block_id in zip(hashes[start:num_full], block_ids, strict=True):
            self.prefix_cache.register(block_hash, block_id)
        self._num_registered[row] = max(start, num_full)

    def _owner(self, row: int) -> Sequence:
        seq = self._table.sequences[row]
        assert seq is not None, f"row {row} has no owner"
        return seq
