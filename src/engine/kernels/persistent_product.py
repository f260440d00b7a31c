"""Matrix products of one row within the persistent decode kernel.

    out = x W^T + b        x = norm(in), or in; gated: act(gate) * up; or hidden += ...

Every program owns the same share of the rows of W in every layer: neighbouring pairs, one more or
less than the others. It reads them in tiles of BLOCK_P pairs of whole rows. Warps lie along the
pairs, SPLITS of them along a row: with one, a warp has its rows and their sums to itself. What does
not depend on x is on its way before x is waited for: the norm's weight, the old residual stream,
the first tile, which in small models is the whole share. While a tile is summed the next one is
loaded. The norm's factor of the row comes after the sums, so that nobody waits for it.

| argument         | shape, dtype                | duty                                            |
|------------------|-----------------------------|-------------------------------------------------|
| weight_ptr       | [NUM_ROWS, NUM_INNER]       | contiguous; gated: [2 NUM_ROWS, NUM_INNER]      |
| bias_ptr         | [NUM_ROWS] or twice         | read if HAS_BIAS                                |
| norm_weight_ptr  | [NUM_INNER]                 | read if HAS_NORM                                |
| hidden_ptr       | [NUM_ROWS]                  | the share's rows are read and written if ADDS   |
| in_words_ptr     | [NUM_INNER / 2] words       | where x comes from, of `in_epoch`               |
| out_words_ptr    | [NUM_ROWS / 2] words        | where the result is published, for `out_epoch`  |
| soon/later_ptr   | weights                     | asked for if SOON, LATER: their (columns, rows, |
|                  |                             | distance of a pair, whether gated), or None     |

APART: distance of the two rows of a pair, whose results share a word; IN_APART: likewise of x. Half
of a vector where rotation does not want half of a head: words are then neighbours in both halves of
a row of W, and x never has to move between threads to lie as W does.
BLOCK_W: the power of two >= NUM_INNER / 2.

Numerics: bf16 or fp16 times fp32, sums in a fixed tree that depends on K and the number of threads.
A normalised x is not rounded, as it would be by `few_row_linear`.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.act_mul import activate
from engine.kernels.persistent_exchange import await_vector, pair, publish, unpair


@triton.jit
def share_of_pairs(NUM_ROWS: tl.constexpr):
    """(first, end) of this program's share of the pairs of NUM_ROWS weight rows."""
    num_pairs: tl.constexpr = NUM_ROWS // 2
    program = tl.program_id(0).to(tl.int64)
    first = program * num_pairs // tl.num_programs(0)
    end = (program + 1) * num_pairs // tl.num_programs(0)
    return first.to(tl.int32), end.to(tl.int32)


@triton.jit
def rows_of_pairs(pairs, APART: tl.constexpr, NUM_ROWS: tl.constexpr):
    """First row of each pair; the second one is APART rows further.

    APART NUM_ROWS / 2 pairs the first with the second half; half of a head pairs the entries that
    rotation mixes.
    """
    if 2 * APART == NUM_ROWS:
        return pairs
    else:  # noqa: RET505 - a compile-time branch
        return pairs // APART * (2 * APART) + pairs % APART


_PREFETCH = tl.constexpr(
    "{.reg .pred is_first; .reg .b32 thread; mov.u32 thread, %tid.x;"
    "setp.eq.u32 is_first, thread, 0;"
    "@is_first cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;}"
)


