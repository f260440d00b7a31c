"""Prefill attention on Hopper (sm_90): copies by TMA, warp specialisation, overlapped products.

The formula, the packing of query heads and the list of (tile, KV head) are those of
`prefill_attention`, which hands over what this kernel can do: 16 bit, head_dim 64 and 128, no
window, no soft-cap.

| argument            | shape, dtype                       | duty                                  |
|---------------------|------------------------------------|---------------------------------------|
| q_ptr               | [T, Hq, D] bf16 or fp16            | stride 1 along D                      |
| k_desc, v_desc      | [N * block_size, Hkv * D], q's     | TMA descriptors; boxes of one block   |
|                     | dtype                              | (64 tokens at most) and 64 columns    |
| block_table_ptr     | [rows, max_blocks] int32           | stride 1 along blocks                 |
| block_rows_ptr      | [B] int64                          | row of the table; None: b has b       |
| seq_lens_ptr        | [B] int32                          | KV length after the step              |
| query_start_loc_ptr | [B + 1] int32                      | first row of q of each sequence       |
| counts_ptr          | [2] int32                          | decoding and all sequences; None:     |
|                     |                                    | num_decodes, num_seqs                 |
| out_ptr             | [T, Hq * D], q's dtype             | stride 1; rows of no sequence are not |
|                     |                                    | written                               |

Grid (programs,). A program has three roles, which walk the same items:

    loader      1 warp    block table -> TMA of keys and values into rings of STAGES tiles
    consumers   4 warps   64 rows of the tile each, all keys of the tile

    ring slot:  loader waits `empty`, arms `full` with the bytes and copies; a consumer waits for
                `full`, multiplies and arrives at `empty`, which counts one arrival per consumer

A consumer has two products in flight, q k^T of the next keys and p v of the last ones; the softmax
of the former overlaps the latter, and the products of the other consumer. That is FlashAttention 3
(Shah et al., arXiv 2407.08608), written in Gluon, the lower layer of Triton.

Numerics: fp32 scores and sums, p rounded to the dtype for the product, keys in order from key 0,
BLOCK_N at a time: a token's bits depend on the keys it sees alone. Whole blocks are copied: keys
after a query are masked; values after the sequence's end are stale, perhaps NaN, and zeroed in
shared memory before the last product. Row offsets are int64, rows of the descriptors int32.
constexpr: what is fixed per model; token and sequence counts are not specialised.
"""

# Kernels annotate their compile-time parameters only; the rest are Gluon values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from engine.kernels.attention_tiles import LOG2_E, num_multiprocessors
from engine.kernels.metadata import AttentionMetadata
from engine.kernels.prefill_roles import attend, load

_BOX_COLUMNS = 64  # 128 bytes, the widest swizzle

# Registers of a thread: at the launch, then of consumers and loader. The loader's warp group has
# three idle warps; the first consumer gets what the others leave of 3 * 168.
MAX_REGISTERS = 168
_CONSUMER_REGISTERS = gl.constexpr(240)
_LOADER_REGISTERS = gl.constexpr(24)


@dataclass(frozen=True)
class HopperTiles:
    """Launch shape: rows of each of the two consumers, keys per tile, tiles in each ring."""

    rows: int
    block_n: int
    stages: int


def hopper_tiles(head_dim: int) -> HopperTiles:
    """Tiles for a head size."""
    return HopperTiles(64, 128, 2 if head_dim > 64 else 3)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def can_attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    sliding_window: int | None,
    logit_softcap: float,
) -> bool:
    """Whether the kernel serves such a layer; depends on the model and its caches alone."""
    _, block_size, num_kv_heads, head_dim = k_cache.shape
    row = num_kv_heads * head_dim
    return (
        _is_hopper(q.device)
        and q.dtype in (torch.bfloat16, torch.float16)
        and head_dim in (64, 128)
        and block_size >= 16
        and q.shape[1] // num_kv_heads <= 128
        and sliding_window is None
        and not logit_softcap
        and k_cache.stride() == v_cache.stride() == (block_size * row, row, head_dim, 1)
        and k_cache.data_ptr() % 16 == v_cache.data_ptr() % 16 == 0
    )


