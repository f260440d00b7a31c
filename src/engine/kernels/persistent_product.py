"""Matrix products of one row within the persistent decode kernel.

    out = x W^T + b        x = norm(in), or in; gated: act(gate) * up; or hidden += ...

Every program owns the same share of the rows of W in every layer: neighbouring pairs, one more or
less than the others. It reads them in tiles of BLOCK_P pairs of whole rows, each thread its own
columns of all rows of a tile, so that the row of x lies in registers, loaded once. What does not
depend on x is on its way before x is waited for: the first tile, the norm's weight, the old
residual stream. While a tile is summed the next one is loaded.

| argument         | shape, dtype                | duty                                            |
|------------------|-----------------------------|-------------------------------------------------|
| weight_ptr       | [NUM_ROWS, NUM_INNER]       | contiguous; gated: [2 NUM_ROWS, NUM_INNER]      |
| bias_ptr         | [NUM_ROWS] or twice         | read if HAS_BIAS                                |
| norm_weight_ptr  | [NUM_INNER]                 | read if HAS_NORM                                |
| hidden_ptr       | [NUM_ROWS]                  | the share's rows are read and written if ADDS   |
| in_words_ptr     | [NUM_INNER / 2] words       | where x comes from, of `in_epoch`               |
| out_words_ptr    | [NUM_ROWS / 2] words        | where the result is published, for `out_epoch`  |

APART: distance of the two rows of a pair, whose results share a word; IN_APART: likewise of x.
BLOCK_K: the power of two >= NUM_INNER.

Numerics: as `few_row_linear`, sums in a fixed tree that depends on K and the number of threads.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.act_mul import activate
from engine.kernels.persistent_exchange import await_vector, pair, publish, unpair
from engine.kernels.rms_norm import apply_norm


@triton.jit
def share_of_pairs(NUM_ROWS: tl.constexpr):
    """(first, end) of this program's share of the pairs of NUM_ROWS weight rows."""
    num_pairs: tl.constexpr = NUM_ROWS // 2
    program = tl.program_id(0).to(tl.int64)
    first = program * num_pairs // tl.num_programs(0)
    end = (program + 1) * num_pairs // tl.num_programs(0)
    return first.to(tl.int32), end.to(tl.int32)


@triton.jit
def rows_of_pairs(pairs, APART: tl.constexpr):
    """First row of each pair; the second one is APART rows further.

    APART 1 pairs neighbours; half of a head pairs the entries that rotation mixes.
    """
    if APART == 1:
        return 2 * pairs
    else:  # noqa: RET505 - a compile-time branch
        return pairs // APART * (2 * APART) + pairs % APART


