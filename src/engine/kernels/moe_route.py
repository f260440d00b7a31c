"""Which experts each token takes, and with what weight.

    score = softmax(logits) or sigmoid(logits);  wanted = score + choice_bias
    the K largest `wanted` within the best groups;  weight = scale score (/ sum of the chosen)

| argument        | shape, dtype                | duty                                    |
|-----------------|-----------------------------|-----------------------------------------|
| logits_ptr      | [T, E] bf16, fp16 or fp32   | stride 1 along E, any along T           |
| choice_bias_ptr | [E] fp32                    | contiguous; None for none               |
| weights_ptr     | [T, K] fp32                 | contiguous, best first                  |
| experts_ptr     | [T, K] int32                | contiguous, in [0, E) whatever the logits |

Grid (T,): one program holds one token's scores in registers and takes the largest K times; the
first of equals wins. Rows of padding may hold anything, NaN included: they get valid experts.

Numerics: fp32. Row offsets are int64. constexpr: everything fixed per model; BLOCK_E is the power
of two >= E, at most a few hundred, so one warp does.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.compile_ahead import launchable
from engine.kernels.moe_reference import Routing


@launchable
@triton.jit
def _route_kernel(
    logits_ptr,
    choice_bias_ptr,
    weights_ptr,
    experts_ptr,
    stride_logits,
    scale,
    NUM_EXPERTS: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    IS_SOFTMAX: tl.constexpr,
    NORMALISES: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_CHOSEN_GROUPS: tl.constexpr,
    GROUP_TOP2: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_E)
    is_expert = columns < NUM_EXPERTS
    logits = tl.load(
        logits_ptr + token * stride_logits + columns, mask=is_expert, other=float("-inf")
    ).to(tl.float32)
    if IS_SOFTMAX:
        scores = tl.exp(logits - tl.max(logits, axis=0))
        scores = scores / tl.sum(scores, axis=0)
    else:
        scores = tl.sigmoid(logits)
    wanted = scores
    if choice_bias_ptr is not None:
        wanted += tl.load(choice_bias_ptr + columns, mask=is_expert, other=0.0)
    wanted = tl.where(is_expert, wanted, float("-inf"))

    if NUM_GROUPS > 1:
        GROUP_SIZE: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
        groups = columns // GROUP_SIZE
        # Every expert knows its group's score.
        group_scores = tl.full([BLOCK_E], float("-inf"), tl.float32)
        for group in tl.static_range(NUM_GROUPS):
            members = tl.where(groups == group, wanted, float("-inf"))
            best = tl.max(members, axis=0)
            if GROUP_TOP2:
                first = tl.argmax(members, axis=0)
                best += tl.max(tl.where(columns == first, float("-inf"), members), axis=0)
            group_scores = tl.where((groups == group) & is_expert, best, group_scores)
        is_open = columns < 0
        for _ in tl.static_range(NUM_CHOSEN_GROUPS):
            chosen_group = tl.argmax(group_scores, axis=0) // GROUP_SIZE
            is_open = is_open | (groups == chosen_group)
            group_scores = tl.where(groups == chosen_group, float("-inf"), group_scores)
        wanted = tl.where(is_open, wanted, float("-inf"))

    choices = tl.arange(0, BLOCK_K)
    weights = tl.zeros([BLOCK_K], tl.float32)
    experts = tl.zeros([BLOCK_K], tl.int32)
    for choice in tl.static_range(NUM_CHOSEN):
        expert = tl.minimum(tl.argmax(wanted, axis=0), NUM_EXPERTS - 1)
        score = tl.sum(tl.where(columns == expert, scores, 0.0), axis=0)
        weights = tl.where(choices == choice, score, weights)
        experts = tl.where(choices == choice, expert, experts)
        wanted = tl.where(columns == expert, float("-inf"), wanted)
    if NORMALISES:
        weights = weights / tl.maximum(tl.sum(weights, axis=0), 1e-20)
    is_choice = choices < NUM_CHOSEN
    places = token * NUM_CHOSEN + choices
    tl.store(weights_ptr + places, weights * scale, mask=is_choice)
    tl.store(experts_ptr + places, experts, mask=is_choice)


def moe_route(
    logits: torch.Tensor, choice_bias: torch.Tensor | None, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.moe_route`."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    num_tokens, num_experts = logits.shape
    size, device = (num_tokens, routing.num_chosen), logits.device
    weights = torch.empty(size, dtype=torch.float32, device=device)
    experts = torch.empty(size, dtype=torch.int32, device=device)
    if num_tokens:
        _route_kernel[(num_tokens,)](
            logits,
            choice_bias,
            weights,
            experts,
            logits.stride(0),
            routing.scale,
            NUM_EXPERTS=num_experts,
            NUM_CHOSEN=routing.num_chosen,
            IS_SOFTMAX=routing.scoring == "softmax",
            NORMALISES=routing.normalises,
            NUM_GROUPS=routing.num_groups,
            NUM_CHOSEN_GROUPS=routing.num_chosen_groups,
            GROUP_TOP2=routing.group_score == "top2",
            BLOCK_E=triton.next_power_of_2(num_experts),
            BLOCK_K=triton.next_power_of_2(routing.num_chosen),
            num_warps=1,
            enable_fp_fusion=True,
        )
    return weights, experts
