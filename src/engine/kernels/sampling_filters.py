"""Triton search for the smallest logit that min_p, top_k and top_p keep, without sorting.

    t = largest value of the row with weight{x >= t} >= target, within {x >= max + T ln(min_p)}
    top_k: weight 1, target k        top_p: weight exp((x - max) / T), target p * all kept mass

| argument        | shape, dtype                  | duty                                           |
|-----------------|-------------------------------|------------------------------------------------|
| logits_ptr      | [R, V] bf16, fp16 or fp32     | stride 1 along V, any stride along R           |
| settings_ptr    | [num_rows, 16] int32          | `SamplingTables.settings`                      |
| rows_ptr        | [R] int64                     | state indices                                  |
| thresholds_ptr  | [R] fp32                      | written, in logit units; -1e30 keeps all       |
| slots_ptr       | [R, SLOTS, BLOCK] fp32        | scratch, arbitrary on entry                    |

Grid (R,): one program searches one row; rows without a filter return at once.

Each of BLOCK lanes sees every BLOCK-th token and keeps its maximum. These maxima are a subset of
the row, so the t they give is never above the row's own: a tight lower bound after one pass,
without an assumption on the distribution. A second pass lets each lane collect its values in
[bound, max], at most SLOTS of them, into scratch; the answer is then found by bisection over
float bit patterns in registers, exact including ties. Only where a lane overflows (flat
distributions under top-p, huge k, long runs of equal values) is the bracket first halved by
further passes over the row, which is in L2 by then. The idea to truncate, gather and search by
pivots instead of sorting is Qrita's (arXiv 2602.01518) and that of FlashInfer's sampling kernels
(flashinfer-ai/flashinfer, Apache-2.0); the bound from lane maxima and the lane-private slots,
which need no prefix sum and no atomics, are ours.

Numerics: everything in fp32. Thresholds are logits of the row, so top_k and min_p compare values
as they came; only top-p masses are sums, with a relative error near 1e-6 against the float64 of
`engine.kernels.sampling_reference`. No atomics: same row, same bits. Offsets that multiply a
stride are int64. BLOCK, SLOTS and warps are first values that did well on an H100 (figures in
`engine.kernels.sampling`); BLOCK bounds the k that one pass can bound, SLOTS the collisions.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels import sampling_reference as layout
from engine.kernels.compile_ahead import launchable
from engine.kernels.sampling_reference import SamplingTables

_INV_TEMPERATURE = tl.constexpr(layout.WORD_INV_TEMPERATURE)
_TOP_K = tl.constexpr(layout.WORD_TOP_K)
_TOP_P = tl.constexpr(layout.WORD_TOP_P)
_MIN_P_MARGIN = tl.constexpr(layout.WORD_MIN_P_MARGIN)
_NUM_WORDS = tl.constexpr(layout.NUM_SETTING_WORDS)
_LARGEST = tl.constexpr(layout.LARGEST_LOGIT)

_SEARCH_BLOCK = 4096
_SEARCH_SLOTS = 4
_SEARCH_WARPS = 16
_VALUE_STEPS = tl.constexpr(12)


@triton.jit
def load_setting(settings_ptr, row, WORD: tl.constexpr):
    """One int32 word of a row of settings."""
    return tl.load(settings_ptr + row * _NUM_WORDS + WORD)


@triton.jit
def load_float_setting(settings_ptr, row, WORD: tl.constexpr):
    """One word of a row of settings that holds float32 bits."""
    return load_setting(settings_ptr, row, WORD).to(tl.float32, bitcast=True)


@triton.jit
def load_logits(row_ptr, offsets, vocab_size):
    """Logits as float32 without NaN and bounded; -inf past the row's end."""
    x = tl.load(row_ptr + offsets, mask=offsets < vocab_size, other=-float("inf")).to(tl.float32)
    bounded = tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST)
    # `x > -inf` is false for NaN too.
    return tl.where(x > -float("inf"), bounded, -float("inf"))


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
        x = load_logits(row_ptr, start + lane, vocab_size)
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
        x = load_logits(row_ptr, start + lane, vocab_size)
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


@launchable
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
    inv_temperature = load_float_setting(settings_ptr, row, _INV_TEMPERATURE)
    top_k = load_setting(settings_ptr, row, _TOP_K)
    top_p = load_float_setting(settings_ptr, row, _TOP_P)
    margin = load_float_setting(settings_ptr, row, _MIN_P_MARGIN)
    threshold = -_LARGEST
    has_filter = (top_k > 0) | (top_p < 1.0) | (margin > -float("inf"))
    if (inv_temperature > 0.0) & has_filter:
        lane = tl.arange(0, BLOCK)
        lane_max = tl.full([BLOCK], -float("inf"), tl.float32)
        lane_min = tl.full([BLOCK], _LARGEST, tl.float32)
        for start in range(0, vocab_size, BLOCK):
            x = load_logits(row_ptr, start + lane, vocab_size)
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
    num_rows, vocab_size = check_logits(logits)
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


def check_logits(logits: torch.Tensor) -> tuple[int, int]:
    """R and V of `logits`, whose layout must suit the kernels."""
    assert logits.dim() == 2, f"logits must be [R, V], got shape {tuple(logits.shape)}"
    assert logits.stride(1) == 1, "logits must have unit stride along the vocabulary"
    return logits.shape[0], logits.shape[1]