@triton.jit
def _load_pairs(
    weight_ptr,
    first,
    end,
    NUM_INNER: tl.constexpr,
    APART: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """First and second rows of the pairs [first, end), each [BLOCK_P, BLOCK_K], zero outside."""
    pairs = first + tl.arange(0, BLOCK_P)
    inner = tl.arange(0, BLOCK_K)
    row_ptrs = weight_ptr + rows_of_pairs(pairs, APART).to(tl.int64) * NUM_INNER
    places = row_ptrs[:, None] + inner[None, :]
    mask = (pairs < end)[:, None] & (inner < NUM_INNER)[None, :]
    even = tl.load(places, mask=mask, other=0.0)
    odd = tl.load(places + APART * NUM_INNER, mask=mask, other=0.0)
    return even, odd


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_four(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _tile_sums(rows, up_rows, x, IS_GATED: tl.constexpr, THREADS: tl.constexpr):
    """Products of a tile with x [BLOCK_K] fp32: (even, odd, even up, odd up), [BLOCK_P] fp32.

    Rows of a pair are apart from the start, so that both results end up in the same thread; all
    sums are one reduction, in which threads meet once.
    """
    x = x[None, :]
    even, odd = rows[0].to(tl.float32) * x, rows[1].to(tl.float32) * x
    if IS_GATED:
        even_up, odd_up = up_rows[0].to(tl.float32) * x, up_rows[1].to(tl.float32) * x
        if THREADS == 0:  # the interpreter would add one by one
            even, odd = tl.sum(even, axis=1), tl.sum(odd, axis=1)
            even_up, odd_up = tl.sum(even_up, axis=1), tl.sum(odd_up, axis=1)
        else:
            even, odd, even_up, odd_up = tl.reduce((even, odd, even_up, odd_up), 1, _add_four)
    else:
        if THREADS == 0:
            even, odd = tl.sum(even, axis=1), tl.sum(odd, axis=1)
        else:
            even, odd = tl.reduce((even, odd), 1, _add_two)
        even_up, odd_up = even, odd
    return even, odd, even_up, odd_up


@triton.jit
def _with_bias(even, odd, bias_ptr, first, end, APART: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sums of the pairs [first, end) and their bias."""
    pairs = first + tl.arange(0, BLOCK_P)
    bias_ptrs = bias_ptr + rows_of_pairs(pairs, APART)
    even += tl.load(bias_ptrs, mask=pairs < end, other=0.0).to(tl.float32)
    odd += tl.load(bias_ptrs + APART, mask=pairs < end, other=0.0).to(tl.float32)
    return even, odd


@triton.jit
def product_phase(
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    hidden_ptr,
    in_words_ptr,
    in_epoch,
    out_words_ptr,
    out_epoch,
    eps,
    weight_offset,
    NUM_INNER: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    APART: tl.constexpr,
    IN_APART: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
    THREADS: tl.constexpr,
):
    """One product of a layer: this program's share of its rows."""
    is_gated: tl.constexpr = ACTIVATION != ""
    first, end = share_of_pairs(NUM_ROWS)
    up_ptr = weight_ptr + NUM_ROWS * NUM_INNER
    # Two values of 16 bits at once.
    hidden_ptr = hidden_ptr.to(tl.pointer_type(tl.int32))
    in_tile = tl.arange(0, BLOCK_P)
    inner = tl.arange(0, BLOCK_K)

    rows = _load_pairs(weight_ptr, first, end, NUM_INNER, APART, BLOCK_P, BLOCK_K)
    up_rows = rows
    if is_gated:
        up_rows = _load_pairs(up_ptr, first, end, NUM_INNER, APART, BLOCK_P, BLOCK_K)
    old = tl.zeros([BLOCK_P], tl.int32)
    if ADDS:
        old = tl.load(hidden_ptr + first + in_tile, mask=first + in_tile < end, other=0)
    if HAS_NORM:
        norm_weight = tl.load(norm_weight_ptr + inner, mask=inner < NUM_INNER, other=0.0)

    x = await_vector(in_words_ptr, in_epoch, NUM_INNER, IN_APART, BLOCK_K, DTYPE, THREADS)
    x = x.to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / NUM_INNER + eps)
        x = apply_norm(x, scale, norm_weight, weight_offset, DTYPE, HAS_OFFSET).to(tl.float32)

    for tile in range(first, end, BLOCK_P):
        next_tile = tile + BLOCK_P
        next_rows = _load_pairs(weight_ptr, next_tile, end, NUM_INNER, APART, BLOCK_P, BLOCK_K)
        next_up_rows = next_rows
        if is_gated:
            next_up_rows = _load_pairs(up_ptr, next_tile, end, NUM_INNER, APART, BLOCK_P, BLOCK_K)
        next_old = old
        if ADDS:
            next_pairs = next_tile + in_tile
            next_old = tl.load(hidden_ptr + next_pairs, mask=next_pairs < end, other=0)

        even, odd, even_up, odd_up = _tile_sums(rows, up_rows, x, is_gated, THREADS)
        if HAS_BIAS:
            even, odd = _with_bias(even, odd, bias_ptr, tile, end, APART, BLOCK_P)
        even, odd = even.to(DTYPE), odd.to(DTYPE)
        if is_gated:
            if HAS_BIAS:
                even_up, odd_up = _with_bias(
                    even_up, odd_up, bias_ptr + NUM_ROWS, tile, end, APART, BLOCK_P
                )
            even_up, odd_up = even_up.to(DTYPE).to(tl.float32), odd_up.to(DTYPE).to(tl.float32)
            even = activate(even.to(tl.float32), even_up, DTYPE, ACTIVATION)
            odd = activate(odd.to(tl.float32), odd_up, DTYPE, ACTIVATION)
        pairs = tile + in_tile
        if ADDS:
            old_even, old_odd = unpair(old, DTYPE)
            even = (even.to(tl.float32) + old_even.to(tl.float32)).to(DTYPE)
            odd = (odd.to(tl.float32) + old_odd.to(tl.float32)).to(DTYPE)
            tl.store(hidden_ptr + pairs, pair(even, odd), mask=pairs < end)
        publish(out_words_ptr, pairs, pair(even, odd), out_epoch, pairs < end)
        rows, up_rows, old = next_rows, next_up_rows, next_old
