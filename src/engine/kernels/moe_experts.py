"""The chosen experts of every token: two grouped products and a sum.

    active[p] = act(x[p / K] gate_up[e]^T + b)     p a place of expert e, gate and up at once
    y[p]      = w[p] (active[p] down[e]^T + b)
    out[t]    = sum of y[t K ... t K + K - 1]

| argument             | shape, dtype              | duty                                          |
|----------------------|---------------------------|-----------------------------------------------|
| x_ptr                | [T, H] bf16, fp16 or fp32 | stride 1 along H                              |
| gate_up_ptr          | [E, 2 I, H], same dtype   | contiguous, gate in the first half of rows    |
| down_ptr             | [E, H, I], same dtype     | contiguous                                    |
| gate_up_bias_ptr     | [E, 2 I]                  | contiguous; None for none                     |
| down_bias_ptr        | [E, H]                    | contiguous; None for none                     |
| weights_ptr          | [T K] fp32                | None where the other product has them         |
| order_ptr, tiles_ptr | int32                     | see `moe_plan`                                |
| active_ptr           | [T K, I], x's dtype       | rows in `order`'s order                       |
| y_ptr                | [T K, H], x's dtype       | rows are places                               |
| out_ptr              | [T, H], x's dtype         | contiguous                                    |

Grids of the products: (tiles, columns / BLOCK_N): one program computes BLOCK_M rows of one expert.
Tiles are the fast axis, so that neighbours read the same rows of the weight, of one expert, at the
same time. Tiles that are not used (the grid is an upper bound) end at once.

Numerics: sums are fp32, in the order of K; active and y are rounded to the dtype, as Hugging Face
does; a token's experts are added in the order of its choice. Bits of a row depend on the tile
sizes, not on the rows beside it; the sizes follow from the number of places. Offsets that multiply
a stride are int64. constexpr: everything fixed per model, and the tiles.

Tiles (H100, bf16) are a first choice, not measured: 16 rows while an expert has few places (decode:
the weights are the work, 16 rows are the least a tensor core takes), 64 and 128 beyond.
After the grouped products of MegaBlocks (arXiv 2211.15841).
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from engine.kernels.act_mul import activate
from engine.kernels.compile_ahead import launchable
from engine.kernels.moe_plan import TILE_ENTRY, plan_experts
from engine.kernels.moe_reference import check_activation


@dataclass(frozen=True)
class ExpertTiles:
    """Launch shape of both products."""

    block_m: int
    block_n: int
    block_k: int
    num_stages: int
    num_warps: int


def expert_tiles(num_places: int, num_experts: int, dtype: torch.dtype) -> ExpertTiles:
    """Tiles for a number of places; a float32 tile holds half as much."""
    share = num_places / num_experts
    if dtype == torch.float32:
        return ExpertTiles(16 if share <= 16 else 32, 32, 32, 2, 4)
    if share <= 16:
        return ExpertTiles(16, 64, 128, 4, 4)
    if share <= 64:
        return ExpertTiles(64, 64, 64, 4, 4)
    return ExpertTiles(128, 64, 64, 3, 8)


@triton.jit
def _load_tile(tiles_ptr, TILE_ENTRY: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert or -1, rows [BLOCK_M] of the order, which of them are the expert's)."""
    tile_ptr = tiles_ptr + tl.program_id(0) * TILE_ENTRY
    expert = tl.load(tile_ptr)
    rows = tl.load(tile_ptr + 1) + tl.arange(0, BLOCK_M)
    return expert, rows, rows < tl.load(tile_ptr + 2)