@triton.jit
def _prefetch_rows(weight_ptr, row, num_rows, NUM_INNER: tl.constexpr):
    place = weight_ptr + row.to(tl.int64) * NUM_INNER
    num_bytes = num_rows * (NUM_INNER * 2)
    tl.inline_asm_elementwise(
        _PREFETCH, "=r,l,r", [place, num_bytes], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _prefetch_share(
    weight_ptr,
    NUM_INNER: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    APART: tl.constexpr,
    IS_GATED: tl.constexpr,
):
    """Ask the second-level cache for this program's rows, a run per first and second row.

    A share that goes on in the next head asks for some rows of other programs instead of its last.
    """
    first, end = share_of_pairs(NUM_ROWS)
    row = rows_of_pairs(first, APART, NUM_ROWS)
    _prefetch_rows(weight_ptr, row, end - first, NUM_INNER)
    _prefetch_rows(weight_ptr, row + APART, end - first, NUM_INNER)
    if IS_GATED:
        _prefetch_rows(weight_ptr, row + NUM_ROWS, end - first, NUM_INNER)
        _prefetch_rows(weight_ptr, row + (NUM_ROWS + APART), end - first, NUM_INNER)


@triton.jit
def _words_of_warps(BLOCK_W: tl.constexpr, SPLITS: tl.constexpr):
    """Words of x in the order of a tile, [SPLITS, 1, chunks, words]; see `_load_tile`."""
    width: tl.constexpr = BLOCK_W if BLOCK_W < 256 else 256
    chunks: tl.constexpr = BLOCK_W // width // SPLITS
    chunk = tl.arange(0, SPLITS)[:, None] * chunks + tl.arange(0, chunks)[None, :]
    return chunk[:, None, :, None] * width + tl.arange(0, width)[None, None, None, :]


@triton.jit
def _load_tile(
    weight_ptr,
    first,
    end,
    NUM_INNER: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    APART: tl.constexpr,
    IN_APART: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Weights of the pairs [first, end), zero outside: first rows' low and high, second rows' ones.

    Low and high are the columns of both values of a word. Each [SPLITS, BLOCK_P, chunks, words]:
    SPLITS warps lie along a row, the others along the pairs; chunks are registers of a thread.
    """
    pairs = first + tl.arange(0, BLOCK_P)
    words = _words_of_warps(BLOCK_W, SPLITS)
    rows = rows_of_pairs(pairs, APART, NUM_ROWS).to(tl.int64) * NUM_INNER
    places = weight_ptr + rows[None, :, None, None] + rows_of_pairs(words, IN_APART, NUM_INNER)
    mask = (pairs < end)[None, :, None, None]
    if 2 * BLOCK_W != NUM_INNER:
        mask = mask & (words < NUM_INNER // 2)
    low = tl.load(places, mask=mask, other=0.0)
    high = tl.load(places + IN_APART, mask=mask, other=0.0)
    odd_low = tl.load(places + APART * NUM_INNER, mask=mask, other=0.0)
    odd_high = tl.load(places + (APART * NUM_INNER + IN_APART), mask=mask, other=0.0)
    return low, high, odd_low, odd_high


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_four(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _dots(tile, low, high):
    """Products of the first and the second rows with x, not yet summed."""
    even = tile[0].to(tl.float32) * low + tile[1].to(tl.float32) * high
    odd = tile[2].to(tl.float32) * low + tile[3].to(tl.float32) * high
    return even, odd


@triton.jit
def _tile_sums(tile, up_tile, low, high, IS_GATED: tl.constexpr, THREADS: tl.constexpr):
    """Products of a tile with x: (even, odd, even up, odd up), [BLOCK_P] fp32.

    Rows of a pair are apart from the start, so that both results end up in the same thread.
    """
    even, odd = _dots(tile, low, high)
    even_up, odd_up = even, odd
    if IS_GATED:
        even_up, odd_up = _dots(up_tile, low, high)
    if THREADS == 0:  # the interpreter would add one by one
        even = tl.sum(tl.sum(tl.sum(even, axis=3), axis=2), axis=0)
        odd = tl.sum(tl.sum(tl.sum(odd, axis=3), axis=2), axis=0)
        if IS_GATED:
            even_up = tl.sum(tl.sum(tl.sum(even_up, axis=3), axis=2), axis=0)
            odd_up = tl.sum(tl.sum(tl.sum(odd_up, axis=3), axis=2), axis=0)
    elif IS_GATED:
        sums = tl.reduce((even, odd, even_up, odd_up), 2, _add_four)
        sums = tl.reduce(sums, 2, _add_four)
        even, odd, even_up, odd_up = tl.reduce(sums, 0, _add_four)
    else:
        sums = tl.reduce((even, odd), 2, _add_two)
        sums = tl.reduce(sums, 2, _add_two)
        even, odd = tl.reduce(sums, 0, _add_two)
    return even, odd, even_up, odd_up


@triton.jit
def _with_bias(
    even,
    odd,
    bias_ptr,
    first,
    end,
    APART: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Sums of the pairs [first, end) and their bias."""
    pairs = first + tl.arange(0, BLOCK_P)
    bias_ptrs = bias_ptr + rows_of_pairs(pairs, APART, NUM_ROWS)
    even += tl.load(bias_ptrs, mask=pairs < end, other=0.0).to(tl.float32)
    odd += tl.load(bias_ptrs + APART, mask=pairs < end, other=0.0).to(tl.float32)
    return even, odd


@triton.jit
def _load_old(hidden_ptr, first, end, APART: tl.constexpr, BLOCK_P: tl.constexpr):
    """The residual stream at the pairs [first, end), low and high."""
    pairs = first + tl.arange(0, BLOCK_P)
    low = tl.load(hidden_ptr + pairs, mask=pairs < end, other=0.0)
    return low, tl.load(hidden_ptr + APART + pairs, mask=pairs < end, other=0.0)


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
    BLOCK_W: tl.constexpr,
    SPLITS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    DTYPE: tl.constexpr,
    THREADS: tl.constexpr,
    soon_ptr,
    later_ptr,
    SOON: tl.constexpr,
    LATER: tl.constexpr,
):
    """One product of a layer: this program's share of its rows."""
    is_gated: tl.constexpr = ACTIVATION != ""
    width: tl.constexpr = BLOCK_W if BLOCK_W < 256 else 256
    in_order: tl.constexpr = [SPLITS, BLOCK_W // width // SPLITS, width]
    first, end = share_of_pairs(NUM_ROWS)
    up_ptr = weight_ptr + NUM_ROWS * NUM_INNER
    in_tile = tl.arange(0, BLOCK_P)

    # What is small is asked for first: it would queue behind the weights.
    if ADDS:
        old = _load_old(hidden_ptr, first, end, APART, BLOCK_P)
    if HAS_NORM:
        words = tl.arange(0, BLOCK_W)
        norm_ptrs = norm_weight_ptr + rows_of_pairs(words, IN_APART, NUM_INNER)
        low_norm = tl.load(norm_ptrs, mask=words < NUM_INNER // 2, other=0.0)
        high_norm = tl.load(norm_ptrs + IN_APART, mask=words < NUM_INNER // 2, other=0.0)
    tile = _load_tile(
        weight_ptr, first, end, NUM_INNER, NUM_ROWS, APART, IN_APART, BLOCK_P, BLOCK_W, SPLITS
    )
    up_tile = tile
    if is_gated:
        up_tile = _load_tile(
            up_ptr, first, end, NUM_INNER, NUM_ROWS, APART, IN_APART, BLOCK_P, BLOCK_W, SPLITS
        )
    if SOON is not None:
        _prefetch_share(soon_ptr, SOON[0], SOON[1], SOON[2], SOON[3])
    if LATER is not None:
        _prefetch_share(later_ptr, LATER[0], LATER[1], LATER[2], LATER[3])
    if HAS_NORM:
        low_norm, high_norm = unpair(
            tl.reshape(pair(low_norm, high_norm), in_order)[:, None, :, :], DTYPE
        )

    data = await_vector(in_words_ptr, in_epoch, NUM_INNER // 2, BLOCK_W, THREADS)
    low, high = unpair(tl.reshape(data, in_order)[:, None, :, :], DTYPE)
    low, high = low.to(tl.float32), high.to(tl.float32)
    if HAS_NORM:
        # A factor of the whole row waits until its products are summed.
        flat_low, flat_high = unpair(data, DTYPE)
        flat_low, flat_high = flat_low.to(tl.float32), flat_high.to(tl.float32)
        squares = tl.sum(flat_low * flat_low + flat_high * flat_high, axis=0)
        scale = tl.rsqrt(squares / NUM_INNER + eps)
        low_norm, high_norm = low_norm.to(tl.float32), high_norm.to(tl.float32)
        if HAS_OFFSET:
            low_norm, high_norm = low_norm + weight_offset, high_norm + weight_offset
        low, high = low * low_norm, high * high_norm

    for index in range(NUM_TILES):
        start = first + index * BLOCK_P
        after = start + BLOCK_P
        next_tile = _load_tile(
            weight_ptr, after, end, NUM_INNER, NUM_ROWS, APART, IN_APART, BLOCK_P, BLOCK_W, SPLITS
        )
        next_up_tile = next_tile
        if is_gated:
            next_up_tile = _load_tile(
                up_ptr, after, end, NUM_INNER, NUM_ROWS, APART, IN_APART, BLOCK_P, BLOCK_W, SPLITS
            )
        if ADDS:
            next_old = _load_old(hidden_ptr, after, end, APART, BLOCK_P)

        even, odd, even_up, odd_up = _tile_sums(tile, up_tile, low, high, is_gated, THREADS)
        if HAS_NORM:
            even, odd, even_up, odd_up = even * scale, odd * scale, even_up * scale, odd_up * scale
        if HAS_BIAS:
            even, odd = _with_bias(even, odd, bias_ptr, start, end, APART, NUM_ROWS, BLOCK_P)
        even, odd = even.to(DTYPE), odd.to(DTYPE)
        if is_gated:
            if HAS_BIAS:
                even_up, odd_up = _with_bias(
                    even_up, odd_up, bias_ptr + NUM_ROWS, start, end, APART, NUM_ROWS, BLOCK_P
                )
            even_up, odd_up = even_up.to(DTYPE).to(tl.float32), odd_up.to(DTYPE).to(tl.float32)
            even = activate(even.to(tl.float32), even_up, DTYPE, ACTIVATION)
            odd = activate(odd.to(tl.float32), odd_up, DTYPE, ACTIVATION)
        pairs = start + in_tile
        if ADDS:
            even = (even.to(tl.float32) + old[0].to(tl.float32)).to(DTYPE)
            odd = (odd.to(tl.float32) + old[1].to(tl.float32)).to(DTYPE)
        publish(out_words_ptr, pairs, pair(even, odd), out_epoch, pairs < end)
        if ADDS:
            tl.store(hidden_ptr + pairs, even, mask=pairs < end)
            tl.store(hidden_ptr + APART + pairs, odd, mask=pairs < end)
            old = next_old
        tile, up_tile = next_tile, next_up_tile
