"""Attention of decoding sequences: one query token each, keys split over programs.

    out[b, h] = softmax_j(q[b, h] k[j, h / group] scale) v[j, h / group],  j < seq_lens[b]

FlashDecoding (Dao et al., 2023) with a work list:

    decode_plan    grid (1,)         seq_lens -> items (sequence, keys); once per step
    _split_kernel  grid (programs,)  works through the list: one item of one KV head at a time
    _merge_kernel  grid (B, Hkv)     joins the splits of sequences that have several

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
are adjacent in memory. With MERGE_HERE the program that finishes a sequence's last split joins
them all: it alone sees the count reach the number of splits, after a barrier of its threads and an
acquire; the sums are read past the first-level cache. It sets the count back to zero for the next
layer. Whichever program it is, it adds in the order of the splits: the same bits every time.

The query heads of one KV head are the rows of one tile, padded to 16 for the tensor cores: the
keys are read once for all of them, and padding rows cost nothing where bandwidth is the limit.
Only the last tile of a sequence is masked (every tile under a sliding window).

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
    attend_tiles,
    follow_kernel_before,
    num_multiprocessors,
    score_factors,
)
from engine.kernels.decode_plan import HEADER, ITEM, SplitLayout, plan_decode
from engine.kernels.metadata import AttentionMetadata
from engine.kernels.rope_write_kv import rotated_heads
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
    merge_here: bool = False
    use_pdl: bool = False

    @property
    def layout(self) -> SplitLayout:
        """How sequences are cut."""
        return SplitLayout(self.split, self.max_splits, max(self.block_n, KEY_ALIGNMENT))


def decode_tiles(dtype: torch.dtype, head_dim: int) -> DecodeTiles:
    """Tiles for a dtype and head size.

    Programs per processor are as many as its 227 KiB of shared memory and 64 Ki registers hold,
    read off the compiler (triton 3.9, sm_90): 70 KiB and 128 registers at head_dim 128, 36 KiB
    and 96 registers at 64.
    """
    if dtype == torch.float32:
        return DecodeTiles(32, 2, 4, 2)
    if head_dim > 128:
        return DecodeTiles(32, 3, 4, 3)
    return DecodeTiles(64, 3, 4, 3 if head_dim > 64 else 5)


@triton.jit
def _merge_splits(
    partial_ptr,
    stats_ptr,
    out_row_ptr,
    first_place,
    num_splits,
    kv_head,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Join the splits of one sequence and KV head, in their order."""
    num_q_heads: tl.constexpr = NUM_KV_HEADS * GROUP
    members = tl.arange(0, BLOCK_G)
    columns = tl.arange(0, BLOCK_D)
    splits = tl.arange(0, MAX_SPLITS)
    is_member = members < GROUP
    is_column = columns < HEAD_DIM
    heads = kv_head * GROUP + members
    stats_ptrs = stats_ptr + (first_place + splits)[:, None] * (2 * num_q_heads) + heads[None, :]
    is_stat = (splits < num_splits)[:, None] & is_member[None, :]
    maxima = tl.load(stats_ptrs, mask=is_stat, other=float("-inf"), cache_modifier=".cg")
    sums = tl.load(stats_ptrs + num_q_heads, mask=is_stat, other=0.0, cache_modifier=".cg")
    # Rows of padding heads have no maximum; 0 keeps NaN out of them.
    highest = tl.where(is_member, tl.max(maxima, axis=0), 0.0)
    total = tl.sum(sums * tl.exp2(maxima - highest[None, :]), axis=0)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for base in tl.range(0, num_splits, BLOCK_S, num_stages=1):
        part = base + tl.arange(0, BLOCK_S)
        is_part = part < num_splits
        places = first_place + part
        weights = tl.load(
            stats_ptr + places[:, None] * (2 * num_q_heads) + heads[None, :],
            mask=is_part[:, None] & is_member[None, :],
            other=float("-inf"),
            cache_modifier=".cg",
        )
        rows = places[:, None] * num_q_heads + heads[None, :]
        partial = tl.load(
            partial_ptr + rows[:, :, None] * HEAD_DIM + columns[None, None, :],
            mask=is_part[:, None, None] & (is_member[:, None] & is_column[None, :])[None, :, :],
            other=0.0,
            cache_modifier=".cg",
        )
        acc += tl.sum(partial * tl.exp2(weights - highest[None, :])[:, :, None], axis=0)
    mixed = acc / tl.where(is_member, total, 1.0)[:, None]
    out_ptrs = out_row_ptr + (heads * HEAD_DIM)[:, None] + columns[None, :]
    mask = is_member[:, None] & is_column[None, :]
    tl.store(out_ptrs, mixed.to(out_row_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_item(items_ptr, index, HEADER: tl.constexpr, ITEM: tl.constexpr):
    item_ptr = items_ptr + HEADER + index * ITEM
    return (
        tl.load(item_ptr),
        tl.load(item_ptr + 1),
        tl.load(item_ptr + 2),
        tl.load(item_ptr + 3),
        tl.load(item_ptr + 4),
        tl.load(item_ptr + 5),
        tl.load(item_ptr + 6),
        tl.load(item_ptr + 7),
    )


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
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    q_norm_weight_ptr,
    k_norm_weight_ptr,
    norm_eps,
    norm_weight_offset,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_NEW_TOKENS: tl.constexpr,
    HALF_ROT: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    HAS_NORM_OFFSET: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    HEADER: tl.constexpr,
    ITEM: tl.constexpr,
    MERGE_HERE: tl.constexpr,
    USE_PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    if USE_PDL:
        follow_kernel_before()
    num_q_heads: tl.constexpr = NUM_KV_HEADS * GROUP
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    is_row = rows < GROUP
    mask = is_row[:, None] & (columns < HEAD_DIM)[None, :]
    # The numbers of an item are loaded while the one before it is computed; those of the first
    # together with the length of the list, of whose room there is at least one item per program.
    num_programs = tl.num_programs(0)
    num_items = tl.load(items_ptr) * NUM_KV_HEADS
    next_item = _load_item(items_ptr, tl.program_id(0) // NUM_KV_HEADS, HEADER, ITEM)
    for work in range(tl.program_id(0), num_items, num_programs):
        seq, table_row, start, end, first_place, split, splits, seq_len = next_item
        next_work = tl.minimum(work + num_programs, num_items - 1)
        next_item = _load_item(items_ptr, next_work // NUM_KV_HEADS, HEADER, ITEM)
        kv_head = work % NUM_KV_HEADS
        seq = seq.to(tl.int64)
        table_row = table_row.to(tl.int64)
        first_place = first_place.to(tl.int64)
        num_splits = splits % 256
        low = start
        if WINDOW > 0:
            low = tl.maximum(seq_len - WINDOW, 0)
        heads = kv_head * GROUP + rows
        token_ptr = q_ptr + seq * stride_q_token
        if HAS_NEW_TOKENS:
            # Rows of the tile behind the query heads have room for the new key and value.
            is_k = rows == GROUP
            is_v = rows == GROUP + 1
            slot = tl.load(slots_ptr + seq)
            new_heads = num_q_heads + kv_head + tl.where(is_v, NUM_KV_HEADS, 0)
            x = rotated_heads(
                token_ptr,
                cos_sin_ptr,
                positions_ptr + seq,
                q_norm_weight_ptr,
                k_norm_weight_ptr,
                norm_eps,
                norm_weight_offset,
                slot,
                tl.where(is_row, heads, new_heads),
                is_row,
                is_k,
                is_v,
                HEAD_DIM,
                HALF_ROT,
                HAS_Q_NORM,
                HAS_K_NORM,
                HAS_NORM_OFFSET,
                BLOCK_M,
                BLOCK_D,
            ).to(k_ptr.dtype.element_ty)
            q = tl.where(is_row[:, None], x, 0.0)
            if (end == seq_len) & (slot >= 0):
                place = (slot // BLOCK_SIZE) * stride_cache_block
                place += (slot % BLOCK_SIZE) * stride_cache_token + kv_head * stride_cache_head
                new_ptrs = place + rows[:, None] * 0 + columns[None, :]
                is_column = (columns < HEAD_DIM)[None, :]
                tl.store(k_ptr + new_ptrs, x, mask=is_k[:, None] & is_column)
                tl.store(v_ptr + new_ptrs, x, mask=is_v[:, None] & is_column)
            # This program's own loads of the last tile come after every thread's stores.
            tl.debug_barrier()
        else:
            q_ptrs = token_ptr + (heads * stride_q_head)[:, None]
            q = tl.load(q_ptrs + columns[None, :], mask=mask, other=0.0)
        positions = tl.zeros([BLOCK_M], tl.int32) + (seq_len - 1)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        full_end = start
        if WINDOW == 0:
            full_end = start + (end - start) // BLOCK_N * BLOCK_N
            acc, row_max, row_sum = attend_tiles(
                acc,
                row_max,
                row_sum,
                q,
                positions,
                k_ptr + kv_head * stride_cache_head,
                v_ptr + kv_head * stride_cache_head,
                block_table_ptr + table_row * stride_table,
                start,
                low,
                full_end,
                score_scale,
                softcap,
                stride_cache_block,
                stride_cache_token,
                IS_MASKED=False,
                WINDOW=WINDOW,
                HAS_SOFTCAP=HAS_SOFTCAP,
                HEAD_DIM=HEAD_DIM,
                BLOCK_D=BLOCK_D,
                BLOCK_N=BLOCK_N,
                BLOCK_SIZE=BLOCK_SIZE,
            )
        acc, row_max, row_sum = attend_tiles(
            acc,
            row_max,
            row_sum,
            q,
            positions,
            k_ptr + kv_head * stride_cache_head,
            v_ptr + kv_head * stride_cache_head,
            block_table_ptr + table_row * stride_table,
            full_end,
            low,
            end,
            score_scale,
            softcap,
            stride_cache_block,
            stride_cache_token,
            IS_MASKED=True,
            WINDOW=WINDOW,
            HAS_SOFTCAP=HAS_SOFTCAP,
            HEAD_DIM=HEAD_DIM,
            BLOCK_D=BLOCK_D,
            BLOCK_N=BLOCK_N,
            BLOCK_SIZE=BLOCK_SIZE,
        )
        out_row_ptr = out_ptr + seq * stride_out
        if num_splits == 1:
            # A padding row has no keys: sum 0, output 0.
            mixed = acc / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]
            out_ptrs = out_row_ptr + (heads * HEAD_DIM)[:, None] + columns[None, :]
            tl.store(out_ptrs, mixed.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            place = first_place + split
            partial_ptrs = partial_ptr + (place * num_q_heads + heads)[:, None] * HEAD_DIM
            tl.store(partial_ptrs + columns[None, :], acc, mask=mask)
            stats_ptrs = stats_ptr + place * (2 * num_q_heads) + heads
            tl.store(stats_ptrs, row_max, mask=is_row)
            tl.store(stats_ptrs + num_q_heads, row_sum, mask=is_row)
            if MERGE_HERE:
                arrival_ptr = arrivals_ptr + seq * NUM_KV_HEADS + kv_head
                tl.debug_barrier()
                num_before = num_splits - splits // 256 - 1
                if tl.atomic_add(arrival_ptr, 1, sem="acq_rel") == num_before:
                    tl.store(arrival_ptr, 0)
                    _merge_splits(
                        partial_ptr,
                        stats_ptr,
                        out_row_ptr,
                        first_place,
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


@triton.jit
def _merge_kernel(
    places_ptr,
    counts_ptr,
    partial_ptr,
    stats_ptr,
    out_ptr,
    stride_out,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    num_planned = seq + 1
    if counts_ptr is not None:
        num_planned = tl.load(counts_ptr).to(tl.int64)
    if seq < num_planned:
        num_splits = tl.load(places_ptr + seq * 2 + 1)
        if num_splits > 1:
            _merge_splits(
                partial_ptr,
                stats_ptr,
                out_ptr + seq * stride_out,
                tl.load(places_ptr + seq * 2).to(tl.int64),
                num_splits,
                tl.program_id(1),
                NUM_KV_HEADS,
                GROUP,
                HEAD_DIM,
                MAX_SPLITS,
                BLOCK_G,
                BLOCK_D,
                BLOCK_S,
            )


@dataclass(frozen=True)
class NewTokens:
    """What `rope_write_kv` takes besides qkv: see `reference.rope_write_kv`."""

    cos_sin: torch.Tensor | None
    q_norm_weight: torch.Tensor | None = None
    k_norm_weight: torch.Tensor | None = None
    norm_eps: float = 1e-6
    norm_weight_offset: float = 0.0


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
    new_tokens: NewTokens | None = None,
) -> None:
    """Attention of the leading `metadata.num_decodes` sequences, or `device_counts[0]` of them.

    Args:
        q: [num_decodes, Hq, D]; with `new_tokens` [num_decodes, Hq + 2 Hkv, D], not yet rotated.
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
        new_tokens: Rotate q and k, and store k and v, as `rope_write_kv` does before.
    """
    num_seqs, num_q_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    if new_tokens is not None:
        assert metadata.shared_prefixes is None, "prefixes are read before new tokens are rotated"
        num_q_heads -= 2 * num_kv_heads
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
    new = new_tokens or NewTokens(None)
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
        new.cos_sin,
        metadata.positions,
        metadata.slot_mapping,
        new.q_norm_weight,
        new.k_norm_weight,
        new.norm_eps,
        new.norm_weight_offset,
        **merge,
        BLOCK_SIZE=block_size,
        HAS_NEW_TOKENS=new_tokens is not None,
        HALF_ROT=0 if new.cos_sin is None else new.cos_sin.shape[-1],
        HAS_Q_NORM=new.q_norm_weight is not None,
        HAS_K_NORM=new.k_norm_weight is not None,
        HAS_NORM_OFFSET=new.norm_weight_offset != 0.0,
        WINDOW=sliding_window or 0,
        HAS_SOFTCAP=logit_softcap != 0.0,
        HEADER=HEADER,
        ITEM=ITEM,
        MERGE_HERE=tiles.merge_here,
        USE_PDL=use_pdl,
        BLOCK_M=max(16, triton.next_power_of_2(group + 2 if new_tokens else group)),
        BLOCK_N=tiles.block_n,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
        launch_pdl=use_pdl,
    )
    if not tiles.merge_here:
        _merge_kernel[(num_seqs, num_kv_heads)](
            plan.places,
            metadata.device_counts,
            partial,
            stats,
            out,
            out.stride(0),
            **merge,
            num_warps=4,
            enable_fp_fusion=True,
        )