@launchable
@triton.jit
def _gate_up_kernel(
    x_ptr,
    gate_up_ptr,
    gate_up_bias_ptr,
    weights_ptr,
    order_ptr,
    tiles_ptr,
    active_ptr,
    stride_x,
    num_inner,
    width,
    swiglu_limit,
    swiglu_alpha,
    NUM_CHOSEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    TILE_ENTRY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    expert, rows, is_row = _load_tile(tiles_ptr, TILE_ENTRY, BLOCK_M)
    if expert >= 0:
        places = tl.load(order_ptr + rows, mask=is_row, other=0)
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        is_column = columns < width
        inner = tl.arange(0, BLOCK_K)
        tokens = (places // NUM_CHOSEN).to(tl.int64)
        x_ptrs = x_ptr + (tokens * stride_x)[:, None] + inner[None, :]
        expert_start = expert.to(tl.int64) * (2 * width)
        gate_rows = expert_start + columns
        gate_ptrs = gate_up_ptr + (gate_rows * num_inner)[None, :] + inner[:, None]
        up_offset = width.to(tl.int64) * num_inner
        factors = tl.full([BLOCK_M], 1.0, tl.float32)
        if weights_ptr is not None:
            factors = tl.load(weights_ptr + places, mask=is_row, other=0.0)
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, num_inner, BLOCK_K):
            if EVEN_K:
                x_mask = is_row[:, None]
                w_mask = is_column[None, :]
            else:
                is_inner = start + inner < num_inner
                x_mask = is_row[:, None] & is_inner[None, :]
                w_mask = is_column[None, :] & is_inner[:, None]
            x = tl.load(x_ptrs + start, mask=x_mask, other=0.0)
            if weights_ptr is not None:
                x = (x.to(tl.float32) * factors.to(x.dtype).to(tl.float32)[:, None]).to(x.dtype)
            gate_weight = tl.load(gate_ptrs + start, mask=w_mask, other=0.0)
            gate = tl.dot(x, gate_weight, gate, input_precision="ieee")
            up_weight = tl.load(gate_ptrs + up_offset + start, mask=w_mask, other=0.0)
            up = tl.dot(x, up_weight, up, input_precision="ieee")
        if gate_up_bias_ptr is not None:
            bias_ptrs = gate_up_bias_ptr + gate_rows
            gate += tl.load(bias_ptrs, mask=is_column, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias_ptrs + width, mask=is_column, other=0.0).to(tl.float32)[None, :]
        dtype = active_ptr.dtype.element_ty
        if ACTIVATION == "clamped_swiglu":
            gate = tl.minimum(gate, swiglu_limit)
            up = tl.minimum(tl.maximum(up, -swiglu_limit), swiglu_limit)
            active = ((up + 1.0) * (gate * tl.sigmoid(gate * swiglu_alpha))).to(dtype)
        else:
            active = activate(gate, up, dtype, ACTIVATION)
        active_ptrs = active_ptr + (rows.to(tl.int64) * width)[:, None] + columns[None, :]
        tl.store(active_ptrs, active, mask=is_row[:, None] & is_column[None, :])


@launchable
@triton.jit
def _down_kernel(
    active_ptr,
    down_ptr,
    down_bias_ptr,
    weights_ptr,
    order_ptr,
    tiles_ptr,
    y_ptr,
    num_columns,
    width,
    EVEN_K: tl.constexpr,
    TILE_ENTRY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    expert, rows, is_row = _load_tile(tiles_ptr, TILE_ENTRY, BLOCK_M)
    if expert >= 0:
        places = tl.load(order_ptr + rows, mask=is_row, other=0)
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        is_column = columns < num_columns
        inner = tl.arange(0, BLOCK_K)
        active_ptrs = active_ptr + (rows.to(tl.int64) * width)[:, None] + inner[None, :]
        down_rows = expert.to(tl.int64) * num_columns + columns
        down_ptrs = down_ptr + (down_rows * width)[None, :] + inner[:, None]
        y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, width, BLOCK_K):
            if EVEN_K:
                a_mask = is_row[:, None]
                w_mask = is_column[None, :]
            else:
                is_inner = start + inner < width
                a_mask = is_row[:, None] & is_inner[None, :]
                w_mask = is_column[None, :] & is_inner[:, None]
            active = tl.load(active_ptrs + start, mask=a_mask, other=0.0)
            weight = tl.load(down_ptrs + start, mask=w_mask, other=0.0)
            y = tl.dot(active, weight, y, input_precision="ieee")
        if down_bias_ptr is not None:
            bias = tl.load(down_bias_ptr + down_rows, mask=is_column, other=0.0)
            y += bias.to(tl.float32)[None, :]
        if weights_ptr is not None:
            y *= tl.load(weights_ptr + places, mask=is_row, other=0.0)[:, None]
        y_ptrs = y_ptr + (places.to(tl.int64) * num_columns)[:, None] + columns[None, :]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@launchable
@triton.jit
def _sum_kernel(y_ptr, out_ptr, num_columns, NUM_CHOSEN: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < num_columns
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(NUM_CHOSEN):
        row_ptr = y_ptr + (token * NUM_CHOSEN + choice) * num_columns
        total += tl.load(row_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + token * num_columns + columns
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=is_column)


def moe_experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
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
    """See `reference.moe_experts`. Nothing here waits for the device."""
    check_activation(activation)
    if x.stride(1) != 1:
        x = x.contiguous()
    num_tokens, num_inner = x.shape
    num_experts, _, width = down.shape
    num_chosen = experts.shape[1]
    num_places = experts.numel()
    out = torch.empty((num_tokens, num_inner), dtype=x.dtype, device=x.device)
    if not num_tokens:
        return out
    tiles = expert_tiles(num_places, num_experts, x.dtype)
    plan = plan_experts(experts, num_experts, tiles.block_m)
    active = torch.empty((num_places, width), dtype=x.dtype, device=x.device)
    y = torch.empty((num_places, num_inner), dtype=x.dtype, device=x.device)
    launch: dict[str, Any] = {
        "TILE_ENTRY": TILE_ENTRY,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        "enable_fp_fusion": True,
    }
    max_tiles = plan.tiles.shape[0]
    _gate_up_kernel[(max_tiles, triton.cdiv(width, tiles.block_n))](
        x,
        gate_up,
        gate_up_bias,
        weights if scales_input else None,
        plan.order,
        plan.tiles,
        active,
        x.stride(0),
        num_inner,
        width,
        swiglu_limit,
        swiglu_alpha,
        NUM_CHOSEN=num_chosen,
        ACTIVATION=activation,
        EVEN_K=num_inner % tiles.block_k == 0,
        **launch,
    )
    _down_kernel[(max_tiles, triton.cdiv(num_inner, tiles.block_n))](
        active,
        down,
        down_bias,
        None if scales_input else weights,
        plan.order,
        plan.tiles,
        y,
        num_inner,
        width,
        EVEN_K=width % tiles.block_k == 0,
        **launch,
    )
    sum_choices(y, out, num_chosen)
    return out


def sum_choices(y: torch.Tensor, out: torch.Tensor, num_chosen: int) -> None:
    """Write to `out` [T, H] the sums of each token's `num_chosen` rows of y [T K, H], in order."""
    num_tokens, num_columns = out.shape
    block = min(1024, triton.next_power_of_2(num_columns))
    _sum_kernel[(num_tokens, triton.cdiv(num_columns, block))](
        y, out, num_columns, NUM_CHOSEN=num_chosen, BLOCK=block, num_warps=4
    )
