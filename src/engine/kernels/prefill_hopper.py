"""Prefill attention on Hopper (sm_90): copies by TMA, warp specialisation, overlapped products.

The formula, the packing of query heads and the list of work items are those of
`prefill_attention`, which hands over what this kernel can do: 16 bit, head_dim 64 and 128, no
window or chunks, no soft-cap.

| argument            | shape, dtype                       | duty                                  |
|---------------------|------------------------------------|---------------------------------------|
| q_ptr               | [T, Hq, D] bf16 or fp16            | stride 1 along D                      |
| k_desc, v_desc      | [N * block_size, Hkv * D], with    | TMA descriptors; boxes of one block   |
|                     | HEADS_FIRST [N * Hkv * block_size, | (64 tokens at most) and 64 columns    |
|                     | D], q's dtype                      |                                       |
| block_table_ptr     | [rows, max_blocks] int32           | stride 1 along blocks                 |
| plan_ptr            | [HEADER + tiles * ITEM] int32      | see `prefill_plan`                    |
| out_ptr             | [T, Hq * D], q's dtype             | stride 1; rows of no sequence are not |
|                     |                                    | written                               |
| sinks_ptr           | [Hq]                               | with HAS_SINKS; they join a row's sum |
|                     |                                    | last, as in `attention_tiles`         |

Grid (programs,). A program's warps have roles, which walk the same items:

    loader           1 warp         block table -> TMA of keys and values into rings of STAGES tiles
    2 or 3 consumers 4 warps each   64 rows of the tile each, all keys of the tile

    ring slots: the loader waits for `empty`, arms `full` with the bytes and copies; a consumer
                waits for `full` and multiplies. Its arrival number t at `empty` frees the keys of
                tile t and the values of tile t - 1 (also across items, whose last values are freed
                by the next item's first keys); all consumers must arrive

A consumer has two products in flight, q k^T of the next keys and p v of the last ones; the softmax
of the former overlaps the latter, and the products of the other consumer. That is FlashAttention 3
(Shah et al., arXiv 2407.08608), written in Gluon, the lower layer of Triton.

Numerics: fp32 scores and sums, p rounded to the dtype for the product, keys in order from key 0,
BLOCK_N at a time: a token's bits depend on the keys it sees alone. Whole blocks are copied: keys
after a query are masked; values after the sequence's end are stale, perhaps NaN, and zeroed in
shared memory before the last product. Row offsets are int64, rows of the descriptors int32.
constexpr: what is fixed per model; token and sequence counts are not specialised.

Captured steps launch one program per multiprocessor, eager ones one per item.
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
from engine.kernels.compile_ahead import launchable
from engine.kernels.kv_cache import is_heads_first
from engine.kernels.metadata import AttentionMetadata
from engine.kernels.prefill_plan import prefill_plan
from engine.kernels.prefill_roles import attend, load

ROWS = 64  # of a consumer: one wgmma
LOADER_REGISTERS = 24  # of a thread; the least there is
_BOX_COLUMNS = 64  # 128 bytes, the widest swizzle


@dataclass(frozen=True)
class HopperTiles:
    """Launch shape: consumers (2 or 3), keys per tile, tiles in each ring."""

    consumers: int
    block_n: int
    stages: int

    @property
    def max_registers(self) -> int:
        """Registers of every thread at the launch: a fair share of 64 Ki.

        The loader's warp group has three idle warps.
        """
        return 65536 // (128 * (self.consumers + 1)) // 8 * 8

    @property
    def consumer_registers(self) -> int:
        """Registers of a consumer's thread, once the loader has given up what it does not need."""
        spare = self.max_registers * (self.consumers + 1) - LOADER_REGISTERS
        return spare // self.consumers // 8 * 8


