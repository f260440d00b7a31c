"""Triton kernels that turn logits into token ids without sorting and without a host sync.

The formula stands in `engine.kernels.sampling_reference`, whose plain-torch twin these kernels
match. One step launches, by what its rows need:

    _adjust_kernel     grid (R, parts)  logits -> float32 scratch with bias, bans and penalties
    (the threshold search of `engine.kernels.sampling_filters`, grid (R,))
    _draw_kernel       grid (R, parts)  argmax of the scores of one part of a row
    _merge_kernel      grid (R,)        best part -> token id; counts the token for penalties

| argument        | shape, dtype                  | duty                                           |
|-----------------|-------------------------------|------------------------------------------------|
| logits_ptr      | [R, V] bf16, fp16 or fp32     | stride 1 along V, any stride along R           |
| settings_ptr    | [num_rows, 16] int32          | `SamplingTables.settings`                      |
| sparse_ptr      | [num_rows, 3, W] int32        | `SamplingTables.sparse`, W a power of two      |
| counts_ptr      | [num_rows, V] int16           | `SamplingTables.counts`; written by the merge  |
| rows_ptr        | [R] int64                     | state indices; rows with penalties only once   |
| positions_ptr   | [R] int64                     | position of the new token                      |
| thresholds_ptr  | [R] fp32                      | in logit units; -1e30 keeps all                |

Numerics: everything in fp32. No atomics and no cross-row state: the same row, settings, seed and
position give the same token in every batch, whatever R and the number of parts are.

Measured on an H100 80GB (torch 2.11, triton 3.6, bf16 N(0, 3) logits, inside a CUDA graph,
November 2026), µs for V = 49,152 and 151,936:

| R   | greedy   | random     | top_k 50    | top_p 0.9   | top_k 20 + top_p 0.8 | torch.sort way |
|-----|----------|------------|-------------|-------------|----------------------|----------------|
| 1   | 3 / 4    | 5 / 6      | 48 / 86     | 79 / 267    | 83 / 160             | 104 / 151      |
| 32  | 5 / 7    | 10 / 25    | 54 / 105    | 92 / 287    | 88 / 171             | 308 / 841      |
| 256 | 10 / 32  | 52 / 150   | 142 / 300   | 220 / 735   | 188 / 420            | 1595 / 4605    |
| 512 | 23 / 57  | 99 / 293   | 281 / 580   | 425 / 1390  | 371 / 815            | 3024 / 8939    |

A single row is one program in the threshold search and bound by latency: the one case where the
sort is as quick. Widths, slots and warps were not tuned beyond these first values.

Offsets that multiply a stride or V are int64. LANES is `NOISE_LANES`, part of the noise's
definition.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels import sampling_reference as layout
from engine.kernels.compile_ahead import launchable
from engine.kernels.sampling_filters import (
    check_logits,
    filter_thresholds,
    load_float_setting,
    load_logits,
    load_setting,
)
from engine.kernels.sampling_reference import FILTERED, GREEDY, SamplingTables

_INV_TEMPERATURE = tl.constexpr(layout.WORD_INV_TEMPERATURE)
_REPETITION = tl.constexpr(layout.WORD_REPETITION)
_FREQUENCY = tl.constexpr(layout.WORD_FREQUENCY)
_PRESENCE = tl.constexpr(layout.WORD_PRESENCE)
_HAS_PENALTIES = tl.constexpr(layout.WORD_HAS_PENALTIES)
_SEED_LOW = tl.constexpr(layout.WORD_SEED_LOW)
_SEED_HIGH = tl.constexpr(layout.WORD_SEED_HIGH)
_COUNT_MASK = tl.constexpr(layout.COUNT_MASK)
_BELOW_ONE = tl.constexpr(1.0 - 2.0**-24)
_NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit
def _penalized(x, seen, repetition, frequency, presence):
    repeated = tl.where(x > 0, tl.div_rn(x, repetition + tl.zeros_like(x)), x * repetition)
    x = tl.where(seen > 0, repeated, x)
    count = (seen & _COUNT_MASK).to(tl.float32)
    x = x - frequency * count
    return x - tl.where(count > 0, presence, 0.0)


@launchable
@triton.jit
def _adjust_kernel(
    logits_ptr,
    stride_logits,
    adjusted_ptr,
    settings_ptr,
    sparse_ptr,
    counts_ptr,
    rows_ptr,
    positions_ptr,
    vocab_size,
    SPARSE_WIDTH: tl.constexpr,
    HAS_PENALTIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + index)
    logits_row = logits_ptr + index * stride_logits
    adjusted_row = adjusted_ptr + index * vocab_size
    counts_row = counts_ptr + row * vocab_size
    start = tl.program_id(1) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    x = load_logits(logits_row, offsets, vocab_size)
    repetition = 1.0
    frequency = 0.0
    presence = 0.0
    num_counts = 0
    if HAS_PENALTIES:
        # Rows without penalties read no counts; zeros leave their logits as they are.
        num_counts = tl.where(load_setting(settings_ptr, row, _HAS_PENALTIES) > 0, vocab_size, 0)
        repetition = load_float_setting(settings_ptr, row, _REPETITION)
        frequency = load_float_setting(settings_ptr, row, _FREQUENCY)
        presence = load_float_setting(settings_ptr, row, _PRESENCE)
        seen = tl.load(counts_row + offsets, mask=offsets < num_counts, other=0).to(tl.int32)
        x = _penalized(x, seen, repetition, frequency, presence)
    tl.store(adjusted_row + offsets, x, mask=offsets < vocab_size)
    if SPARSE_WIDTH > 0:
        position = tl.load(positions_ptr + index)
        entry = tl.arange(0, SPARSE_WIDTH)
        sparse_row = sparse_ptr + row * 3 * SPARSE_WIDTH + entry
        ids = tl.load(sparse_row)
        mine = (ids >= start) & (ids < start + BLOCK)
        # Bias comes before the penalties, so entries are worked out afresh from the logits. The
        # barrier orders the two stores to one address, which different threads may make.
        bias = tl.load(sparse_row + SPARSE_WIDTH).to(tl.float32, bitcast=True)
        banned_before = tl.load(sparse_row + 2 * SPARSE_WIDTH)
        y = load_logits(logits_row, tl.where(mine, ids, vocab_size), vocab_size) + bias
        y = tl.where(position < banned_before, -float("inf"), y)
        if HAS_PENALTIES:
            mask = mine & (ids < num_counts)
            seen = tl.load(counts_row + ids, mask=mask, other=0).to(tl.int32)
            y = _penalized(y, seen, repetition, frequency, presence)
        tl.debug_barrier()
        tl.store(adjusted_row + ids, y, mask=mine)


@triton.jit
def _gumbel(bits):
    u = tl.minimum(
        bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, _BELOW_ONE
    )
    rest = 1.0 - u
    exponential = tl.where(rest == 1.0, u, -tl.log(rest) * (u / (1.0 - rest)))
    return -tl.log(exponential)


@triton.jit
def _keep_better(best_score, best_id, score, token):
    # Strictly greater: tokens come in rising order, so the lowest id wins a tie.
    is_better = score > best_score
    return tl.where(is_better, score, best_score), tl.where(is_better, token, best_id)


@launchable
@triton.jit
def _draw_kernel(
    logits_ptr,
    stride_logits,
    settings_ptr,
    rows_ptr,
    positions_ptr,
    thresholds_ptr,
    part_scores_ptr,
    part_ids_ptr,
    vocab_size,
    tiles_per_part,
    IS_RANDOM: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    LANES: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = tl.load(rows_ptr + index)
    row_ptr = logits_ptr + index * stride_logits
    lane = tl.arange(0, LANES)
    best_score = tl.full([LANES], -float("inf"), tl.float32)
    best_id = tl.full([LANES], _NO_TOKEN, tl.int32)
    inv_temperature = 0.0
    threshold = -float("inf")
    seed_low = tl.full([LANES], 0, tl.uint32)
    seed_high = tl.full([LANES], 0, tl.uint32)
    position = tl.full([LANES], 0, tl.uint32)
    zero = tl.full([LANES], 0, tl.uint32)
    if IS_RANDOM:
        inv_temperature = load_float_setting(settings_ptr, row, _INV_TEMPERATURE)
        seed_low += load_setting(settings_ptr, row, _SEED_LOW).to(tl.uint32, bitcast=True)
        seed_high += load_setting(settings_ptr, row, _SEED_HIGH).to(tl.uint32, bitcast=True)
        position += tl.load(positions_ptr + index).to(tl.uint32)
        if HAS_THRESHOLD:
            threshold = tl.load(thresholds_ptr + index)
    for tile in range(part * tiles_per_part, (part + 1) * tiles_per_part):
        token = tile * (4 * LANES) + lane
        x0 = load_logits(row_ptr, token, vocab_size)
        x1 = load_logits(row_ptr, token + LANES, vocab_size)
        x2 = load_logits(row_ptr, token + 2 * LANES, vocab_size)
        x3 = load_logits(row_ptr, token + 3 * LANES, vocab_size)
        if IS_RANDOM:
            tile_max = 0.0
            if HAS_THRESHOLD:
                x0 = tl.where(x0 >= threshold, x0, -float("inf"))
                x1 = tl.where(x1 >= threshold, x1, -float("inf"))
                x2 = tl.where(x2 >= threshold, x2, -float("inf"))
                x3 = tl.where(x3 >= threshold, x3, -float("inf"))
                # Most tiles keep nothing and need no noise, which is the kernel's main cost.
                tile_max = tl.max(tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)))
            if (inv_temperature > 0.0) & (tile_max > -float("inf")):
                counter = (tile * LANES + lane).to(tl.uint32)
                bits0, bits1, bits2, bits3 = tl.philox_impl(
                    counter, position, zero, zero, seed_low, seed_high, 10
                )
                x0 = x0 * inv_temperature + _gumbel(bits0)
                x1 = x1 * inv_temperature + _gumbel(bits1)
                x2 = x2 * inv_temperature + _gumbel(bits2)
                x3 = x3 * inv_temperature + _gumbel(bits3)
        best_score, best_id = _keep_better(best_score, best_id, x0, token)
        best_score, best_id = _keep_better(best_score, best_id, x1, token + LANES)
        best_score, best_id = _keep_better(best_score, best_id, x2, token + 2 * LANES)
        best_score, best_id = _keep_better(best_score, best_id, x3, token + 3 * LANES)
    score = tl.max(best_score)
    slot = index * tl.num_programs(1) + part
    tl.store(part_scores_ptr + slot, score)
    tl.store(part_ids_ptr + slot, tl.min(tl.where(best_score == score, best_id, _NO_TOKEN)))


@launchable
@triton.jit
def _merge_kernel(
    part_scores_ptr,
    part_ids_ptr,
    token_ids_ptr,
    settings_ptr,
    counts_ptr,
    rows_ptr,
    vocab_size,
    num_parts,
    HAS_PENALTIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    slot = index * num_parts + part
    scores = tl.load(part_scores_ptr + slot, mask=part < num_parts, other=-float("inf"))
    ids = tl.load(part_ids_ptr + slot, mask=part < num_parts, other=_NO_TOKEN)
    best = tl.min(tl.where(scores == tl.max(scores), ids, _NO_TOKEN))
    is_token = best != _NO_TOKEN
    tl.store(token_ids_ptr + index, tl.where(is_token, best, -1).to(tl.int64))
    if HAS_PENALTIES:
        row = tl.load(rows_ptr + index)
        if is_token & (load_setting(settings_ptr, row, _HAS_PENALTIES) > 0):
            count_ptr = counts_ptr + row * vocab_size + best
            seen = tl.load(count_ptr)
            has_room = (seen & _COUNT_MASK) < _COUNT_MASK
            tl.store(count_ptr, tl.where(has_room, seen + 1, seen).to(tl.int16))


def adjust_logits(
    logits: torch.Tensor,
    tables: SamplingTables,
    rows: torch.Tensor,
    positions: torch.Tensor,
    *,
    use_sparse: bool = True,
    use_penalties: bool = True,
) -> torch.Tensor:
    """Logits after bias, bans and penalties: new [R, V] float32 tensor.

    Args:
        logits: [R, V] bf16, fp16 or fp32 with unit stride along V.
        tables: Settings on the device of `logits`.
        rows: [R] int64 state indices.
        positions: [R] int64 positions of the new tokens.
        use_sparse: Apply `tables.sparse` where present.
        use_penalties: Apply `tables.counts` where present.
    """
    num_rows, vocab_size = check_logits(logits)
    block = 2048
    sparse = tables.sparse if use_sparse else None
    counts = tables.counts if use_penalties else None
    adjusted = torch.empty((num_rows, vocab_size), dtype=torch.float32, device=logits.device)
    _adjust_kernel[(num_rows, triton.cdiv(vocab_size, block))](
        logits,
        logits.stride(0),
        adjusted,
        tables.settings,
        tables.settings if sparse is None else sparse,
        tables.settings if counts is None else counts,
        rows,
        positions,
        vocab_size,
        SPARSE_WIDTH=0 if sparse is None else sparse.shape[2],
        HAS_PENALTIES=counts is not None,
        BLOCK=block,
        num_warps=4,
    )
    return adjusted


def sample_tokens(
    logits: torch.Tensor,
    tables: SamplingTables,
    rows: torch.Tensor,
    positions: torch.Tensor,
    *,
    draw: int,
    use_sparse: bool,
    use_penalties: bool,
) -> torch.Tensor:
    """One token per row. No host sync; capturable in a CUDA graph after one warm-up call.

    Args:
        logits: [R, V] bf16, fp16 or fp32 with unit stride along V; not changed.
        tables: Settings on the device of `logits`; `counts` of rows with penalties is updated.
        rows: [R] int64 state indices.
        positions: [R] int64 positions of the new tokens, in [0, 2^32).
        draw: `GREEDY`, `RANDOM` or `FILTERED` of `sampling_reference`; the most that any row needs.
        use_sparse: Some row has a bias or ban.
        use_penalties: Some row has a penalty.

    Returns:
        New [R] int64 tensor, -1 for rows without a value above -inf.
    """
    num_rows, vocab_size = check_logits(logits)
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return token_ids
    if use_sparse or use_penalties:
        logits = adjust_logits(
            logits, tables, rows, positions, use_sparse=use_sparse, use_penalties=use_penalties
        )
    thresholds = filter_thresholds(logits, tables, rows) if draw == FILTERED else None
    num_tiles = triton.cdiv(vocab_size, 4 * layout.NOISE_LANES)
    # Small batches need many parts to fill the GPU, large ones fewer and longer programs.
    tiles_per_part = 1 if num_rows * num_tiles <= 2048 else 4
    num_parts = triton.cdiv(num_tiles, tiles_per_part)
    part_scores = torch.empty((num_rows, num_parts), dtype=torch.float32, device=logits.device)
    part_ids = torch.empty((num_rows, num_parts), dtype=torch.int32, device=logits.device)
    _draw_kernel[(num_rows, num_parts)](
        logits,
        logits.stride(0),
        tables.settings,
        rows,
        positions,
        part_scores if thresholds is None else thresholds,
        part_scores,
        part_ids,
        vocab_size,
        tiles_per_part,
        IS_RANDOM=draw != GREEDY,
        HAS_THRESHOLD=thresholds is not None,
        LANES=layout.NOISE_LANES,
        num_warps=4,
    )
    counts = tables.counts if use_penalties else None
    _merge_kernel[(num_rows,)](
        part_scores,
        part_ids,
        token_ids,
        tables.settings,
        tables.settings if counts is None else counts,
        rows,
        vocab_size,
        num_parts,
        HAS_PENALTIES=counts is not None,
        BLOCK=triton.next_power_of_2(num_parts),
        num_warps=1,
    )
    return token_ids