@gluon.jit(do_not_specialize=["num_decodes", "num_seqs"])
def _prefill_hopper_kernel(
    q_ptr,
    k_desc,
    v_desc,
    block_table_ptr,
    block_rows_ptr,
    seq_lens_ptr,
    query_start_loc_ptr,
    counts_ptr,
    out_ptr,
    num_decodes,
    num_seqs,
    score_scale,
    stride_q_token,
    stride_q_head,
    stride_table,
    stride_out,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    HAS_BLOCK_ROWS: gl.constexpr,
    HAS_COUNTS: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    tile_of: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    bar_of: gl.constexpr = mbarrier.MBarrierLayout()
    q_ring = gl.allocate_shared_memory(dtype, [2, ROWS, HEAD_DIM], tile_of)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], tile_of)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], tile_of)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_of)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_of)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_of)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_of)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    rings = (q_ring, k_ring, v_ring)
    bars = (k_full, k_empty, v_full, v_empty)
    # Tuples with constants are written out: a variable would turn the constants into values.
    gl.warp_specialize(
        [
            (
                attend,
                (
                    rings,
                    bars,
                    (q_ptr, out_ptr, seq_lens_ptr, query_start_loc_ptr, counts_ptr),
                    num_decodes,
                    num_seqs,
                    score_scale,
                    stride_q_token,
                    stride_q_head,
                    stride_out,
                    gl.constexpr(0),
                    NUM_KV_HEADS,
                    GROUP,
                    HAS_COUNTS,
                    BLOCK_Q,
                ),
            ),
            (
                attend,
                (
                    rings,
                    bars,
                    (q_ptr, out_ptr, seq_lens_ptr, query_start_loc_ptr, counts_ptr),
                    num_decodes,
                    num_seqs,
                    score_scale,
                    stride_q_token,
                    stride_q_head,
                    stride_out,
                    gl.constexpr(1),
                    NUM_KV_HEADS,
                    GROUP,
                    HAS_COUNTS,
                    BLOCK_Q,
                ),
            ),
            (
                load,
                (
                    (k_desc, v_desc),
                    rings,
                    bars,
                    (
                        block_table_ptr,
                        block_rows_ptr,
                        seq_lens_ptr,
                        query_start_loc_ptr,
                        counts_ptr,
                    ),
                    num_decodes,
                    num_seqs,
                    stride_table,
                    NUM_KV_HEADS,
                    BLOCK_SIZE,
                    HAS_BLOCK_ROWS,
                    HAS_COUNTS,
                    BLOCK_Q,
                ),
            ),
        ],
        [4, 1],
        [_CONSUMER_REGISTERS, _LOADER_REGISTERS],
    )


def prefill_on_hopper(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    metadata: AttentionMetadata,
    out: torch.Tensor,
    *,
    softmax_scale: float,
    tiles: HopperTiles | None = None,
) -> None:
    """`prefill_attention` where `can_attend` is true; arguments as there."""
    num_tokens, num_q_heads, head_dim = q.shape
    num_blocks, block_size, num_kv_heads = k_cache.shape[:3]
    group = num_q_heads // num_kv_heads
    tiles = tiles or hopper_tiles(head_dim)
    block_q = 2 * tiles.rows // group
    counts = metadata.device_counts
    if counts is None:
        num_prefills = metadata.num_seqs - metadata.num_decodes
        num_tokens -= metadata.num_decodes
        num_programs = (num_tokens // block_q + num_prefills) * num_kv_heads
    else:
        num_programs = (num_tokens // block_q + metadata.max_prefills) * num_kv_heads
        num_programs = min(num_programs, num_multiprocessors(q.device))
    if not num_programs:
        return
    flat = [num_blocks * block_size, num_kv_heads * head_dim]
    box = [min(block_size, 64), _BOX_COLUMNS]
    layout = gl.NVMMASharedLayout(128, 16, 2)
    k_desc, v_desc = (
        TensorDescriptor(cache, flat, [flat[1], 1], box, layout) for cache in (k_cache, v_cache)
    )
    _prefill_hopper_kernel[(num_programs,)](
        q,
        k_desc,
        v_desc,
        metadata.block_table,
        metadata.block_rows,
        metadata.seq_lens,
        metadata.query_start_loc,
        counts,
        out,
        metadata.num_decodes,
        metadata.num_seqs,
        softmax_scale * LOG2_E,
        q.stride(0),
        q.stride(1),
        metadata.block_table.stride(0),
        out.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        HAS_BLOCK_ROWS=metadata.block_rows is not None,
        HAS_COUNTS=counts is not None,
        BLOCK_Q=block_q,
        ROWS=tiles.rows,
        BLOCK_N=tiles.block_n,
        STAGES=tiles.stages,
        num_warps=4,
        maxnreg=MAX_REGISTERS,
        enable_fp_fusion=True,
    )
