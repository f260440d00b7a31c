"""What the warps of `prefill_hopper` do: one loads keys and values, eight attend to them.

The list of items, the rings and their barriers are described there.
"""

# Kernels annotate their compile-time parameters only; the rest are Gluon values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from engine.kernels import prefill_plan

# Names that changed between triton 3.6 and 3.9.
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_copy_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
HEADER = gl.constexpr(prefill_plan.HEADER)
ITEM = gl.constexpr(prefill_plan.ITEM)
_HAS_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def _item_of_round(first_item):
    """The program's item of a round; every other round is dealt from the other end.

    Items get cheaper from first to last, so that this evens out what programs have to do.
    """
    program = gl.program_id(0)
    num_programs = gl.num_programs(0)
    is_reversed = (first_item // num_programs) & 1 == 1
    return first_item + gl.where(is_reversed, num_programs - 1 - program, program)


@gluon.jit
def _next_slot(stage, phase, STAGES: gl.constexpr):
    """The slot of a ring after this one, and the phase of its barriers."""
    is_last = stage == STAGES - 1
    return gl.where(is_last, 0, stage + 1), gl.where(is_last, phase ^ 1, phase)


@gluon.jit
def _tile(plan_ptr, item, num_items, NUM_KV_HEADS: gl.constexpr):
    """(first token, number of tokens, first position, seq_len, table row); no tokens: no item."""
    tile_ptr = plan_ptr + HEADER + item // NUM_KV_HEADS * ITEM
    is_item = item < num_items
    return (
        gl.load(tile_ptr, mask=is_item, other=0),
        gl.load(tile_ptr + 1, mask=is_item, other=0),
        gl.load(tile_ptr + 2, mask=is_item, other=0),
        gl.load(tile_ptr + 3, mask=is_item, other=0),
        gl.load(tile_ptr + 4, mask=is_item, other=0),
    )


@gluon.jit
def _boxes(tile, desc, NUM_BOXES: gl.constexpr):
    """A tile of a ring as the boxes it is copied in: panels of 64 columns, each of all its rows."""
    shape: gl.constexpr = [NUM_BOXES, desc.block_type.shape[0], desc.block_type.shape[1]]
    if _HAS_REINTERPRET:
        return tile.reinterpret(desc.dtype, shape, desc.layout)
    else:  # noqa: RET505 - a compile-time branch: only one of them is traced
        return tile._reinterpret(desc.dtype, shape, desc.layout)


@gluon.jit
def _copy_tile(
    desc,
    ring,
    bar,
    stage,
    table_ptr,
    first_key,
    last_key,
    first_row,
    column,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_ROWS: gl.constexpr,
):
    """Copy keys (or values) from `first_key` on into the ring; past the end, the last block again.

    A block id costs its latency once per tile; the ring is full meanwhile.
    """
    block_n: gl.constexpr = ring.type.shape[1]
    box_rows: gl.constexpr = desc.block_type.shape[0]
    box_columns: gl.constexpr = desc.block_type.shape[1]
    panels: gl.constexpr = ring.type.shape[2] // box_columns
    boxes_per_panel: gl.constexpr = block_n // box_rows
    boxes = _boxes(ring.index(stage), desc, panels * boxes_per_panel)
    mbarrier.expect(bar, panels * boxes_per_panel * desc.block_type.nbytes)
    for box in gl.static_range(boxes_per_panel):
        key = gl.minimum(first_key + box * box_rows, last_key)
        row = gl.load(table_ptr + key // BLOCK_SIZE) * BLOCK_ROWS + first_row
        row += key % BLOCK_SIZE // box_rows * box_rows
        for panel in gl.static_range(panels):
            place = boxes.index(panel * boxes_per_panel + box)
            _copy_box(desc, [row, column + panel * box_columns], bar, place)


@gluon.jit
def load(
    descs,
    rings,
    bars,
    plan_ptr,
    block_table_ptr,
    stride_table,
    NUM_KV_HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    HEADS_FIRST: gl.constexpr,
):
    """The loader: every item's keys and values through the rings, one tile of each at a time."""
    k_desc, v_desc = descs
    _q_ring, k_ring, v_ring = rings
    k_full, v_full, empty = bars
    head_dim: gl.constexpr = k_ring.type.shape[2]
    block_n: gl.constexpr = k_ring.type.shape[1]
    stages: gl.constexpr = k_ring.type.shape[0]
    block_rows: gl.constexpr = BLOCK_SIZE * NUM_KV_HEADS if HEADS_FIRST else BLOCK_SIZE
    num_items = gl.load(plan_ptr) * NUM_KV_HEADS
    stage = 0
    phase = 0
    for first_item in range(0, num_items, gl.num_programs(0)):
        item = _item_of_round(first_item)
        _token, num_tokens, first_position, seq_len, table_row = _tile(
            plan_ptr, item, num_items, NUM_KV_HEADS
        )
        if num_tokens > 0:
            table_ptr = block_table_ptr + table_row.to(gl.int64) * stride_table
            kv_head = item % NUM_KV_HEADS
            if HEADS_FIRST:
                first_row = kv_head * BLOCK_SIZE
                column = kv_head * 0
            else:
                first_row = kv_head * 0
                column = kv_head * head_dim
            last_key = seq_len - 1
            for key in range(0, first_position + num_tokens, block_n):
                # One arrival frees the keys of a tile and the values of the tile before it.
                next_stage, next_phase = _next_slot(stage, phase, stages)
                mbarrier.wait(empty.index(stage), phase ^ 1)
                _copy_tile(
                    k_desc,
                    k_ring,
                    k_full.index(stage),
                    stage,
                    table_ptr,
                    key,
                    last_key,
                    first_row,
                    column,
                    BLOCK_SIZE,
                    block_rows,
                )
                mbarrier.wait(empty.index(next_stage), next_phase ^ 1)
                _copy_tile(
                    v_desc,
                    v_ring,
                    v_full.index(stage),
                    stage,
                    table_ptr,
                    key,
                    last_key,
                    first_row,
                    column,
                    BLOCK_SIZE,
                    block_rows,
                )
                stage = next_stage
                phase = next_phase


@gluon.jit
def round_pairs(weights, dtype: gl.constexpr):
    """To 16 bit, two at a time: the compiler's own conversion swaps the halves and swaps them back.

    One instruction per two weights instead of two, in front of every product.
    """
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [weights], gl.bfloat16, True, 2
        )
    else:  # noqa: RET505 - a compile-time branch: only one of them is traced
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [weights], gl.float16, True, 2
        )


