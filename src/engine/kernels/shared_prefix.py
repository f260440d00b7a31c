"""The part of decode attention that several sequences share: their common leading blocks, once.

    for the members b of a group, head h, and keys j of one part of the prefix:
    m = max_j s[b, h, j];  l = sum_j 2^(s[b, h, j] - m);  acc = sum_j 2^(s[b, h, j] - m) v[j]

as `_split_kernel` computes for one sequence, but with the query heads of all members as the rows of
one matrix (Hydragen, Juravsky et al., arXiv 2402.05099): the keys are read once per group instead
of once per member, and wide tiles keep the tensor cores busy. Sums and maxima go to the members'
own places among the partials, ahead of their private parts; the merge knows no difference.

| argument        | shape, dtype                        | duty                                     |
|-----------------|-------------------------------------|------------------------------------------|
| q_ptr           | [B, Hq, D] bf16, fp16 or fp32       | stride 1 along D                         |
| k_ptr, v_ptr    | [N, block_size, Hkv, D], same dtype | equal strides, 1 along D                 |
|                 | or 8 bits                           |                                          |
| k_scales_ptr,   | [N, Hkv, block_size] fp32           | of 8-bit keys and values; None: plain    |
| v_scales_ptr    |                                     | ones                                     |
| block_table_ptr | [rows, max_blocks] int32            | stride 1 along blocks                    |
| items_ptr       | int32                               | items of groups, see `decode_plan`       |
| members_ptr     | int32                               | see `metadata.SharedPrefixes`            |
| places_ptr      | [B] int32                           | first place of each sequence             |
| partial_ptr     | [places, Hq, D] fp32                | written                                  |
| stats_ptr       | [places, 2, Hq] fp32                | written                                  |

Grid (programs,), as many as fit the device beside the kernel of private keys, which starts as soon
as all of them have: that one waits for memory, this one multiplies. They walk the list, one item of
one KV head at a time, and return at once where there are no groups. Members sit behind the prefix,
so no key is masked, save a last tile that blocks smaller than a tile may leave incomplete.

Numerics: see `attention_tiles`. A row's bits depend on its own query and on the prefix alone: not
on the rows beside it, nor on their number. int64 for offsets that multiply a stride. constexpr:
what is fixed per model.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from engine.kernels.attention_tiles import attend_tiles, num_multiprocessors, starts_kernels_early
from engine.kernels.compile_ahead import launchable
from engine.kernels.decode_layout import PrefixLayout
from engine.kernels.decode_plan import ITEM, DecodePlan
from engine.kernels.kv_cache import KVTensor, parts_of
from engine.kernels.metadata import AttentionMetadata


@dataclass(frozen=True)
class PrefixTiles:
    """Launch shape of `_prefix_kernel`, and what its results depend on.

    Attributes:
        block_m: Rows per tile.
        block_n: Keys per tile.
        num_stages: Tiles of keys in flight, plus one.
        num_warps: Warps per program.
        programs_per_processor: Programs that share a multiprocessor.
        min_tiles: Fewest tiles of keys in a part.
        max_parts: Most parts of a prefix.
        max_registers: Of a thread; None for as many as the compiler likes.
    """

    block_m: int
    block_n: int
    num_stages: int
    num_warps: int
    programs_per_processor: int
    min_tiles: int = 4
    max_parts: int = 16
    max_registers: int | None = None

    def layout(self, num_processors: int) -> PrefixLayout:
        """How prefixes are cut."""
        return PrefixLayout(
            num_programs=num_processors * self.programs_per_processor,
            block_m=self.block_m,
            tile=self.block_n,
            min_tiles=self.min_tiles,
            max_parts=self.max_parts,
        )


def prefix_tiles(dtype: torch.dtype, head_dim: int) -> PrefixTiles:
    """Tiles for a dtype and head size."""
    if dtype == torch.float32:
        return PrefixTiles(16, 32, 2, 4, 2)
    if head_dim > 128:
        return PrefixTiles(64, 64, 2, 4, 1)
    if head_dim > 64:
        return PrefixTiles(64, 64, 3, 4, 2)
    return PrefixTiles(64, 64, 3, 4, 1)


@launchable
@triton.jit
def _prefix_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    block_table_ptr,
    items_ptr,
    members_ptr,
    places_ptr,
    partial_ptr,
    stats_ptr,
    score_scale,
    softcap,
    stride_q_token,
    stride_q_head,
    stride_cache_block,
    stride_cache_token,
    stride_cache_head,
    stride_scales,
    stride_table,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STARTS_NEXT: tl.constexpr,
    ITEM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    if STARTS_NEXT:
        gdc_launch_dependents()
    num_q_heads: tl.constexpr = NUM_KV_HEADS * GROUP
    columns = tl.arange(0, BLOCK_D)
    num_items = tl.load(items_ptr) * NUM_KV_HEADS
    for work in range(tl.program_id(0), num_items, tl.num_programs(0)):
        item_ptr = items_ptr + (1 + work // NUM_KV_HEADS) * ITEM
        kv_head = work % NUM_KV_HEADS
        k_scales = k_scales_ptr
        v_scales = v_scales_ptr
        if k_scales_ptr is not None:
            k_scales = k_scales_ptr + kv_head * BLOCK_SIZE
            v_scales = v_scales_ptr + kv_head * BLOCK_SIZE
        first_member = tl.load(item_ptr)
        num_members = tl.load(item_ptr + 1)
        rows = tl.load(item_ptr + 2) + tl.arange(0, BLOCK_M)
        table_row = tl.load(item_ptr + 3).to(tl.int64)
        start = tl.load(item_ptr + 4)
        end = tl.load(item_ptr + 5)
        part = tl.load(item_ptr + 6)
        is_row = rows < num_members * GROUP
        seqs = tl.load(members_ptr + first_member + rows // GROUP, mask=is_row, other=0)
        seqs = seqs.to(tl.int64)
        heads = kv_head * GROUP + rows % GROUP
        mask = is_row[:, None] & (columns < HEAD_DIM)[None, :]
        q_ptrs = q_ptr + (seqs * stride_q_token + heads * stride_q_head)[:, None]
        q = tl.load(q_ptrs + columns[None, :], mask=mask, other=0.0)
        positions = tl.zeros([BLOCK_M], tl.int32) + end
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        full_end = start + (end - start) // BLOCK_N * BLOCK_N
        first_tiles = (start, full_end)
        ends = (full_end, end)
        for run in tl.static_range(2 if BLOCK_SIZE < BLOCK_N else 1):
            acc, row_max, row_sum = attend_tiles(
                acc,
                row_max,
                row_sum,
                q,
                positions,
                k_ptr + kv_head * stride_cache_head,
                v_ptr + kv_head * stride_cache_head,
                k_scales,
                v_scales,
                block_table_ptr + table_row * stride_table,
                first_tiles[run],
                start,
                ends[run],
                score_scale,
                softcap,
                stride_cache_block,
                stride_cache_token,
                stride_scales,
                IS_MASKED=run == 1,
                WINDOW=0,
                CHUNK=0,
                HAS_SOFTCAP=HAS_SOFTCAP,
                HEAD_DIM=HEAD_DIM,
                BLOCK_D=BLOCK_D,
                BLOCK_N=BLOCK_N,
                BLOCK_SIZE=BLOCK_SIZE,
            )
        places = tl.load(places_ptr + seqs, mask=is_row, other=0).to(tl.int64) + part
        partial_ptrs = partial_ptr + (places * num_q_heads + heads)[:, None] * HEAD_DIM
        tl.store(partial_ptrs + columns[None, :], acc, mask=mask)
        stats_ptrs = stats_ptr + places * (2 * num_q_heads) + heads
        tl.store(stats_ptrs, row_max, mask=is_row)
        tl.store(stats_ptrs + num_q_heads, row_sum, mask=is_row)


def attend_shared_prefixes(
    q: torch.Tensor,
    k_cache: KVTensor,
    v_cache: KVTensor,
    metadata: AttentionMetadata,
    plan: DecodePlan,
    partial: torch.Tensor,
    stats: torch.Tensor,
    score_scale: float,
    softcap: float,
    tiles: PrefixTiles,
) -> None:
    """Partial sums of all groups of `metadata.shared_prefixes`, into the members' places.

    Args:
        q: [B, Hq, D].
        k_cache: [N, block_size, Hkv, D].
        v_cache: Likewise, with the same strides.
        metadata: Layout of the batch, with groups.
        plan: Made for them.
        partial: [places, Hq, D] float32, written.
        stats: [places, 2, Hq] float32, written.
        score_scale: See `attention_tiles.score_factors`.
        softcap: Likewise; 0 for none.
        tiles: Launch shape.
    """
    assert metadata.shared_prefixes is not None, "no groups"
    num_q_heads, head_dim = q.shape[1:]
    block_size, num_kv_heads = k_cache.shape[1:3]
    (keys, k_scales), (values, v_scales) = parts_of(k_cache), parts_of(v_cache)
    num_programs = num_multiprocessors(q.device) * tiles.programs_per_processor
    _prefix_kernel[(num_programs,)](
        q,
        keys,
        values,
        k_scales,
        v_scales,
        metadata.block_table,
        plan.prefix_items,
        metadata.shared_prefixes.members,
        plan.places,
        partial,
        stats,
        score_scale,
        softcap,
        q.stride(0),
        q.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        0 if k_scales is None else k_scales.stride(0),
        metadata.block_table.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_q_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        HAS_SOFTCAP=softcap != 0.0,
        STARTS_NEXT=starts_kernels_early(q.device),
        ITEM=ITEM,
        BLOCK_M=tiles.block_m,
        BLOCK_D=max(triton.next_power_of_2(head_dim), 16),
        BLOCK_N=tiles.block_n,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
        maxnreg=tiles.max_registers,
    )
