"""The work list of prefill attention: tiles of query tokens, the longest first.

    tiles of a sequence of n new tokens: i < ceil(n / BLOCK_Q), queries [i BLOCK_Q, (i + 1) BLOCK_Q)
    cost of tile i after p computed tokens = end of its keys = p + min((i + 1) BLOCK_Q, n)
    place of a tile in the list = number of tiles that cost more, or as much in earlier sequences

| argument            | shape, dtype              | duty                                           |
|---------------------|---------------------------|------------------------------------------------|
| seq_lens_ptr        | [B] int32                 | KV length after the step                       |
| query_start_loc_ptr | [B + 1] int32             | first token of each sequence                   |
| block_rows_ptr      | [B] int64                 | row of the block table; None: b has b          |
| counts_ptr          | [2] int32                 | decoding and all sequences; None: num_decodes, |
|                     |                           | num_seqs                                       |
| plan_ptr            | [HEADER + tiles * ITEM]   | int32, written: the number of tiles, then the  |
|                     |                           | tiles; the rest keeps what it held             |

A tile is ITEM numbers, one sector of memory: first token, number of tokens, position of the first,
length of the sequence, row of the block table, three unused.

The costs of a sequence rise with i, so how many of its tiles cost more than c is a division, and no
tile has to look for its place among the others: one pass over the sequences gives it. Sorted like
this, programs that take tiles in turn, or as they come free, finish together, whatever the batch.

Grid (prefilling sequences,), at most; one program places the tiles of a sequence, 64 at a time.
constexpr: BLOCK_Q, which is fixed per model.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.compile_ahead import launchable
from engine.kernels.metadata import AttentionMetadata

HEADER = 8
ITEM = 8
_BLOCK = 64


@triton.jit
def _num_costing(least, num_computed, num_queries, BLOCK_Q: tl.constexpr):
    """How many tiles of a sequence have a cost of `least` or more."""
    num_tiles = tl.cdiv(num_queries, BLOCK_Q)
    keys = least - num_computed
    num_cheaper = tl.minimum(tl.maximum(tl.cdiv(keys, BLOCK_Q) - 1, 0), num_tiles)
    return tl.where(keys > num_queries, 0, num_tiles - num_cheaper)


@launchable
@triton.jit(do_not_specialize=["num_decodes", "num_seqs"])
def _plan_kernel(
    seq_lens_ptr,
    query_start_loc_ptr,
    block_rows_ptr,
    counts_ptr,
    plan_ptr,
    num_decodes,
    num_seqs,
    BLOCK_Q: tl.constexpr,
    HEADER: tl.constexpr,
    ITEM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if counts_ptr is not None:
        num_decodes = tl.load(counts_ptr)
        num_seqs = tl.load(counts_ptr + 1)
    seq = num_decodes + tl.program_id(0)
    first_token = tl.load(query_start_loc_ptr + seq, mask=seq < num_seqs, other=0)
    end_token = tl.load(query_start_loc_ptr + seq + 1, mask=seq < num_seqs, other=0)
    seq_len = tl.load(seq_lens_ptr + seq, mask=seq < num_seqs, other=0)
    table_row = seq
    if block_rows_ptr is not None:
        table_row = tl.load(block_rows_ptr + seq, mask=seq < num_seqs, other=0).to(tl.int32)
    num_queries = end_token - first_token
    num_computed = seq_len - num_queries
    num_tiles = tl.cdiv(num_queries, BLOCK_Q)
    total = 0
    # One round even without a tile: the first program counts them all.
    for first in range(0, tl.maximum(num_tiles, 1), BLOCK):
        tiles = first + tl.arange(0, BLOCK)
        costs = num_computed + tl.minimum((tiles + 1) * BLOCK_Q, num_queries)
        places = tl.zeros([BLOCK], tl.int32)
        total = 0
        for base in range(num_decodes, num_seqs, BLOCK):
            others = base + tl.arange(0, BLOCK)
            is_other = others < num_seqs
            starts = tl.load(query_start_loc_ptr + others, mask=is_other, other=0)
            ends = tl.load(query_start_loc_ptr + others + 1, mask=is_other, other=0)
            lens = tl.load(seq_lens_ptr + others, mask=is_other, other=0)
            queries = ends - starts
            total += tl.sum(tl.cdiv(queries, BLOCK_Q), axis=0)
            least = costs[:, None] + (others >= seq).to(tl.int32)[None, :]
            computed = (lens - queries)[None, :]
            places += tl.sum(_num_costing(least, computed, queries[None, :], BLOCK_Q), axis=1)
        item_ptrs = plan_ptr + HEADER + places * ITEM
        is_tile = tiles < num_tiles
        tokens = tl.minimum(num_queries - tiles * BLOCK_Q, BLOCK_Q)
        same = tl.zeros([BLOCK], tl.int32)
        tl.store(item_ptrs, first_token + tiles * BLOCK_Q, mask=is_tile)
        tl.store(item_ptrs + 1, tokens, mask=is_tile)
        tl.store(item_ptrs + 2, num_computed + tiles * BLOCK_Q, mask=is_tile)
        tl.store(item_ptrs + 3, same + seq_len, mask=is_tile)
        tl.store(item_ptrs + 4, same + table_row, mask=is_tile)
    if tl.program_id(0) == 0:
        tl.store(plan_ptr, total)


def prefill_plan(
    metadata: AttentionMetadata, num_tokens: int, block_q: int
) -> tuple[torch.Tensor, int]:
    """(the list, an upper bound on its tiles) for tiles of `block_q` tokens; shared by the layers.

    Args:
        metadata: Layout of the batch.
        num_tokens: T, padding included.
        block_q: Tokens of a tile.
    """
    counts = metadata.device_counts
    if counts is None:
        num_prefills = metadata.num_seqs - metadata.num_decodes
        num_tokens -= metadata.num_decodes
    else:
        num_prefills = metadata.max_prefills
    max_tiles = num_tokens // block_q + num_prefills

    def make() -> torch.Tensor:
        plan = torch.empty(
            HEADER + max_tiles * ITEM, dtype=torch.int32, device=metadata.seq_lens.device
        )
        _plan_kernel[(max(num_prefills, 1),)](
            metadata.seq_lens,
            metadata.query_start_loc,
            metadata.block_rows,
            counts,
            plan,
            metadata.num_decodes,
            metadata.num_seqs,
            BLOCK_Q=block_q,
            HEADER=HEADER,
            ITEM=ITEM,
            BLOCK=_BLOCK,
            num_warps=8,
        )
        return plan

    return metadata.once_per_step(("prefill_plan", block_q), make), max_tiles
