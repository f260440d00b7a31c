"""Attention of decoding sequences: one query token each, keys split over programs.

    out[b, h] = softmax_j(q[b, h] k[j, h / group] scale) v[j, h / group],  j < seq_lens[b]

FlashDecoding (Dao et al., 2023) with a work list:

    decode_plan    grid (1,)         seq_lens -> items (sequence, keys); once per step
    _split_kernel  grid (programs,)  works through the list: one item of one KV head at a time
    decode_merge   grid (B, Hkv)     joins the splits of sequences that have several

| argument        | shape, dtype                          | duty                                   |
|-----------------|---------------------------------------|----------------------------------------|
| q_ptr           | [B, Hq, D] bf16, fp16 or fp32         | stride 1 along D                       |
| k_ptr, v_ptr    | [N, block_size, Hkv, D], same dtype   | equal strides, 1 along D               |
| block_table_ptr | [rows, max_blocks] int32              | stride 1 along blocks                  |
| items_ptr       | int32                                 | see `decode_plan`                      |
| partial_ptr     | [places, Hq, D] fp32                  | unnormalised sums of each split        |
| stats_ptr       | [places, 2, Hq] fp32                  | maximum and sum of each split          |
| arrivals_ptr    | [B * Hkv] int32                       | splits that are done; zero between     |
|                 |                                       | launches                               |
| out_ptr         | [B, Hq * D], q's dtype                | stride 1; sequences that are not       |
|                 |                                       | planned are not written                |

Programs are as many as fit the device, not as many as there are splits, so nothing depends on the
longest sequence a graph may meet. Neighbouring programs take the KV heads of one item, whose rows
are adjacent in memory.

A program runs through the tiles of all its items in one loop: the keys of the next item are on
their way while the sums of this one are stored or merged. (A loop per item cost some 5 us for each
of them on an H100, in which nothing was in flight.) What the loads ahead follow from is chosen by
selection instead of branches, an item and a block id early; a branch would end the pipeline there.

With `merge_here` the program that finishes a sequence's last split joins them all: it alone sees
the count reach the number of splits, after a barrier of its threads and an acquire; the sums are
read past the first-level cache. It sets the count back to zero for the next layer. Whichever
program it is, it adds in the order of the splits: the same bits every time. Otherwise
`merge_kernel` does.

With `use_pdl` programs start while the kernel before is ending, and wait for it.

The query heads of one KV head are the rows of one tile, padded to 16 for the tensor cores: the
keys are read once for all of them, and padding rows cost nothing where bandwidth is the limit.

Numerics: see `attention_tiles`; partial sums are fp32. All offsets that multiply a stride are
int64. constexpr: everything that is fixed per model. Batch size, list length and the number of
programs are not specialised: no step compiles a kernel.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from engine.kernels.attention_tiles import (
    KEY_ALIGNMENT,
    follow_kernel_before,
    load_block_ids,
    num_multiprocessors,
    score_factors,
    softmax_step,
)
from engine.kernels.compile_ahead import launchable
from engine.kernels.decode_merge import merge_kernel, merge_splits
from engine.kernels.decode_plan import HEADER, ITEM, SplitLayout, plan_decode
from engine.kernels.metadata import AttentionMetadata
from engine.kernels.shared_prefix import PrefixTiles, attend_shared_prefixes, prefix_tiles

# Elements of partial sums that one round of a merge may hold in registers.
_MAX_MERGE_ELEMENTS = 4096


@dataclass(frozen=True)
class DecodeTiles:
    """Launch shape of `_split_kernel`, and what its results depend on.

    Attributes:
        block_n: Keys per tile.
        num_stages: Tiles of keys in flight, plus one.
        num_warps: Warps per program.
        programs_per_processor: Programs that share a multiprocessor.
        split: Keys per split, a multiple of 64 and of block_n.
        max_splits: Most splits of a sequence, a power of two.
        merge_splits: Splits that one round of a merge reads.
        max_registers: Of a thread; None for as many as the compiler likes.
        merge_here: Merge in the split kernel instead of a second one.
        use_pdl: Programs start before the kernel before them ends, and wait for it.
    """

    block_n: int
    num_stages: int
    num_warps: int
    programs_per_processor: int
    split: int = 256
    max_splits: int = 32
    merge_splits: int = 4
    max_registers: int | None = None
    merge_here: bool = False
    use_pdl: bool = False

    @property
    def layout(self) -> SplitLayout:
        """How sequences are cut."""
        return SplitLayout(self.split, self.max_splits, max(self.block_n, KEY_ALIGNMENT))


def decode_tiles(dtype: torch.dtype, head_dim: int) -> DecodeTiles:
    """Tiles for a dtype and head size.

    Programs per processor are as many as its 227 KiB of shared memory and 64 Ki registers hold,
    read off the compiler (triton 3.6, sm_90): 80 KiB and 155 registers at head_dim 128, 40 KiB and
    128 registers (146 unbounded) at 64. Programs beyond those would run after all others. Not yet
    timed in this form: docs/KERNELS.md says what to check first.
    """
    if dtype == torch.float32:
        return DecodeTiles(32, 2, 4, 2)
    if head_dim > 128:
        return DecodeTiles(32, 3, 4, 2)
    if head_dim > 64:
        return DecodeTiles(64, 3, 4, 2)
    return DecodeTiles(64, 3, 4, 4, max_registers=128)


@triton.jit
def _load_item(items_ptr, index, is_read, HEADER: tl.constexpr, ITEM: tl.constexpr):
    item_ptr = items_ptr + HEADER + index * ITEM
    return (
        tl.load(item_ptr, mask=is_read, other=0),
        tl.load(item_ptr + 1, mask=is_read, other=0),
        tl.load(item_ptr + 2, mask=is_read, other=0),
        tl.load(item_ptr + 3, mask=is_read, other=0),
        tl.load(item_ptr + 4, mask=is_read, other=0),
        tl.load(item_ptr + 5, mask=is_read, other=0),
        tl.load(item_ptr + 6, mask=is_read, other=0),
        tl.load(item_ptr + 7, mask=is_read, other=0),
    )


@triton.jit
def _choose_item(condition, a, b):
    return (
        tl.where(condition, a[0], b[0]),
        tl.where(condition, a[1], b[1]),
        tl.where(condition, a[2], b[2]),
        tl.where(condition, a[3], b[3]),
        tl.where(condition, a[4], b[4]),
        tl.where(condition, a[5], b[5]),
        tl.where(condition, a[6], b[6]),
        tl.where(condition, a[7], b[7]),
    )


@triton.jit
def _count_tiles(
    items_ptr,
    num_works,
    NUM_KV_HEADS: tl.constexpr,
    HEADER: tl.constexpr,
    ITEM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Tiles of all items of this program; an item without keys counts as one."""
    num_programs = tl.num_programs(0)
    num_tiles = 0
    for base in range(tl.program_id(0), num_works, num_programs * BLOCK):
        works = base + tl.arange(0, BLOCK) * num_programs
        is_work = works < num_works
        item_ptrs = items_ptr + HEADER + works // NUM_KV_HEADS * ITEM
        start = tl.load(item_ptrs + 2, mask=is_work, other=0)
        end = tl.load(item_ptrs + 3, mask=is_work, other=0)
        tiles = tl.maximum(tl.cdiv(end - start, BLOCK_N), 1)
        num_tiles += tl.sum(tl.where(is_work, tiles, 0), axis=0)
    return num_tiles