@gluon.jit
def _softmax(scores, row_max, row_sum, positions, first_key, score_scale, IS_MASKED: gl.constexpr):
    """(weights, new row_max, new row_sum, factor of what was summed before); fp32."""
    if IS_MASKED:
        block_n: gl.constexpr = scores.type.shape[1]
        keys = first_key + gl.arange(0, block_n, gl.SliceLayout(0, scores.type.layout))
        scores = gl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
    # Key 0 is visible to every query: the maximum is finite from the first tile on.
    new_max = gl.maximum(row_max, gl.max(scores, axis=1) * score_scale)
    weights = gl.exp2(scores * score_scale - new_max[:, None])
    rescale = gl.exp2(row_max - new_max)
    return weights, new_max, row_sum * rescale + gl.sum(weights, axis=1), rescale


@gluon.jit
def _attend_tiles(
    acc,
    operand,
    row_max,
    row_sum,
    q,
    positions,
    rings,
    bars,
    stage,
    phase,
    first_key,
    end_key,
    end,
    score_scale,
    IS_MASKED: gl.constexpr,
):
    """Run keys [first_key, end_key) past the rows; the last tile's weights wait in `operand`.

        issue   scores = q k[j]^T         issue   acc += operand v[j - 1]
        wait for the scores; softmax while acc is multiplied; wait for acc; scale it

    Returns (acc, operand, row_max, row_sum, stage, phase), the last two of the tile in `operand`.
    """
    _q_ring, k_ring, v_ring = rings
    k_full, v_full, empty = bars
    stages: gl.constexpr = k_ring.type.shape[0]
    block_n: gl.constexpr = k_ring.type.shape[1]
    rows: gl.constexpr = positions.type.shape[0]
    score_layout: gl.constexpr = positions.type.layout.parent
    acc_rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    zeros = gl.zeros([rows, block_n], gl.float32, score_layout)
    for key in range(first_key, end_key, block_n):
        v_stage = stage
        v_phase = phase
        stage, phase = _next_slot(stage, phase, stages)
        k_tile = k_ring.index(stage).permute((1, 0))
        scores = warpgroup_mma(q, k_tile, zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(v_stage), v_phase)
        acc = warpgroup_mma(operand, v_ring.index(v_stage), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        weights, row_max, row_sum, rescale = _softmax(
            scores, row_max, row_sum, positions, key, score_scale, IS_MASKED
        )
        # The next keys are awaited here, not where they are multiplied: ptxas moves the wait for
        # acc up to the start of its basic block, and this wait is a block of its own. Without it
        # the whole softmax runs after the product instead of beside it.
        next_stage, next_phase = _next_slot(stage, phase, stages)
        mbarrier.wait(k_full.index(next_stage), next_phase, pred=key + block_n < end)
        acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
        mbarrier.arrive(empty.index(stage), count=1)
        acc = acc * gl.convert_layout(rescale, acc_rows)[:, None]
        operand = gl.convert_layout(round_pairs(weights, operand.dtype), operand.type.layout)
    return acc, operand, row_max, row_sum, stage, phase


@gluon.jit
def attend(
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
    CONSUMER: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_SINKS: gl.constexpr,
):
    """One consumer: its 64 rows of every item."""
    q_ring, k_ring, v_ring = rings
    k_full, v_full, empty = bars
    rows: gl.constexpr = q_ring.type.shape[1]
    head_dim: gl.constexpr = q_ring.type.shape[2]
    stages: gl.constexpr = k_ring.type.shape[0]
    block_n: gl.constexpr = k_ring.type.shape[1]
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    scores_of: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block_n, 16])
    acc_of: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, head_dim, 16])
    operand_of: gl.constexpr = gl.DotOperandLayout(0, acc_of, 2)
    # Rows of memory, 16 bytes a thread.
    memory_of: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // head_dim, head_dim // 8], [4, 1], [1, 0]
    )
    num_items = gl.load(plan_ptr) * NUM_KV_HEADS
    q_tile = q_ring.index(CONSUMER)
    stage = 0
    phase = 0
    item = _item_of_round(0)
    first_token, num_tokens, first_position, seq_len, _row = _tile(
        plan_ptr, item, num_items, NUM_KV_HEADS
    )
    for first_item in range(0, num_items, gl.num_programs(0)):
        # On its way while this item is computed.
        next_item = _item_of_round(first_item + gl.num_programs(0))
        next_token, next_num_tokens, next_position, next_seq_len, _row = _tile(
            plan_ptr, next_item, num_items, NUM_KV_HEADS
        )
        if num_tokens > 0:
            kv_head = item % NUM_KV_HEADS
            end = first_position + num_tokens

            row = CONSUMER * rows + gl.arange(0, rows, gl.SliceLayout(1, memory_of))
            column = gl.arange(0, head_dim, gl.SliceLayout(0, memory_of))
            query = row // GROUP
            is_row = query < num_tokens
            offset = (first_token + query).to(gl.int64) * stride_q_token
            offset += (kv_head * GROUP + row % GROUP) * stride_q_head
            q_ptrs = q_ptr + offset[:, None] + column[None, :]
            q = gl.load(q_ptrs, mask=is_row[:, None], other=0.0)
            _barrier()
            q_tile.store(q)
            fence_async_shared()
            _barrier()

            row = CONSUMER * rows + gl.arange(0, rows, gl.SliceLayout(1, scores_of))
            positions = first_position + row // GROUP
            acc = gl.zeros([rows, head_dim], gl.float32, acc_of)
            zeros = gl.zeros([rows, block_n], gl.float32, scores_of)
            row_max = gl.full([rows], float("-inf"), gl.float32, gl.SliceLayout(1, scores_of))
            row_sum = gl.zeros([rows], gl.float32, gl.SliceLayout(1, scores_of))

            mbarrier.wait(k_full.index(stage), phase)
            k_tile = k_ring.index(stage).permute((1, 0))
            scores = warpgroup_mma(q_tile, k_tile, zeros, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            mbarrier.arrive(empty.index(stage), count=1)
            weights, row_max, row_sum, _rescale = _softmax(
                scores, row_max, row_sum, positions, 0, score_scale, True
            )
            next_stage, next_phase = _next_slot(stage, phase, stages)
            mbarrier.wait(k_full.index(next_stage), next_phase, pred=block_n < end)
            operand = gl.convert_layout(round_pairs(weights, dtype), operand_of)

            # Keys that all rows see; a consumer whose rows lie after the end has as many tiles.
            diagonal = gl.minimum(first_position + CONSUMER * rows // GROUP + 1, end)
            diagonal = gl.maximum(diagonal // block_n * block_n, block_n)
            acc, operand, row_max, row_sum, stage, phase = _attend_tiles(
                acc,
                operand,
                row_max,
                row_sum,
                q_tile,
                positions,
                rings,
                bars,
                stage,
                phase,
                block_n,
                diagonal,
                end,
                score_scale,
                False,
            )
            acc, operand, row_max, row_sum, stage, phase = _attend_tiles(
                acc,
                operand,
                row_max,
                row_sum,
                q_tile,
                positions,
                rings,
                bars,
                stage,
                phase,
                diagonal,
                end,
                end,
                score_scale,
                True,
            )

            mbarrier.wait(v_full.index(stage), phase)
            v_tile = v_ring.index(stage)
            last_tile = (end - 1) // block_n * block_n
            if last_tile + block_n > seq_len:
                # Weight 0 times a stale NaN is NaN. Both consumers write the same bytes.
                keys = last_tile + gl.arange(0, block_n, gl.SliceLayout(1, memory_of))
                values = v_tile.load(memory_of)
                _barrier()
                v_tile.store(gl.where((keys < seq_len)[:, None], values, gl.zeros_like(values)))
                fence_async_shared()
                _barrier()
            acc = warpgroup_mma(operand, v_tile, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            stage, phase = _next_slot(stage, phase, stages)
            if HAS_SINKS:
                row = CONSUMER * rows + gl.arange(0, rows, gl.SliceLayout(1, scores_of))
                sinks = gl.load(sinks_ptr + kv_head * GROUP + row % GROUP).to(gl.float32)
                row_sum += gl.exp2(sinks * 1.4426950408889634 - row_max)
            mixed = acc / gl.convert_layout(row_sum, gl.SliceLayout(1, acc_of))[:, None]

            row = CONSUMER * rows + gl.arange(0, rows, gl.SliceLayout(1, acc_of))
            column = gl.arange(0, head_dim, gl.SliceLayout(0, acc_of))
            query = row // GROUP
            is_row = query < num_tokens
            offset = (first_token + query).to(gl.int64) * stride_out
            offset += (kv_head * GROUP + row % GROUP) * head_dim
            out_ptrs = out_ptr + offset[:, None] + column[None, :]
            gl.store(out_ptrs, mixed.to(dtype), mask=is_row[:, None])
        item = next_item
        first_token = next_token
        num_tokens = next_num_tokens
        first_position = next_position
        seq_len = next_seq_len
