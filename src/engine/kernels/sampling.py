"""Triton kernels that turn logits into token ids without sorting and without a host sync.

The formula stands in `engine.kernels.sampling_reference`, whose plain-torch twin these kernels
match. One step launches, by what its rows need:

    _adjust_kernel     grid (R, parts)  logits -> float32 scratch with bias, bans and penalties
    _threshold_kernel  grid (R,)        the smallest value top_k, top_p and min_p keep
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
| slots_ptr       | [R, SLOTS, BLOCK] fp32        | scratch of the threshold search                |

Threshold search. Top-k and top-p both ask for the largest t with weight{x >= t} >= target, where
a token weighs 1 or exp((x - max) / T). Each of BLOCK lanes sees every BLOCK-th token and keeps its
maximum. These maxima are a subset of the row, so the t they give is never above the row's own: a
tight lower bound after one pass, without an assumption on the distribution. A second pass lets
each lane collect its values in [bound, max], at most SLOTS of them, into scratch; the answer is
then found by bisection over float bit patterns in registers, exact including ties. Only where a
lane overflows (flat distributions under top-p, huge k, long runs of equal values) is the bracket
first halved by further passes over the row, which is in L2 by then. The idea to truncate, gather
and search by pivots instead of sorting is Qrita's (Park et al., arXiv 2602.01518) and that of
FlashInfer's sampling kernels (flashinfer-ai/flashinfer, Apache-2.0); the bound from lane maxima
and the lane-private slots, which need no prefix sum and no atomics, are ours.

Numerics: everything in fp32. Thresholds live in logit units, so top_k and min_p compare values as
they came; only top-p masses are sums, with a relative error near 1e-6 against the twin's float64.
No atomics and no cross-row state: the same row, settings, seed and position give the same token
in every batch, whatever R and the number of parts are.

Offsets that multiply a stride or V are int64. LANES is `NOISE_LANES`, part of the noise's
definition; BLOCK and SLOTS are tuning.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels import sampling_reference as layout
from engine.kernels.sampling_reference import SamplingTables

_INV_TEMPERATURE = tl.constexpr(layout.WORD_INV_TEMPERATURE)
_TOP_K = tl.constexpr(layout.WORD_TOP_K)
_TOP_P = tl.constexpr(layout.WORD_TOP_P)
_MIN_P_MARGIN = tl.constexpr(layout.WORD_MIN_P_MARGIN)
_REPETITION = tl.constexpr(layout.WORD_REPETITION)
_FREQUENCY = tl.constexpr(layout.WORD_FREQUENCY)
_PRESENCE = tl.constexpr(layout.WORD_PRESENCE)
_HAS_PENALTIES = tl.constexpr(layout.WORD_HAS_PENALTIES)
_SEED_LOW = tl.constexpr(layout.WORD_SEED_LOW)
_SEED_HIGH = tl.constexpr(layout.WORD_SEED_HIGH)
_NUM_WORDS = tl.constexpr(layout.NUM_SETTING_WORDS)
_COUNT_MASK = tl.constexpr(layout.COUNT_MASK)
_LARGEST = tl.constexpr(layout.LARGEST_LOGIT)
_BELOW_ONE = tl.constexpr(1.0 - 2.0**-24)
_NO_TOKEN = tl.constexpr(2**31 - 1)

GREEDY, RANDOM, FILTERED = 0, 1, 2
"""How a batch draws: argmax only, some rows random, some rows with top_k, top_p or min_p."""

_SEARCH_BLOCK = 4096
_SEARCH_SLOTS = 4
_SEARCH_WARPS = 16
_VALUE_STEPS = tl.constexpr(12)


@triton.jit
def _setting(settings_ptr, row, WORD: tl.constexpr):
    return tl.load(settings_ptr + row * _NUM_WORDS + WORD)


@triton.jit
def _float_setting(settings_ptr, row, WORD: tl.constexpr):
    return _setting(settings_ptr, row, WORD).to(tl.float32, bitcast=True)


@triton.jit
def _load_logits(row_ptr, offsets, vocab_size):
    x = tl.load(row_ptr + offsets, mask=offsets < vocab_size, other=-float("inf")).to(tl.float32)
    bounded = tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST)
    # `x > -inf` is false for NaN too.
    return tl.where(x > -float("inf"), bounded, -float("inf"))


@triton.jit
def _penalized(x, seen, repetition, frequency, presence):
    repeated = tl.where(x > 0, tl.div_rn(x, repetition + tl.zeros_like(x)), x * repetition)
    x = tl.where(seen > 0, repeated, x)
    count = (seen & _COUNT_MASK).to(tl.float32)
    x = x - frequency * count
    return x - tl.where(count > 0, presence, 0.0)


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
    x = _load_logits(logits_row, offsets, vocab_size)
    repetition = 1.0
    frequency = 0.0
    presence = 0.0
    num_counts = 0
    if HAS_PENALTIES:
        # Rows without penalties read no counts; zeros leave their logits as they are.
        num_counts = tl.where(_setting(settings_ptr, row, _HAS_PENALTIES) > 0, vocab_size, 0)
        repetition = _float_setting(settings_ptr, row, _REPETITION)
        frequency = _float_setting(settings_ptr, row, _FREQUENCY)
        presence = _float_setting(settings_ptr, row, _PRESENCE)
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
        y = _load_logits(logits_row, tl.where(mine, ids, vocab_size), vocab_size) + bias
        y = tl.where(position < banned_before, -float("inf"), y)
        if HAS_PENALTIES:
            mask = mine & (ids < num_counts)
            seen = tl.load(counts_row + ids, mask=mask, other=0).to(tl.int32)
            y = _penalized(y, seen, repetition, frequency, presence)
        tl.debug_barrier()
        tl.store(adjusted_row + ids, y, mask=mine)


@triton.jit
def _to_key(x):
    """Int64 that orders as the float does; neighbouring floats have neighbouring keys."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def _from_key(key):
    bits = key.to(tl.int32)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _weight(x, row_max, inv_temperature, USE_MASS: tl.constexpr):
    if USE_MASS:
        return tl.exp((x - row_max) * inv_temperature)
    return tl.where(x > -float("inf"), 1.0, 0.0)