@triton.jit
def _await_threads():
    """`tl.debug_barrier`, which would end the pipelining of the loop around it, as assembly.

    The interpreter has neither threads nor assembly.
    """
    tl.inline_asm_elementwise(
        "bar.sync 0; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@launchable
@triton.jit
def _split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    block_table_ptr,
    items_ptr,
    partial_ptr,
    stats_ptr,
    arrivals_ptr,
    out_ptr,
    score_scale,
    softcap,
    stride_q_token,
    stride_q_head,
    stride_cache_block,
    stride_cache_token,
    stride_cache_head,
    stride_table,
    stride_out,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    HEADER: tl.constexpr,
    ITEM: tl.constexpr,
    MERGE_HERE: tl.constexpr,
    USE_PDL: tl.constexpr,
    HAS_THREADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    if USE_PDL:
        follow_kernel_before()
    num_q_heads: tl.constexpr = NUM_KV_HEADS * GROUP
    num_programs = tl.num_programs(0)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    in_tile = tl.arange(0, BLOCK_N)
    is_row = rows < GROUP
    is_column = (columns < HEAD_DIM)[None, :]
    mask = is_row[:, None] & is_column

    # The list has room for an item per program, whatever its length; what lies there is not used.
    work = tl.program_id(0)
    num_works = tl.load(items_ptr) * NUM_KV_HEADS
    item = _load_item(items_ptr, work // NUM_KV_HEADS, work >= 0, HEADER, ITEM)
    num_tiles = tl.where(work < num_works, tl.maximum(tl.cdiv(item[3] - item[2], BLOCK_N), 1), 0)
    if num_works > num_programs:
        num_tiles = _count_tiles(items_ptr, num_works, NUM_KV_HEADS, HEADER, ITEM, BLOCK_N, 64)
    next_work = work + num_programs
    is_work = next_work < num_works
    next_item = _load_item(items_ptr, next_work // NUM_KV_HEADS, is_work, HEADER, ITEM)
    tile = tl.where(work < num_works, item[2], 0)
    table_ptr = block_table_ptr + item[1].to(tl.int64) * stride_table
    end = tl.where(work < num_works, item[3], 0)
    block_ids = load_block_ids(table_ptr, tile, end, BLOCK_N, BLOCK_SIZE)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for _ in range(num_tiles):
        seq, _row, _start, end, first_place, split, splits, seq_len = item
        seq = seq.to(tl.int64)
        kv_head = work % NUM_KV_HEADS
        heads = kv_head * GROUP + rows
        keys = tile + in_tile
        visible = keys < end
        if WINDOW > 0:
            visible = visible & (keys >= seq_len - WINDOW)
        places = (
            block_ids.to(tl.int64) * stride_cache_block + (keys % BLOCK_SIZE) * stride_cache_token
        )
        places = (places + kv_head * stride_cache_head)[:, None] + columns[None, :]
        is_last = tile + BLOCK_N >= end

        q_ptrs = q_ptr + seq * stride_q_token + (heads * stride_q_head)[:, None]
        q = tl.load(q_ptrs + columns[None, :], mask=mask, other=0.0)
        k = tl.load(k_ptr + places, mask=visible[:, None] & is_column, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        probs, acc, row_max, row_sum = softmax_step(
            scores,
            visible[None, :],
            acc,
            row_max,
            row_sum,
            score_scale,
            softcap,
            IS_MASKED=True,
            HAS_SOFTCAP=HAS_SOFTCAP,
        )
        v = tl.load(v_ptr + places, mask=visible[:, None] & is_column, other=0.0)
        acc = tl.dot(probs.to(v.dtype), v, acc, input_precision="ieee")

        if is_last:
            out_row_ptr = out_ptr + seq * stride_out
            num_splits = splits % 256
            if num_splits == 1:
                # A padding row has no keys: sum 0, output 0.
                mixed = acc / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]
                out_ptrs = out_row_ptr + (heads * HEAD_DIM)[:, None] + columns[None, :]
                tl.store(out_ptrs, mixed.to(out_ptr.dtype.element_ty), mask=mask)
            else:
                place = first_place.to(tl.int64) + split
                partial_ptrs = partial_ptr + (place * num_q_heads + heads)[:, None] * HEAD_DIM
                tl.store(partial_ptrs + columns[None, :], acc, mask=mask)
                stats_ptrs = stats_ptr + place * (2 * num_q_heads) + heads
                tl.store(stats_ptrs, row_max, mask=is_row)
                tl.store(stats_ptrs + num_q_heads, row_sum, mask=is_row)
                if MERGE_HERE:
                    arrival_ptr = arrivals_ptr + seq * NUM_KV_HEADS + kv_head
                    num_before = num_splits - splits // 256 - 1
                    if HAS_THREADS:
                        _await_threads()
                    if tl.atomic_add(arrival_ptr, 1, sem="acq_rel") == num_before:
                        tl.store(arrival_ptr, 0)
                        merge_splits(
                            partial_ptr,
                            stats_ptr,
                            out_row_ptr,
                            first_place.to(tl.int64),
                            num_splits,
                            kv_head,
                            NUM_KV_HEADS,
                            GROUP,
                            HEAD_DIM,
                            MAX_SPLITS,
                            BLOCK_G,
                            BLOCK_D,
                            BLOCK_S,
                        )
        acc = tl.where(is_last, 0.0, acc)
        row_max = tl.where(is_last, float("-inf"), row_max)
        row_sum = tl.where(is_last, 0.0, row_sum)

        # By selection, not by branches: the loads of tiles ahead follow from these numbers.
        tile = tl.where(is_last, next_item[2], tile + BLOCK_N)
        work = tl.where(is_last, next_work, work)
        item = _choose_item(is_last, next_item, item)
        next_work = work + num_programs
        is_work = is_last & (next_work < num_works)
        loaded = _load_item(items_ptr, next_work // NUM_KV_HEADS, is_work, HEADER, ITEM)
        next_item = _choose_item(is_last, loaded, next_item)
        table_ptr = block_table_ptr + item[1].to(tl.int64) * stride_table
        block_ids = load_block_ids(table_ptr, tile, item[3], BLOCK_N, BLOCK_SIZE)


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    metadata: AttentionMetadata,
    out: torch.Tensor,
    *,
    softmax_scale: float,
    sliding_window: int | None,
    logit_softcap: float,
    tiles: DecodeTiles | None = None,
    tiles_of_prefixes: PrefixTiles | None = None,
) -> None:
    """Attention of the leading `metadata.num_decodes` sequences, or `device_counts[0]` of them.

    Args:
        q: [num_decodes, Hq, D].
        k_cache: [N, block_size, Hkv, D]; block_size a power of two.
        v_cache: Likewise, with the same strides.
        metadata: Layout of the batch.
        out: [num_decodes, Hq * D], written in place; zero where `seq_lens` is 0, and untouched
            from row `device_counts[0]` on.
        softmax_scale: Factor of the scores.
        sliding_window: Tokens a position sees, itself included; None for all.
        logit_softcap: Bound of the scores; 0 for none.
        tiles: Launch shape; default `decode_tiles`.
        tiles_of_prefixes: Launch shape for shared prefixes; default `prefix_tiles`.
    """
    num_seqs, num_q_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = num_q_heads // num_kv_heads
    tiles = tiles or decode_tiles(q.dtype, head_dim)
    tiles_of_prefixes = tiles_of_prefixes or prefix_tiles(q.dtype, head_dim)
    layout, prefix_layout = tiles.layout, tiles_of_prefixes.layout
    heads = (num_q_heads, num_kv_heads)
    plan = metadata.once_per_step(
        ("decode plan", sliding_window, heads, num_seqs, layout, prefix_layout),
        lambda: plan_decode(metadata, num_seqs, *heads, sliding_window, layout, prefix_layout),
    )
    num_places = num_seqs * layout.max_splits
    partial, stats = (
        torch.empty((num_places, *shape), dtype=torch.float32, device=q.device)
        for shape in ((num_q_heads, head_dim), (2, num_q_heads))
    )
    score_scale, softcap = score_factors(softmax_scale, logit_softcap)
    num_programs = min(
        num_places * num_kv_heads,
        num_multiprocessors(q.device) * tiles.programs_per_processor,
    )
    use_pdl = tiles.use_pdl and q.is_cuda
    block_d = max(triton.next_power_of_2(head_dim), 16)
    block_g = triton.next_power_of_2(group)
    merge: dict[str, Any] = {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "MAX_SPLITS": layout.max_splits,
        "BLOCK_G": block_g,
        "BLOCK_D": block_d,
        "BLOCK_S": min(tiles.merge_splits, max(1, _MAX_MERGE_ELEMENTS // (block_g * block_d))),
    }
    if plan.prefix_items is not None:
        attend_shared_prefixes(
            q,
            k_cache,
            v_cache,
            metadata,
            plan,
            partial,
            stats,
            score_scale,
            softcap,
            tiles_of_prefixes,
        )
    _split_kernel[(num_programs,)](
        q,
        k_cache,
        v_cache,
        metadata.block_table,
        plan.items,
        partial,
        stats,
        plan.arrivals,
        out,
        score_scale,
        softcap,
        q.stride(0),
        q.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        metadata.block_table.stride(0),
        out.stride(0),
        **merge,
        BLOCK_SIZE=block_size,
        WINDOW=sliding_window or 0,
        HAS_SOFTCAP=logit_softcap != 0.0,
        HEADER=HEADER,
        ITEM=ITEM,
        MERGE_HERE=tiles.merge_here,
        USE_PDL=use_pdl,
        HAS_THREADS=q.is_cuda,
        BLOCK_M=max(16, block_g),
        BLOCK_N=tiles.block_n,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
        maxnreg=tiles.max_registers,
        launch_pdl=use_pdl,
    )
    if not tiles.merge_here:
        merge_kernel[(num_seqs, num_kv_heads)](
            plan.places,
            metadata.device_counts,
            partial,
            stats,
            out,
            out.stride(0),
            **merge,
            USE_PDL=use_pdl,
            num_warps=4,
            enable_fp_fusion=True,
            launch_pdl=use_pdl,
        )
