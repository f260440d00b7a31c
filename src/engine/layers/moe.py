"""`MixtureOfExperts`: a feed-forward half whose tokens choose among many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from engine.kernels import dispatch
from engine.kernels.moe_reference import (
    Routing,
    expert_activation,
    sigmoid_by_row,
    sum_of_experts,
)
from engine.kernels.quantised_layout import CodePlanes
from engine.layers.linear import Linear, can_pack, packed_linear
from engine.layers.mlp import GatedMLP
from engine.layers.quantised_linear import Product, StepRows


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """One layer's experts.

    Attributes:
        num_experts: E.
        intermediate_size: I, width of one expert.
        routing: How tokens choose.
        activation: One of `moe_reference.EXPERT_ACTIVATIONS`.
        swiglu_limit: Bound of "clamped_swiglu".
        swiglu_alpha: Steepness of "clamped_swiglu".
        scales_input: Whether a weight multiplies the expert's input instead of its output.
        router_bias: Whether the router's product has a bias.
        router_in_float32: Whether logits are computed in float32.
        has_choice_bias: Whether there is a bias that counts for the choice alone.
        expert_bias: Whether the experts' projections have biases.
        shared_size: Width of the feed-forward that every token takes, too; 0 for none.
        shared_activation: Of it.
        shared_bias: Whether its projections have biases.
        gates_shared: Whether each token weighs it.
    """

    num_experts: int
    intermediate_size: int
    routing: Routing
    activation: str = "silu"
    swiglu_limit: float = 0.0
    swiglu_alpha: float = 1.0
    scales_input: bool = False
    router_bias: bool = False
    router_in_float32: bool = False
    has_choice_bias: bool = False
    expert_bias: bool = False
    shared_size: int = 0
    shared_activation: str = "silu"
    shared_bias: bool = False
    gates_shared: bool = False


class MixtureOfExperts:
    """`sum over chosen experts of weight * expert(x)`, and a shared feed-forward beside it.

    Experts' weights are one tensor [E, 2 I, H] (gate above up) and one [E, H, I]. On a CPU
    `finish_loading` brings each expert into oneDNN's layout, for the reasons in `Linear`; a token's
    result is then independent of its neighbours, bit by bit.

    Args:
        hidden_size: H.
        config: The experts.
        device: Where the weights live.
        dtype: Of weights and activations.
        batch_invariant: As in `Linear`, for router and shared feed-forward. The experts' kernels
            always compute a row by itself.
    """

    gate_up: torch.Tensor
    down: torch.Tensor

    def __init__(
        self,
        hidden_size: int,
        config: ExpertsConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch_invariant: bool,
    ) -> None:
        self.config = config
        num, width = config.num_experts, config.intermediate_size

        def linear(parts: dict[str, int], dtype: torch.dtype, *, bias: bool = False) -> Linear:
            return Linear(
                hidden_size,
                parts,
                bias=bias,
                device=device,
                dtype=dtype,
                batch_invariant=batch_invariant,
            )

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        router_dtype = torch.float32 if config.router_in_float32 else dtype
        self.router = linear({"gate": num}, router_dtype, bias=config.router_bias)
        self.choice_bias = None
        if config.has_choice_bias:
            self.choice_bias = torch.empty(num, device=device, dtype=torch.float32)
        # Allocated when they are asked for: quantised experts need no plain ones.
        self._allocate = {
            "gate_up": partial(empty, num, 2 * width, hidden_size),
            "down": partial(empty, num, hidden_size, width),
        }
        self.gate_up_bias = empty(num, 2 * width) if config.expert_bias else None
        self.down_bias = empty(num, hidden_size) if config.expert_bias else None
        self.shared = self.shared_gate = None
        if config.shared_size:
            self.shared = GatedMLP(
                hidden_size,
                config.shared_size,
                activation=config.shared_activation,
                bias=config.shared_bias,
                device=device,
                dtype=dtype,
                batch_invariant=batch_invariant,
            )
            if config.gates_shared:
                self.shared_gate = linear({"shared_expert_gate": 1}, dtype)
        self._packed: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._products: Sequence[tuple[Product, Product]] = ()
        self._planes: tuple[CodePlanes, CodePlanes] | None = None
        self._rows = StepRows()

    @property
    def has_products(self) -> bool:
        """Whether the experts' weights are quantised."""
        return bool(self._products)

    def use_products(self, products: Sequence[tuple[Product, Product]], rows: StepRows) -> None:
        """Compute with quantised weights instead of the layer's own; call before loading.

        Args:
            products: (gate above up, down) of each expert.
            rows: Which rows of the running step decode.
        """
        self._products, self._rows = products, rows
        self._allocate.clear()

    def use_planes(self, gate_up: CodePlanes, down: CodePlanes) -> None:
        """Compute with weights of codes instead of the layer's own; call before loading.

        Args:
            gate_up: [E 2 I, H], experts below each other, each with its gate above its up.
            down: [E H, I].
        """
        self._planes = (gate_up, down)
        self._allocate.clear()

    def __getattr__(self, name: str) -> torch.Tensor:
        # Only asked for what is not there.
        allocate = self.__dict__.get("_allocate", {}).get(name)
        if allocate is None:
            raise AttributeError(name)
        weight: torch.Tensor = allocate()
        setattr(self, name, weight)
        return weight

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Views under the checkpoint's names; first all gates and ups, then all downs."""
        yield from self.router.named_weights()
        if self.choice_bias is not None:
            yield "gate.e_score_correction_bias", self.choice_bias
        width = self.config.intermediate_size
        has_own = not self._products and self._planes is None
        for kind, both in (
            ("weight", self.gate_up if has_own else None),
            ("bias", self.gate_up_bias),
        ):
            for expert in range(0 if both is None else self.config.num_experts):
                assert both is not None
                yield f"experts.{expert}.gate_proj.{kind}", both[expert, :width]
                yield f"experts.{expert}.up_proj.{kind}", both[expert, width:]
        for kind, down in (("weight", self.down if has_own else None), ("bias", self.down_bias)):
            for expert in range(0 if down is None else self.config.num_experts):
                assert down is not None
                yield f"experts.{expert}.down_proj.{kind}", down[expert]
        if self.shared is not None:
            for name, weight in self.shared.named_weights():
                yield f"shared_expert.{name}", weight
        if self.shared_gate is not None:
            yield from self.shared_gate.named_weights()

    def finish_loading(self) -> None:
        """See `Linear.finish_loading`."""
        self.router.finish_loading()
        if self.shared is not None:
            self.shared.finish_loading()
        if self.shared_gate is not None:
            self.shared_gate.finish_loading()
        if not self._products and self._planes is None and can_pack(self.gate_up):
            reorder = torch.ops.mkldnn._reorder_linear_weight
            self._packed = [
                (reorder(gate_up, None), reorder(down, None))
                for gate_up, down in zip(self.gate_up, self.down, strict=True)
            ]
            self.gate_up = self.down = self.gate_up.new_empty(0)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """New [T, H] from x [T, H]."""
        config = self.config
        logits = self.router(x.float() if config.router_in_float32 else x)  # [T, E]
        weights, experts = dispatch.moe_route(logits, self.choice_bias, config.routing)
        if self._planes is not None:
            y = dispatch.quantised_experts(
                x,
                *self._planes,
                self.gate_up_bias,
                self.down_bias,
                weights,
                experts,
                activation=config.activation,
                scales_input=config.scales_input,
                swiglu_limit=config.swiglu_limit,
                swiglu_alpha=config.swiglu_alpha,
            )
        elif self._products:
            y = self._with_products(x, weights, experts)
        elif self._packed:
            y = sum_of_experts(
                x, weights, experts, self._packed_expert, scales_input=config.scales_input
            )
        else:
            y = dispatch.moe_experts(
                x,
                self.gate_up,
                self.down,
                self.gate_up_bias,
                self.down_bias,
                weights,
                experts,
                activation=config.activation,
                scales_input=config.scales_input,
                swiglu_limit=config.swiglu_limit,
                swiglu_alpha=config.swiglu_alpha,
            )
        if self.shared is None:
            return y
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared *= sigmoid_by_row(self.shared_gate(x))
        return y.add_(shared)

    def _with_products(
        self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor
    ) -> torch.Tensor:
        # Rows of one expert stand in the order of their tokens: those that decode come first.
        decoding = experts[: self._rows.num_decodes].flatten().long()
        num_decodes = decoding.bincount(minlength=self.config.num_experts).tolist()

        def one_expert(expert: int, rows: torch.Tensor) -> torch.Tensor:
            gate_up, down = self._products[expert]
            both = gate_up(rows, num_decodes[expert])
            if self.gate_up_bias is not None:
                both += self.gate_up_bias[expert]
            active = expert_activation(
                both, self.config.activation, self.config.swiglu_limit, self.config.swiglu_alpha
            )
            y = down(active, num_decodes[expert])
            return y if self.down_bias is None else y.add_(self.down_bias[expert])

        return sum_of_experts(
            x, weights, experts, one_expert, scales_input=self.config.scales_input
        )

    def _packed_expert(self, expert: int, rows: torch.Tensor) -> torch.Tensor:
        config = self.config
        gate_up, down = self._packed[expert]
        gate_up_bias = None if self.gate_up_bias is None else self.gate_up_bias[expert]
        down_bias = None if self.down_bias is None else self.down_bias[expert]
        active = expert_activation(
            packed_linear(rows, gate_up, gate_up_bias),
            config.activation,
            config.swiglu_limit,
            config.swiglu_alpha,
        )
        return packed_linear(active, down, down_bias)