@triton.jit
def _search_registers(values, weights, target, low, high):
    """Largest key t in [low, high) with weight{values >= t} >= target; `low` is taken on trust."""
    while high - low > 1:
        middle = low + (high - low) // 2
        total = tl.sum(tl.where(values >= _from_key(middle), weights, 0.0))
        is_enough = total >= target
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
    return low


@triton.jit
def _measure_range(
    row_ptr, vocab_size, low, high, row_max, inv_temperature,
    USE_MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weight of the values in [low, high), and how many of them each lane sees."""
    lane = tl.arange(0, BLOCK)
    least = _from_key(low)
    limit = _from_key(high)
    weight = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab_size, BLOCK):
        x = _load_logits(row_ptr, start + lane, vocab_size)
        inside = (x >= least) & (x < limit)
        weight += tl.where(inside, _weight(x, row_max, inv_temperature, USE_MASS), 0.0)
        count += inside.to(tl.int32)
    return tl.sum(weight), count


@triton.jit
def _collect(row_ptr, slots_ptr, vocab_size, low, high, BLOCK: tl.constexpr, SLOTS: tl.constexpr):
    """Store each lane's values in [low, high) in its own slots; returns the lanes' counts."""
    lane = tl.arange(0, BLOCK)
    least = _from_key(low)
    limit = _from_key(high)
    count = tl.zeros([BLOCK], tl.int32)
    # The slots may still be read for an earlier search by other threads of this program.
    tl.debug_barrier()
    for start in range(0, vocab_size, BLOCK):
        x = _load_logits(row_ptr, start + lane, vocab_size)
        inside = (x >= least) & (x < limit)
        tl.store(slots_ptr + count * BLOCK + lane, x, mask=inside & (count < SLOTS))
        count += inside.to(tl.int32)
    tl.debug_barrier()
    return count


@triton.jit
def _search_row(
    row_ptr, slots_ptr, vocab_size, target, low, high, row_max, inv_temperature,
    USE_MASS: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Largest key t in [low, high) with weight{row >= t} >= target; `low` is taken on trust."""
    above = 0.0
    count = _collect(row_ptr, slots_ptr, vocab_size, low, high, BLOCK, SLOTS)
    is_crowded = tl.max(count) > SLOTS
    if is_crowded:
        step = 0
        while is_crowded and high - low > 1:
            # Halving values separates spread logits in a few steps; halving bit patterns bounds
            # the steps (32) where many logits are equal or nearly so.
            key = low + (high - low) // 2
            if step < _VALUE_STEPS:
                key = _to_key(0.5 * _from_key(low) + 0.5 * _from_key(high))
            middle = tl.minimum(tl.maximum(key, low + 1), high - 1)
            weight, upper_count = _measure_range(
                row_ptr, vocab_size, middle, high, row_max, inv_temperature, USE_MASS, BLOCK
            )
            is_enough = above + weight >= target
            above = tl.where(is_enough, above, above + weight)
            low = tl.where(is_enough, middle, low)
            high = tl.where(is_enough, high, middle)
            count = tl.where(is_enough, upper_count, count - upper_count)
            is_crowded = tl.max(count) > SLOTS
            step += 1
        count = _collect(row_ptr, slots_ptr, vocab_size, low, high, BLOCK, SLOTS)
    slot = tl.arange(0, SLOTS)[:, None]
    values = tl.load(
        slots_ptr + slot * BLOCK + tl.arange(0, BLOCK)[None, :],
        mask=slot < count[None, :],
        other=-float("inf"),
    )
    weights = _weight(values, row_max, inv_temperature, USE_MASS)
    return _search_registers(values, weights, target - above, low, high)


@triton.jit
def _threshold_kernel(
    logits_ptr,
    stride_logits,
    settings_ptr,
    rows_ptr,
    thresholds_ptr,
    slots_ptr,
    vocab_size,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + index)
    row_ptr = logits_ptr + index * stride_logits
    slots_ptr += index * (BLOCK * SLOTS)
    inv_temperature = _float_setting(settings_ptr, row, _INV_TEMPERATURE)
    top_k = _setting(settings_ptr, row, _TOP_K)
    top_p = _float_setting(settings_ptr, row, _TOP_P)
    margin = _float_setting(settings_ptr, row, _MIN_P_MARGIN)
    threshold = -_LARGEST
    has_filter = (top_k > 0) | (top_p < 1.0) | (margin > -float("inf"))
    if (inv_temperature > 0.0) & has_filter:
        lane = tl.arange(0, BLOCK)
        lane_max = tl.full([BLOCK], -float("inf"), tl.float32)
        lane_min = tl.full([BLOCK], _LARGEST, tl.float32)
        for start in range(0, vocab_size, BLOCK):
            x = _load_logits(row_ptr, start + lane, vocab_size)
            lane_max = tl.maximum(lane_max, x)
            lane_min = tl.where(x > -float("inf"), tl.minimum(lane_min, x), lane_min)
        row_max = tl.max(lane_max)
        if row_max > -float("inf"):
            high = _to_key(row_max) + 1
            low = _to_key(tl.maximum(tl.min(lane_min), row_max + margin))
            if (top_k > 0) & (top_k < vocab_size):
                target = top_k.to(tl.float32)
                ones = _weight(lane_max, row_max, inv_temperature, False)
                bound = _search_registers(lane_max, ones, target, low, high)
                low = _search_row(
                    row_ptr, slots_ptr, vocab_size, target, bound, high, row_max,
                    inv_temperature, False, BLOCK, SLOTS,
                )  # fmt: skip
            if top_p < 1.0:
                total, _ = _measure_range(
                    row_ptr, vocab_size, low, high, row_max, inv_temperature, True, BLOCK
                )
                target = top_p * total
                # V tokens this far below the maximum weigh less than 1 - top_p together, and
                # the maximum alone weighs 1.
                tail = tl.log(vocab_size.to(tl.float32)) - tl.log(1.0 - top_p)
                tail_key = _to_key(tl.maximum(row_max - tail / inv_temperature, -_LARGEST))
                weights = _weight(lane_max, row_max, inv_temperature, True)
                bound = _search_registers(
                    lane_max, weights, target, tl.maximum(low, tail_key), high
                )
                low = _search_row(
                    row_ptr, slots_ptr, vocab_size, target, bound, high, row_max,
                    inv_temperature, True, BLOCK, SLOTS,
                )  # fmt: skip
            threshold = _from_key(low)
    tl.store(thresholds_ptr + index, threshold)


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
        inv_temperature = _float_setting(settings_ptr, row, _INV_TEMPERATURE)
        seed_low += _setting(settings_ptr, row, _SEED_LOW).to(tl.uint32, bitcast=True)
        seed_high += _setting(settings_ptr, row, _SEED_HIGH).to(tl.uint32, bitcast=True)
        position += tl.load(positions_ptr + index).to(tl.uint32)
        if HAS_THRESHOLD:
            threshold = tl.load(thresholds_ptr + index)
    for tile in range(part * tiles_per_part, (part + 1) * tiles_per_part):
        token = tile * (4 * LANES) + lane
        x0 = _load_logits(row_ptr, token, vocab_size)
        x1 = _load_logits(row_ptr, token + LANES, vocab_size)
        x2 = _load_logits(row_ptr, token + 2 * LANES, vocab_size)
        x3 = _load_logits(row_ptr, token + 3 * LANES, vocab_size)
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
        if is_token & (_setting(settings_ptr, row, _HAS_PENALTIES) > 0):
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
    num_rows, vocab_size = _check_logits(logits)
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


def filter_thresholds(
    logits: torch.Tensor, tables: SamplingTables, rows: torch.Tensor
) -> torch.Tensor:
    """Smallest value each row keeps under min_p, top_k and top_p: new [R] float32 tensor.

    Args:
        logits: [R, V] bf16, fp16 or fp32 with unit stride along V, adjusted where needed.
        tables: Settings on the device of `logits`.
        rows: [R] int64 state indices.

    Returns:
        Thresholds in logit units; -1e30, which keeps all, for rows without a filter.
    """
    num_rows, vocab_size = _check_logits(logits)
    block = min(_SEARCH_BLOCK, triton.next_power_of_2(vocab_size))
    thresholds = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    slots = torch.empty((num_rows, _SEARCH_SLOTS, block), dtype=torch.float32, device=logits.device)
    _threshold_kernel[(num_rows,)](
        logits,
        logits.stride(0),
        tables.settings,
        rows,
        thresholds,
        slots,
        vocab_size,
        BLOCK=block,
        SLOTS=_SEARCH_SLOTS,
        num_warps=_SEARCH_WARPS,
    )
    return thresholds


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
        draw: `GREEDY`, `RANDOM` or `FILTERED`; the most that any of the rows needs.
        use_sparse: Some row has a bias or ban.
        use_penalties: Some row has a penalty.

    Returns:
        New [R] int64 tensor, -1 for rows without a value above -inf.
    """
    num_rows, vocab_size = _check_logits(logits)
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


def _check_logits(logits: torch.Tensor) -> tuple[int, int]:
    assert logits.dim() == 2, f"logits must be [R, V], got shape {tuple(logits.shape)}"
    assert logits.stride(1) == 1, "logits must have unit stride along the vocabulary"
    return logits.shape[0], logits.shape[1]
