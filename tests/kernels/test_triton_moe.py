"""The Triton kernels of experts against their twins; see `test_triton_kernels.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import TOLERANCE
from triton_cases import DTYPES, IS_INTERPRETED, NEEDS_TRITON, kernels, on_gpu_only

from engine.errors import ConfigError
from engine.kernels import reference
from engine.kernels.moe_reference import EXPERT_ACTIVATIONS, Routing

pytestmark = NEEDS_TRITON

ROUTINGS = [
    Routing(num_chosen=1, scoring="sigmoid", normalises=False),
    Routing(num_chosen=2),
    Routing(num_chosen=3, normalises=False, scale=2.5),
    Routing(num_chosen=4, scoring="sigmoid", num_groups=3, num_chosen_groups=2, group_score="top2"),
    Routing(num_chosen=3, num_groups=6, num_chosen_groups=3),
]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if IS_INTERPRETED else "cuda")


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_experts", [12, *on_gpu_only(60, 66, 240)])
def test_moe_route(
    device: torch.device, routing: Routing, has_bias: bool, num_experts: int
) -> None:
    outer = torch.randn(7, num_experts + 5, device=device)
    logits = outer[:, :num_experts]
    bias = torch.randn(num_experts, device=device) if has_bias else None
    weights, experts = kernels("moe_route").moe_route(logits, bias, routing)
    want_weights, want_experts = reference.moe_route(logits, bias, routing)
    assert torch.equal(experts, want_experts)
    torch.testing.assert_close(weights, want_weights)


def test_equal_scores_go_to_the_first_expert(device: torch.device) -> None:
    logits = torch.zeros(2, 5, device=device)
    _, experts = kernels("moe_route").moe_route(logits, None, Routing(num_chosen=3))
    assert experts.tolist() == [[0, 1, 2]] * 2


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_padding_gets_valid_experts(device: torch.device) -> None:
    logits = torch.full((2, 5), float("nan"), device=device)
    _, experts = kernels("moe_route").moe_route(logits, None, Routing(num_chosen=3))
    assert ((experts >= 0) & (experts < 5)).all()


@pytest.mark.parametrize(
    ("num_places", "num_experts", "rows"),
    [(1, 3, 16), (40, 5, 16), (300, 7, 32), *on_gpu_only((70_000, 128, 128))],
)
def test_plan_sorts_places_and_cuts_tiles(
    device: torch.device, num_places: int, num_experts: int, rows: int
) -> None:
    # Some experts are chosen by nobody, one by many.
    experts = torch.randint(0, num_experts, (num_places, 1), device=device, dtype=torch.int32)
    experts[experts == 1] = 2
    plan = kernels("moe_plan").plan_experts(experts, num_experts, rows)
    order = plan.order.tolist()
    assert order == experts.flatten().argsort(stable=True).tolist()
    used = [tile for tile in plan.tiles.tolist() if tile[0] >= 0]
    assert plan.tiles.tolist()[: len(used)] == used
    covered = []
    for expert, first, end in used:
        mine = list(range(first, min(first + rows, end)))
        assert mine
        assert all(experts[order[row], 0] == expert for row in mine)
        covered += mine
    assert covered == list(range(num_places))


def case(
    device: torch.device, dtype: torch.dtype, num_tokens: int, sizes: tuple[int, int, int, int]
) -> dict[str, Any]:
    num_experts, hidden, width, num_chosen = sizes

    def random(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, device=device) * scale).to(dtype)

    outer = torch.full((num_tokens, hidden + 8), float("nan"), dtype=dtype, device=device)
    outer[:, :hidden] = random(num_tokens, hidden)
    scores = torch.rand(num_tokens, num_experts, device=device)
    # The last expert is chosen by nobody: its weights must not be read.
    scores[:, -1] = -1.0
    gate_up = random(num_experts, 2 * width, hidden, scale=hidden**-0.5)
    down = random(num_experts, hidden, width, scale=width**-0.5)
    gate_up[-1] = float("nan")
    down[-1] = float("nan")
    return {
        "x": outer[:, :hidden],
        "gate_up": gate_up,
        "down": down,
        "gate_up_bias": random(num_experts, 2 * width, scale=0.25),
        "down_bias": random(num_experts, hidden, scale=0.25),
        "weights": torch.rand(num_tokens, num_chosen, device=device).softmax(-1),
        "experts": scores.topk(num_chosen).indices.to(torch.int32),
    }


SIZES = [
    (5, 70, 40, 2),
    *on_gpu_only((9, 576, 384, 1), (65, 512, 200, 8), (33, 2880, 704, 4)),
]
NUM_TOKENS = [1, 5, 90] if IS_INTERPRETED else [1, 5, 64, 600, 3000]


def assert_like_reference(inputs: dict[str, Any], **options: Any) -> None:
    got = kernels("moe_experts").moe_experts(**inputs, **options)
    # Without the expert that nobody chose, whose NaN the sorted reference never reads either.
    want = reference.moe_experts(**inputs, **options)
    dtype = inputs["x"].dtype
    # Six roundings on the way (both products, activation, gating, weight, sum), not three.
    tolerance = {key: 2 * value for key, value in TOLERANCE[dtype].items()}
    torch.testing.assert_close(got.double(), want.double(), **tolerance)
    assert torch.equal(kernels("moe_experts").moe_experts(**inputs, **options), got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_moe_experts(
    device: torch.device, dtype: torch.dtype, num_tokens: int, sizes: tuple[int, int, int, int]
) -> None:
    assert_like_reference(case(device, dtype, num_tokens, sizes), activation="silu")


@pytest.mark.parametrize("activation", EXPERT_ACTIVATIONS)
@pytest.mark.parametrize("scales_input", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_moe_experts_of_every_kind(
    device: torch.device, activation: str, scales_input: bool, has_bias: bool
) -> None:
    inputs = case(device, torch.float32, 6, (4, 36, 20, 2))
    if not has_bias:
        inputs |= {"gate_up_bias": None, "down_bias": None}
    assert_like_reference(
        inputs,
        activation=activation,
        scales_input=scales_input,
        swiglu_limit=0.7,
        swiglu_alpha=1.7,
    )


def test_unknown_activation_is_named(device: torch.device) -> None:
    with pytest.raises(ConfigError, match="'relu'"):
        kernels("moe_experts").moe_experts(
            **case(device, torch.float32, 1, (3, 16, 16, 1)), activation="relu"
        )


@pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter captures nothing")
def test_experts_are_captured_in_a_graph(device: torch.device) -> None:
    """Replays follow choices that the host does not know."""
    inputs = case(device, torch.bfloat16, 40, (9, 576, 384, 2))
    run = kernels("moe_experts").moe_experts
    run(**inputs, activation="silu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(**inputs, activation="silu")
    for _ in range(3):
        chosen = torch.rand(40, 8, device=device).topk(2).indices.to(torch.int32)
        inputs["experts"].copy_(chosen)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, run(**inputs, activation="silu"))
