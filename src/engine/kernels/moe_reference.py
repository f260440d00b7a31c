"""Plain-torch twins of the mixture-of-experts kernels; `reference` has the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.errors import ConfigError

SCORINGS = ("softmax", "sigmoid")
EXPERT_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "clamped_swiglu")


def check_activation(activation: str) -> None:
    """Refuse an activation that experts do not have.

    Raises:
        ConfigError: With those that they have.
    """
    if activation not in EXPERT_ACTIVATIONS:
        msg = f"activation={activation!r} must be one of {', '.join(EXPERT_ACTIVATIONS)}."
        raise ConfigError(msg)


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How a token chooses its experts. Letters: E experts, K chosen per token.

    Attributes:
        num_chosen: K.
        scoring: "softmax" over all experts, or "sigmoid" of each logit.
        normalises: Whether the weights of the chosen experts are divided by their sum.
        scale: Factor on the weights, after that.
        num_groups: Groups of neighbouring experts of which only the best are looked into; 1: all
            experts are one group.
        num_chosen_groups: How many.
        group_score: What makes a group good: "max", or "top2" for the sum of its two best scores.
    """

    num_chosen: int
    scoring: str = "softmax"
    normalises: bool = True
    scale: float = 1.0
    num_groups: int = 1
    num_chosen_groups: int = 1
    group_score: str = "max"


def moe_route(
    logits: torch.Tensor, choice_bias: torch.Tensor | None, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen experts of each token and their weights.

    `score = scoring(logits)`; the K experts with the largest `score + choice_bias` within the best
    groups are chosen, the smaller number first among equals; `weight = scale * score`, or
    `scale * score / sum of the chosen scores`.

    Args:
        logits: [T, E].
        choice_bias: [E], counts for the choice and not for the weights; None for none.
        routing: The rules.

    Returns:
        (weights [T, K] float32, experts [T, K] int32), best first.
    """
    wide = logits.float()
    scores = wide.softmax(-1) if routing.scoring == "softmax" else sigmoid_by_row(wide)
    wanted = scores if choice_bias is None else scores + choice_bias
    if routing.num_groups > 1:
        groups = wanted.unflatten(-1, (routing.num_groups, -1))
        best = groups.topk(2 if routing.group_score == "top2" else 1, -1).values.sum(-1)
        chosen = best.topk(routing.num_chosen_groups, -1).indices
        is_open = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, chosen, True)
        wanted = groups.masked_fill(~is_open[..., None], float("-inf")).flatten(-2)
    # A stable sort, unlike topk, says who goes first among equals.
    experts = wanted.sort(dim=-1, descending=True, stable=True).indices[:, : routing.num_chosen]
    weights = scores.gather(-1, experts)
    if routing.normalises:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
    return weights * routing.scale, experts.to(torch.int32)


def expert_activation(
    gate_up: torch.Tensor, activation: str, swiglu_limit: float, swiglu_alpha: float
) -> torch.Tensor:
    """`activation(gate) * up` of [..., 2 I].

    "clamped_swiglu" (gpt-oss): gate is at most the limit, up within plus and minus the limit, and
    `gate * sigmoid(alpha * gate) * (up + 1)`.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "clamped_swiglu":
        gate = gate.clamp(max=swiglu_limit)
        up = up.clamp(-swiglu_limit, swiglu_limit)
        return (up + 1) * (gate * sigmoid_by_row(gate * swiglu_alpha))
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def sigmoid_by_row(x: torch.Tensor) -> torch.Tensor:
    """Sigmoid of [..., N], a row's bits independent of how many rows there are.

    On a CPU torch takes contiguous tensors as one long vector, whose last few numbers (those that
    do not fill a register) round otherwise than the rest. Rows with a gap between them are taken
    one by one.
    """
    return F.pad(x, (0, 1))[..., :-1].sigmoid()


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
    """Weighted sum of each token's experts: `sum_k w_k down_k(act(gate_up_k(x)))`.

    Args:
        x: [T, H].
        gate_up: [E, 2 I, H], gate in the first half of the rows.
        down: [E, H, I].
        gate_up_bias: [E, 2 I] or None.
        down_bias: [E, H] or None.
        weights: [T, K] float32.
        experts: [T, K] int32 in [0, E).
        activation: One of `EXPERT_ACTIVATIONS`; see `expert_activation`.
        scales_input: Whether the weight multiplies the expert's input instead of its output.
        swiglu_limit: Of "clamped_swiglu".
        swiglu_alpha: Of "clamped_swiglu".

    Returns:
        New [T, H]; sums are float32 and rounded once per product.
    """

    def one_expert(expert: int, rows: torch.Tensor) -> torch.Tensor:
        wide = rows.float() @ gate_up[expert].float().T
        if gate_up_bias is not None:
            wide += gate_up_bias[expert]
        active = expert_activation(wide, activation, swiglu_limit, swiglu_alpha).to(x.dtype)
        y = active.float() @ down[expert].float().T
        return y if down_bias is None else y + down_bias[expert]

    return sum_of_experts(x, weights, experts, one_expert, scales_input=scales_input)


def sum_of_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    one_expert: Callable[[int, torch.Tensor], torch.Tensor],
    *,
    scales_input: bool,
) -> torch.Tensor:
    """Weighted sum of `one_expert(number, rows [R, H]) -> [R, H]` over each token's experts.

    Tokens are sorted by expert, so that each expert runs once. A token's experts are added in the
    order of its choice, whoever else is in the batch.
    """
    num_tokens, num_chosen = experts.shape
    numbers = experts.flatten().long()
    order = numbers.argsort(stable=True)
    counts = numbers.bincount().tolist()
    rows = x.index_select(0, order // num_chosen)
    if scales_input:
        rows = rows * weights.flatten()[order, None].to(x.dtype)
    parts = []
    start = 0
    for expert, count in enumerate(counts):
        if count:
            parts.append(one_expert(expert, rows[start : start + count]))
            start += count
    by_choice = torch.empty(len(order), x.shape[1], dtype=torch.float32, device=x.device)
    by_choice[order] = torch.cat(parts).float()
    by_choice = by_choice.view(num_tokens, num_chosen, -1)
    if not scales_input:
        by_choice *= weights[..., None]
    total = by_choice[:, 0]
    for choice in range(1, num_chosen):
        total = total + by_choice[:, choice]
    return total.to(x.dtype)