def hopper_tiles(head_dim: int, num_tokens: int) -> HopperTiles:
    """Tiles for a head size and a step of T tokens; a row's bits are the same with any.

    (Were `block_n` to depend on T, they would not be.) Three consumers at head_dim 64 on an H100:
    726 us instead of 750 for 16k tokens of the 135M shape, 522 instead of 584 for 7808 after 8192,
    but 37 instead of 27 for 2048. At 128 their registers do not suffice.
    """
    if head_dim > 64:
        return HopperTiles(2, 128, 2)
    return HopperTiles(3 if num_tokens >= 4096 else 2, 128, 3)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def can_attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> bool:
    """Whether the kernel reads such caches; depends on the model and its caches alone."""
    _, block_size, num_kv_heads, head_dim = k_cache.shape
    return (
        _is_hopper(q.device)
        and q.dtype in (torch.bfloat16, torch.float16)
        and head_dim in (64, 128)
        and block_size >= 16
        and q.shape[1] // num_kv_heads <= 128
        and (k_cache.is_contiguous() or is_heads_first(k_cache))
        and k_cache.stride() == v_cache.stride()
        and k_cache.data_ptr() % 16 == v_cache.data_ptr() % 16 == 0
    )


@launchable
@gluon.jit
def _prefill_hopper_kernel(
    q_ptr,
    k_desc,
    v_desc,
    block_table_ptr,
    plan_ptr,
    out_ptr,
    sinks_ptr,
    score_scale,
    stride_q_token,
    stride_q_head,
    stride_table,
    stride_out,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    HEADS_FIRST: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    tile_of: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    bar_of: gl.constexpr = mbarrier.MBarrierLayout()
    q_ring = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, HEAD_DIM], tile_of)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], tile_of)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], tile_of)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_of)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_of)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_of)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    fence_async_shared()
    rings = (q_ring, k_ring, v_ring)
    bars = (k_full, v_full, empty)
    # The arguments are written out: a variable would turn the constants among them into values,
    # and so would a sum of lists.
    gl.warp_specialize(
        [
            (
                attend,
                (
                    rings,
                    bars,
                    plan_ptr,
                    q_ptr,
                    out_ptr,
                    sinks_ptr,
                    score_scale,
                    stride_q_token,
                    stride_q_head,
                    stride_out,
                    role,
                    NUM_KV_HEADS,
                    GROUP,
                    HAS_SINKS,
                ),
            )
            if role < CONSUMERS
            else (
                load,
                (
                    (k_desc, v_desc),
                    rings,
                    bars,
                    plan_ptr,
                    block_table_ptr,
                    stride_table,
                    NUM_KV_HEADS,
                    BLOCK_SIZE,
                    HEADS_FIRST,
                ),
            )
            for role in ((0, 1, 2) if CONSUMERS == 2 else (0, 1, 2, 3))
        ],
        [4, 1] if CONSUMERS == 2 else [4, 4, 1],
        [CONSUMER_REGISTERS, LOADER_REGISTERS]
        if CONSUMERS == 2
        else [CONSUMER_REGISTERS, CONSUMER_REGISTERS, LOADER_REGISTERS],
    )


def prefill_on_hopper(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    metadata: AttentionMetadata,
    out: torch.Tensor,
    *,
    softmax_scale: float,
    sinks: torch.Tensor | None = None,
    tiles: HopperTiles | None = None,
) -> None:
    """`prefill_attention` where `can_attend` is true; arguments as there."""
    num_tokens, num_q_heads, head_dim = q.shape
    num_blocks, block_size, num_kv_heads = k_cache.shape[:3]
    group = num_q_heads // num_kv_heads
    tiles = tiles or hopper_tiles(head_dim, num_tokens)
    plan, max_tiles = prefill_plan(metadata, num_tokens, tiles.consumers * ROWS // group)
    num_programs = max_tiles * num_kv_heads
    if metadata.device_counts is not None:
        num_programs = min(num_programs, num_multiprocessors(q.device))
    if not num_programs:
        return
    heads_first = is_heads_first(k_cache)
    flat = [num_blocks * block_size, num_kv_heads * head_dim]
    if heads_first:
        flat = [num_blocks * block_size * num_kv_heads, head_dim]
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
        plan,
        out,
        q if sinks is None else sinks,
        softmax_scale * LOG2_E,
        q.stride(0),
        q.stride(1),
        metadata.block_table.stride(0),
        out.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        HEADS_FIRST=heads_first,
        HAS_SINKS=sinks is not None,
        CONSUMERS=tiles.consumers,
        CONSUMER_REGISTERS=tiles.consumer_registers,
        LOADER_REGISTERS=LOADER_REGISTERS,
        ROWS=ROWS,
        BLOCK_N=tiles.block_n,
        STAGES=tiles.stages,
        num_warps=4,
        maxnreg=tiles.max_registers,
        enable_fp_fusion=True,
    )
