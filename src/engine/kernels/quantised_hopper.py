"""Product of some rows with a weight of integer codes on Hopper (sm_90), unpacking beside it.

The formula, the arguments and the numbers are those of `quantised_product`, which hands over what
this kernel can do (`multiplies_on_hopper`): 16-bit rows, and groups that divide a bundle of 128
columns or are made of whole ones.

| argument              | shape, dtype                      | duty                                 |
|-----------------------|-----------------------------------|--------------------------------------|
| x_desc                | [M, K] bf16 or fp16               | TMA; boxes of BLOCK_M rows, a bundle |
| main_desc, extra_desc | [N, words of a row] of the planes | TMA; boxes of BLOCK_N rows, a bundle |
| parts_ptr             | [S, M, N] fp32                    | contiguous; None where S is 1        |
| the others            |                                   | as in `quantised_product`            |

Grid (tiles of M and N, S): a program has BLOCK_N rows of the weight, BLOCK_M rows of x, and one of
S parts of K, which are whole pairs of bundles. Bundles of both come by TMA through a ring of STAGES
slots; what lies beyond a matrix is zero.

    bundle j      multiply; refill slot j - 1; meanwhile wait for bundle j + 1, and unpack it into
                  registers; wait for the product

Triton's own products with a left operand in registers wait for every 16 columns, and reach half the
speed. Two bundles are written out, so that no registers need to be copied.

Numerics: as in `quantised_product`, but scales of a whole row multiply the sums, not the weight.
Offsets are int64. constexpr: what the weight is like, and tiles, not M.
"""

# Kernels annotate their compile-time parameters only; the rest are Gluon values.
# mypy: disallow-incomplete-defs=False, disable-error-code="assignment,var-annotated,misc"

from __future__ import annotations

import functools

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from engine.kernels.compile_ahead import launchable
from engine.kernels.prefill_roles import round_pairs
from engine.kernels.quantised_layout import BUNDLE, CodePlanes
from engine.kernels.quantised_lookup import entry_of, look_up
from engine.kernels.quantised_tiles import ProductTiles
from engine.kernels.quantised_unpack import growth_of, strip_weights

# Names that changed between triton 3.6 and 3.9.
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_copy_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_WIDEST_SWIZZLE = 128


@gluon.jit
def _fetch(descs, rings, full, bundle, slot, row, col, pred):
    """Copy a bundle of the weight's and x's rows into a slot."""
    x_desc, main_desc, extra_desc = descs
    x_ring, main_ring, extra_ring = rings
    bar = full.index(slot)
    words: gl.constexpr = main_desc.block_type.shape[1]
    num_bytes: gl.constexpr = main_desc.block_type.nbytes + x_desc.block_type.nbytes
    if extra_desc is None:
        mbarrier.expect(bar, num_bytes, pred=pred)
    else:
        mbarrier.expect(bar, num_bytes + extra_desc.block_type.nbytes, pred=pred)
        _copy_box(extra_desc, [col, bundle * 16], bar, extra_ring.index(slot), pred=pred)
    _copy_box(main_desc, [col, bundle * words], bar, main_ring.index(slot), pred=pred)
    _copy_box(x_desc, [row, bundle * 128], bar, x_ring.index(slot), pred=pred)


