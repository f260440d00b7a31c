"""The chosen experts of every token, with weights of integer codes.

    both[p]   = x[p / K] gate_up[e]^T + b       p a place of expert e
    active[p] = act(both[p])
    y[p]      = w[p] (active[p] down[e]^T + b)
    out[t]    = sum of y[t K ... t K + K - 1]

as in `moe_experts`, whose plan of tiles and last sum these are, with the products of
`quantised_product`: a program has BLOCK_N rows of an expert's weight, and BLOCK_M places of it.

| argument        | shape, dtype                  | duty                                         |
|-----------------|-------------------------------|----------------------------------------------|
| x_ptr           | [T, H] or [P, K] bf16, fp16   | stride 1 along the columns                   |
|                 | or fp32                       |                                              |
| planes, scales  | of a `CodePlanes` [E N, K]    | experts below each other                     |
| bias_ptr        | [E, N], any float dtype       | contiguous; None: no bias                    |
| weights_ptr     | [P] fp32                      | contiguous; None: no weights                 |
| order_ptr,      | int32                         | see `moe_plan`                               |
| tiles_ptr       |                               |                                              |
| out_ptr         | [P, N], x's dtype             | contiguous                                   |

GATHERS: rows of x are tokens, and rows of out stand in the plan's order; else rows of x stand in
that order, and rows of out are places. Grid (tiles, ceil(N / BLOCK_N)).

Numerics: as in `quantised_product`; both, active and y are rounded to the dtype. Bits of a row
depend on the tiles, not on the rows beside it. Offsets of rows are int64. constexpr: everything
fixed per model, and the tiles.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.act_mul import act_mul
from engine.kernels.compile_ahead import launchable
from engine.kernels.moe_experts import sum_choices
from engine.kernels.moe_plan import TILE_ENTRY, ExpertPlan, plan_experts
from engine.kernels.moe_reference import check_activation
from engine.kernels.quantised_layout import CodePlanes
from engine.kernels.quantised_product import add_bundle
from engine.kernels.quantised_tiles import ProductTiles, expert_product_tiles
from engine.kernels.quantised_unpack import growth_of

_BLOCK = 1024


@launchable
@triton.jit
def _grouped_kernel(
    x_ptr,
    main_ptr,
    extra_ptr,
    scales_ptr,
    minima_ptr,
    table_ptr,
    bias_ptr,
    weights_ptr,
    order_ptr,
    tiles_ptr,
    out_ptr,
    num_cols,
    num_rows_of_all,
    num_inner,
    num_bundles,
    num_groups,
    stride_x_row,
    factor,
    GATHERS: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    GROUP: tl.constexpr,
    SUB: tl.constexpr,
    MAIN_BITS: tl.constexpr,
    EXTRA: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    EVEN_K: tl.constexpr,
    TILE_ENTRY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    tile_ptr = tiles_ptr + tl.program_id(0) * TILE_ENTRY
    expert = tl.load(tile_ptr)
    if expert >= 0:
        rows = tl.load(tile_ptr + 1) + tl.arange(0, BLOCK_M)
        end = tl.load(tile_ptr + 2)
        is_row = rows < end
        places = tl.load(order_ptr + tl.minimum(rows, end - 1))
        if GATHERS:
            x_rows = places // NUM_CHOSEN
            out_rows = rows
        else:
            x_rows = tl.minimum(rows, end - 1)
            out_rows = places
        cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        stacked = expert.to(tl.int64) * num_cols + tl.minimum(cols, num_cols - 1)
        word = tl.arange(0, 16)
        word_rows = stacked[:, None] * (num_bundles * 16) + word[None, :]
        x_ptrs = x_ptr + x_rows.to(tl.int64)[:, None] * stride_x_row + word[None, :]
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for bundle in tl.range(0, num_bundles, num_stages=NUM_STAGES):
            acc = add_bundle(
                acc,
                x_ptrs,
                word,
                word_rows,
                stacked,
                main_ptr,
                extra_ptr,
                scales_ptr,
                minima_ptr,
                table_ptr,
                bundle,
                num_rows_of_all,
                num_inner,
                num_groups,
                GROUP,
                SUB,
                MAIN_BITS,
                EXTRA,
                EXPONENT_BITS,
                ZERO,
                HAS_MINIMA,
                HAS_TABLE,
                EVEN_K,
            )
        if x_ptr.dtype.element_ty != tl.float16:
            factor *= growth_of(EXPONENT_BITS, HAS_TABLE)
        acc *= factor
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + stacked).to(tl.float32)[:, None]
        if weights_ptr is not None:
            acc *= tl.load(weights_ptr + places)[None, :]
        out_ptrs = out_ptr + out_rows.to(tl.int64)[None, :] * num_cols + cols[:, None]
        mask = is_row[None, :] & (cols < num_cols)[:, None]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@launchable
@triton.jit
def _clamped_kernel(both_ptr, active_ptr, width, limit, alpha, BLOCK: tl.constexpr):
    """gpt-oss's activation: (up + 1) gate sigmoid(alpha gate), both of them bounded."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate_ptrs = both_ptr + row * (2 * width) + columns
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + width, mask=mask, other=0.0).to(tl.float32)
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    active = (up + 1.0) * (gate * tl.sigmoid(gate * alpha))
    active_ptrs = active_ptr + row * width + columns
    tl.store(active_ptrs, active.to(active_ptr.dtype.element_ty), mask=mask)