@gluon.jit
def _load_factors(
    pointers,
    cols,
    bundle,
    num_cols,
    num_groups,
    GROUP: gl.constexpr,
    SUB: gl.constexpr,
    HAS_SCALES: gl.constexpr,
    HAS_MINIMA: gl.constexpr,
):
    """Scales of a bundle's groups, a tuple of [BLOCK_N], and minima."""
    scales_ptr, minima_ptr, _table_ptr = pointers
    scales = ()
    minima = ()
    for strip in gl.static_range(0, 8, SUB):
        group = gl.minimum((bundle * 8 + strip) // (GROUP // 16), num_groups - 1)
        places = group.to(gl.int64) * num_cols + cols
        if HAS_SCALES:
            scales = scales + (gl.load(scales_ptr + places),)  # noqa: RUF005 - no stars in Triton's tuples
        if HAS_MINIMA:
            minima = minima + (gl.load(minima_ptr + places),)  # noqa: RUF005 - no stars in Triton's tuples
    return scales + minima


@gluon.jit
def _unpack(
    rings,
    slot,
    factors,
    table_ptr,
    SUB: gl.constexpr,
    MAIN_BITS: gl.constexpr,
    EXTRA: gl.constexpr,
    EXPONENT_BITS: gl.constexpr,
    ZERO: gl.constexpr,
    HAS_SCALES: gl.constexpr,
    HAS_MINIMA: gl.constexpr,
    HAS_TABLE: gl.constexpr,
    layout: gl.constexpr,
):
    """The weights of a slot, [BLOCK_N, 128] of x's dtype; `factors` by `_load_factors`."""
    x_ring, main_ring, extra_ring = rings
    dtype: gl.constexpr = x_ring.dtype
    block_n: gl.constexpr = main_ring.type.shape[1]
    tile = main_ring.index(slot)
    if MAIN_BITS == 8:
        main = tile.slice(0, 16, 1).load(layout)
        second = tile.slice(16, 16, 1).load(layout)
        if EXPONENT_BITS == 0:  # stored as signed bytes
            main = main ^ -2139062144  # 0x80808080
            second = second ^ -2139062144
    else:
        main = tile.load(layout).to(gl.int32)
        second = main
    extra = main
    if EXTRA > 0:
        extra = extra_ring.index(slot).load(layout).to(gl.int32)
    looks_up: gl.constexpr = HAS_TABLE and MAIN_BITS + EXTRA == 4
    strips = ()
    for strip in gl.static_range(8):
        scale = 1.0
        minimum = -ZERO
        if HAS_SCALES:
            scale = gl.expand_dims(factors[strip // SUB].to(gl.float32), 1)
            minimum = scale * -ZERO
        if HAS_MINIMA:
            minimum = gl.expand_dims(factors[8 // SUB + strip // SUB].to(gl.float32), 1)
        if looks_up:
            if strip % 4 == 0:
                found = look_up(main, table_ptr, strip // 4)
            weight = entry_of(found, strip % 4) * scale + minimum
        else:
            weight = strip_weights(
                main,
                second,
                extra,
                table_ptr,
                scale,
                minimum,
                strip,
                MAIN_BITS,
                EXTRA,
                EXPONENT_BITS,
                HAS_TABLE,
            )
        if dtype == gl.float16:
            weight *= growth_of(EXPONENT_BITS, HAS_TABLE)
        strips = strips + (round_pairs(weight, dtype),)  # noqa: RUF005 - no stars in Triton's tuples
    # [N, 16, bit 0 of the strip's number, bit 1, bit 2]
    lower = gl.join(gl.join(strips[0], strips[1]), gl.join(strips[2], strips[3]))
    upper = gl.join(gl.join(strips[4], strips[5]), gl.join(strips[6], strips[7]))
    whole = gl.permute(gl.join(lower, upper), (0, 4, 3, 2, 1))
    return gl.convert_layout(whole.reshape([block_n, 128]), layout)


@launchable
@gluon.jit(do_not_specialize=["num_rows"])
def _hopper_kernel(
    x_desc,
    main_desc,
    extra_desc,
    scales_ptr,
    minima_ptr,
    table_ptr,
    bias_ptr,
    out_ptr,
    parts_ptr,
    arrivals_ptr,
    num_rows,
    num_cols,
    num_bundles,
    num_groups,
    stride_out_row,
    factor,
    GROUP: gl.constexpr,
    SUB: gl.constexpr,
    MAIN_BITS: gl.constexpr,
    EXTRA: gl.constexpr,
    EXPONENT_BITS: gl.constexpr,
    ZERO: gl.constexpr,
    HAS_MINIMA: gl.constexpr,
    HAS_TABLE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    IS_SPLIT: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):
    dtype: gl.constexpr = x_desc.dtype
    acc_of: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, BLOCK_M, 16])
    operand_of: gl.constexpr = gl.DotOperandLayout(0, acc_of, 2)
    cols_of: gl.constexpr = gl.SliceLayout(1, operand_of)
    lanes: gl.constexpr = BLOCK_N // 8
    out_of: gl.constexpr = gl.BlockedLayout([8, 1], [lanes, 32 // lanes], [1, NUM_WARPS], [0, 1])
    has_scales: gl.constexpr = GROUP > 0 or HAS_MINIMA

    x_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, 128], x_desc.layout)
    words: gl.constexpr = main_desc.block_type.shape[1]
    main_ring = gl.allocate_shared_memory(
        main_desc.dtype, [STAGES, BLOCK_N, words], main_desc.layout
    )
    extra_ring = main_ring
    if EXTRA > 0:
        extra_ring = gl.allocate_shared_memory(
            extra_desc.dtype, [STAGES, BLOCK_N, 16], extra_desc.layout
        )
    bar_of: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_of)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
    fence_async_shared()
    _barrier()
    descs = (x_desc, main_desc, extra_desc)
    rings = (x_ring, main_ring, extra_ring)

    tile = gl.program_id(0)
    part = gl.program_id(1)
    tiles_m = (num_rows + BLOCK_M - 1) // BLOCK_M
    row = tile % tiles_m * BLOCK_M
    col = tile // tiles_m * BLOCK_N
    num_parts = gl.num_programs(1)
    pairs = (num_bundles + 1) // 2
    pairs_per_part = (pairs + num_parts - 1) // num_parts
    first = part * pairs_per_part * 2
    count = gl.maximum(gl.minimum(pairs_per_part * 2, pairs * 2 - first), 0)
    for stage in gl.static_range(STAGES - 1):
        _fetch(descs, rings, full, first + stage, stage, row, col, stage < count)

    cols = gl.minimum(col + gl.arange(0, BLOCK_N, cols_of), num_cols - 1)
    group: gl.constexpr = GROUP if GROUP > 0 else 1 << 30
    pointers = (scales_ptr, minima_ptr, table_ptr)
    factors = _load_factors(
        pointers, cols, first, num_cols, num_groups, group, SUB, has_scales, HAS_MINIMA
    )
    mbarrier.wait(full.index(0), 0, pred=count > 0)
    weight = _unpack(
        rings, 0, factors, table_ptr, SUB, MAIN_BITS, EXTRA, EXPONENT_BITS, ZERO, has_scales,
        HAS_MINIMA, HAS_TABLE, operand_of,
    )  # fmt: skip
    factors = _load_factors(
        pointers, cols, first + 1, num_cols, num_groups, group, SUB, has_scales, HAS_MINIMA
    )
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, acc_of)
    slot = 0
    phase = 0
    for pair in range(0, count, 2):
        for half in gl.static_range(2):
            bundle = pair + half
            x_tile = x_ring.index(slot).permute((1, 0))
            product = warpgroup_mma(weight, x_tile, acc, is_async=True)
            # Every warp has waited for the product before: the slot before may be filled again.
            _barrier()
            free = gl.where(slot == 0, STAGES - 1, slot - 1)
            ahead = bundle + STAGES - 1
            _fetch(descs, rings, full, first + ahead, free, row, col, ahead < count)
            is_last = slot == STAGES - 1
            phase = gl.where(is_last, phase ^ 1, phase)
            slot = gl.where(is_last, 0, slot + 1)
            is_there = bundle + 1 < count
            mbarrier.wait(full.index(slot), phase, pred=is_there)
            weight = _unpack(
                rings, slot, factors, table_ptr, SUB, MAIN_BITS, EXTRA, EXPONENT_BITS, ZERO,
                has_scales, HAS_MINIMA, HAS_TABLE, operand_of,
            )  # fmt: skip
            factors = _load_factors(
                pointers,
                cols,
                first + bundle + 2,
                num_cols,
                num_groups,
                group,
                SUB,
                has_scales,
                HAS_MINIMA,
            )
            # Over at once. ptxas moves the wait for the product up to the start of its basic block,
            # in front of all the unpacking, and a wait is a block of its own.
            mbarrier.wait(full.index(slot), phase, pred=is_there)
            acc = warpgroup_mma_wait(0, deps=(product,))

    acc_cols_of: gl.constexpr = gl.SliceLayout(1, acc_of)
    acc_rows_of: gl.constexpr = gl.SliceLayout(0, acc_of)
    acc_cols = col + gl.arange(0, BLOCK_N, acc_cols_of)
    if IS_SPLIT:
        acc_rows = row + gl.arange(0, BLOCK_M, acc_rows_of)
        is_there = (acc_cols < num_cols)[:, None] & (acc_rows < num_rows)[None, :]
        places = acc_rows.to(gl.int64)[None, :] * num_cols + acc_cols[:, None]
        stride_part = num_rows.to(gl.int64) * num_cols
        gl.store(parts_ptr + part * stride_part + places, acc, mask=is_there)
        _barrier()
        if gl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") != num_parts - 1:
            return
        gl.store(arrivals_ptr + tile, 0)
        acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, acc_of)
        for other in range(num_parts):
            acc += gl.load(
                parts_ptr + other * stride_part + places,
                mask=is_there,
                other=0.0,
                cache_modifier=".cg",
            )
    safe_cols = gl.minimum(acc_cols, num_cols - 1)
    if dtype != gl.float16:
        factor *= growth_of(EXPONENT_BITS, HAS_TABLE)
    acc *= factor
    if not has_scales:
        acc *= gl.load(scales_ptr + safe_cols).to(gl.float32)[:, None]
    if HAS_BIAS:
        acc += gl.load(bias_ptr + safe_cols).to(gl.float32)[:, None]
    out = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), out_of)
    out_cols = col + gl.arange(0, BLOCK_N, gl.SliceLayout(1, out_of))
    out_rows = row + gl.arange(0, BLOCK_M, gl.SliceLayout(0, out_of))
    places = out_rows.to(gl.int64)[None, :] * stride_out_row + out_cols[:, None]
    is_there = (out_cols < num_cols)[:, None] & (out_rows < num_rows)[None, :]
    gl.store(out_ptr + places, out, mask=is_there)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def multiplies_on_hopper(x: torch.Tensor, weight: CodePlanes) -> bool:
    """Whether the kernel takes the product of x [M, K], stride 1 along K, with a weight."""
    return (
        _is_hopper(x.device)
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.data_ptr() % 16 == 0
        and x.stride(0) % 8 == 0
        and (BUNDLE % max(weight.group, 1) == 0 or weight.group % BUNDLE == 0)
    )