def _grouped_product(
    x: torch.Tensor,
    weight: CodePlanes,
    bias: torch.Tensor | None,
    weights: torch.Tensor | None,
    plan: ExpertPlan,
    out: torch.Tensor,
    tiles: ProductTiles,
    num_chosen: int,
    *,
    gathers: bool,
) -> None:
    num_cols = out.shape[1]
    num_inner = weight.shape[1]
    _grouped_kernel[(plan.tiles.shape[0], triton.cdiv(num_cols, tiles.block_n))](
        x,
        *weight.planes,
        bias,
        weights,
        plan.order,
        plan.tiles,
        out,
        num_cols,
        weight.shape[0],
        num_inner,
        weight.num_bundles,
        weight.scales.shape[0],
        x.stride(0),
        weight.factor,
        GATHERS=gathers,
        NUM_CHOSEN=num_chosen,
        **weight.constants,
        EVEN_K=num_inner % 128 == 0,
        TILE_ENTRY=TILE_ENTRY,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        NUM_STAGES=tiles.num_stages,
        num_warps=tiles.num_warps,
        enable_fp_fusion=True,
    )


def quantised_experts(
    x: torch.Tensor,
    gate_up: CodePlanes,
    down: CodePlanes,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    weights: torch.Tensor,
    experts: torch.Tensor,
    *,
    activation: str,
    scales_input: bool = False,
    swiglu_limit: float = 0.0,
    swiglu_alpha: float = 1.0,
) -> torch.Tensor:
    """See `quantised_reference.quantised_experts`. Nothing here waits for the device."""
    check_activation(activation)
    if x.stride(1) != 1:
        x = x.contiguous()
    num_tokens, num_inner = x.shape
    num_chosen, num_places = experts.shape[1], experts.numel()
    width = down.shape[1]
    num_experts = gate_up.shape[0] // (2 * width)
    out = torch.empty_like(x)
    if not num_tokens:
        return out
    tiles = expert_product_tiles(num_places, num_experts, x.dtype)
    plan = plan_experts(experts, num_experts, tiles.block_m)
    both = x.new_empty(num_places, 2 * width)
    if scales_input:
        # A row for every place: the weights differ.
        x = (x[:, None] * weights.to(x.dtype)[:, :, None]).flatten(0, 1)
    _grouped_product(
        x,
        gate_up,
        gate_up_bias,
        None,
        plan,
        both,
        tiles,
        1 if scales_input else num_chosen,
        gathers=True,
    )
    if activation == "clamped_swiglu":
        active = x.new_empty(num_places, width)
        _clamped_kernel[(num_places, triton.cdiv(width, _BLOCK))](
            both, active, width, swiglu_limit, swiglu_alpha, BLOCK=_BLOCK, num_warps=4
        )
    else:
        active = act_mul(both, activation)
    y = x.new_empty(num_places, num_inner)
    _grouped_product(
        active,
        down,
        down_bias,
        None if scales_input else weights,
        plan,
        y,
        tiles,
        num_chosen,
        gathers=False,
    )
    sum_choices(y, out, num_chosen)
    return out