def hopper_product(
    x: torch.Tensor,
    weight: CodePlanes,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tiles: ProductTiles,
) -> None:
    """`quantised_product.matrix_product` where `multiplies_on_hopper` is true."""
    num_rows, num_inner = x.shape
    num_cols = weight.shape[0]
    num_tiles = triton.cdiv(num_rows, tiles.block_m) * triton.cdiv(num_cols, tiles.block_n)
    parts = None
    if tiles.split > 1:
        assert num_tiles <= weight.arrivals.shape[0], "more tiles than counters"
        parts = torch.empty((tiles.split, num_rows, num_cols), dtype=torch.float32, device=x.device)
    x_desc = TensorDescriptor(
        x,
        [num_rows, num_inner],
        [x.stride(0), 1],
        [tiles.block_m, BUNDLE],
        gl.NVMMASharedLayout(_WIDEST_SWIZZLE, 16, 2),
    )
    _hopper_kernel[(num_tiles, tiles.split)](
        x_desc,
        _words(weight.main, tiles.block_n),
        None if weight.extra is None else _words(weight.extra, tiles.block_n),
        *weight.looked_up_planes[2:],
        bias,
        out,
        parts,
        weight.arrivals,
        num_rows,
        num_cols,
        weight.num_bundles,
        weight.scales.shape[0],
        out.stride(0),
        weight.factor,
        **weight.constants,
        HAS_BIAS=bias is not None,
        IS_SPLIT=tiles.split > 1,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        STAGES=tiles.num_stages,
        NUM_WARPS=tiles.num_warps,
        num_warps=tiles.num_warps,
        enable_fp_fusion=True,
    )


def _words(plane: torch.Tensor, block_n: int) -> TensorDescriptor:
    """A plane [N, bundles, words of a bundle] for TMA, a bundle of some rows at a time."""
    num_rows, num_bundles, words = plane.shape
    row_bytes = words * plane.itemsize
    # 16 bytes have no pattern that could spread them over the banks.
    layout = gl.NVMMASharedLayout(row_bytes if row_bytes > 16 else 0, 8 * plane.itemsize, 2)
    shape = [num_rows, num_bundles * words]
    return TensorDescriptor(plane, shape, [shape[1], 1], [block_n, words], layout)
