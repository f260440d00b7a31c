"""Put the weights that a checkpoint has in codes into a `Decoder` without expanding them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import torch

from engine.errors import UnsupportedModelError
from engine.layers.cpu_quantised import CPUFactory, has_quick_products
from engine.layers.gpu_quantised import CodedLinear, GPUFactory
from engine.layers.linear import Linear
from engine.layers.quantised_linear import StepRows
from engine.models.quantised_plan import QuantisedPlan
from engine.models.weight_loading import FamilyCheckpoint, WeightSource, load_weights

if TYPE_CHECKING:
    from engine.layers.quantised_factory import QuantisedFactory
    from engine.models.decoder import Decoder
    from engine.models.quantiser import Quantiser

logger = logging.getLogger(__name__)


def make_factory(
    device: torch.device,
    dtype: torch.dtype,
    rows: StepRows,
    *,
    saves_memory: bool = False,
    batch_invariant: bool = False,
) -> QuantisedFactory | None:
    """What makes quantised layers for a device; None where all weights are expanded.

    Args:
        device: Of the model.
        dtype: Of its activations.
        rows: Where the decoder's forward says which rows decode.
        saves_memory: Prefer small weights to quick products, where there is a choice: on a CPU.
        batch_invariant: As in `Decoder`.
    """
    if device.type == "cpu":
        return CPUFactory(dtype, rows, saves_memory=saves_memory)
    if device.type == "cuda":
        return GPUFactory(device, dtype, batch_invariant=batch_invariant)
    return None


def runs_in_codes(device: torch.device, dtype: torch.dtype, *, is_needed: bool) -> bool:
    """Whether weights in codes stay in codes on a device.

    Args:
        device: Of the model.
        dtype: Of its activations.
        is_needed: Whether products that are slower than expanded weights are welcome all the same,
            because the weights may not fit otherwise.
    """
    if device.type == "cuda":
        return True
    return is_needed or has_quick_products(dtype)


@dataclass(frozen=True, slots=True)
class CodesPlan:
    """Weights in codes that are not loaded yet.

    Attributes:
        num_bytes: Memory that all weights of the model will take.
        room_bytes: Memory that their products share beside it.
        factory: Where the forward says which rows decode -> what makes the layers.
    """

    num_bytes: int
    room_bytes: int
    factory: Callable[[StepRows], QuantisedFactory | None]


def plan_codes(
    shapes: Decoder,
    checkpoint: WeightSource,
    device: torch.device,
    dtype: torch.dtype,
    *,
    saves_memory: bool,
    batch_invariant: bool = False,
    quantiser: Quantiser | None = None,
) -> CodesPlan:
    """What loading a checkpoint in codes will take; nothing is loaded.

    Args:
        shapes: The model, on the "meta" device.
        checkpoint: Its weights.
        device: That will have them.
        dtype: Of activations, and of weights that are plain numbers.
        saves_memory: As in `make_factory`.
        batch_invariant: Likewise.
        quantiser: Makes codes of plain weights.

    Raises:
        CheckpointError: Tensors are missing, unknown or of the wrong shape.
        UnsupportedModelError: The family does not take weights in codes.
        ConfigError: There is a quantiser, and the weights are in codes already.
    """
    make = partial(
        make_factory, device, dtype, saves_memory=saves_memory, batch_invariant=batch_invariant
    )
    factory = make(StepRows())
    assert factory is not None, "only devices that have one are asked"
    plan = QuantisedPlan(shapes, load_weights(shapes, checkpoint, quantiser), factory)
    if quantiser is not None and plan.expanded:
        msg = (
            f"quantization={quantiser.name!r} cannot be done on {device.type} for "
            f"{next(iter(plan.expanded))!r} and {len(plan.expanded) - 1} other weights of "
            f"{shapes.config.architecture}: there is no quantised product for them. Leave "
            "quantization out."
        )
        raise UnsupportedModelError(msg)
    return CodesPlan(plan.num_bytes(dtype, device), factory.room_bytes, make)


def load_quantised(
    decoder: Decoder, family: FamilyCheckpoint, factory: QuantisedFactory
) -> set[str]:
    """Replace every layer of `decoder` whose weights are in codes; call before loading the others.

    What the factory does not take stays for `Decoder.load` to expand, which is said in the log.

    Args:
        decoder: Nothing loaded yet.
        family: Its checkpoint, checked.
        factory: Of the decoder's device.

    Returns:
        Full names of the weights and biases that need no loading any more.
    """
    plan = QuantisedPlan(decoder, family, factory)
    loaded = plan.names
    for place in plan.linears:
        linear = cast("Linear", getattr(place.owner, place.attribute))
        if linear.bias is not None:
            start = 0
            for name, rows in zip(place.names, linear.parts.values(), strict=True):
                family.read_into(f"{name}.bias", linear.bias[start : start + rows])
                loaded.add(f"{name}.bias")
                start += rows
        quantised = factory.linear(place.stored, linear.bias, is_output=False)
        setattr(place.owner, place.attribute, quantised)
    for experts in plan.experts:
        factory.experts(experts.layer, experts.gate_up, experts.down)
    if plan.output is not None:
        bias = decoder.lm_head.bias
        if bias is not None:
            family.read_into("lm_head.bias", bias)
            loaded.add("lm_head.bias")
        decoder.lm_head = factory.linear([plan.output], bias, is_output=True)
    if plan.embedding is not None:
        decoder.embedding = factory.embedding(plan.embedding, decoder.embedding.scale)
    _warn_of_expanded(decoder, plan)
    return loaded


def joins_codes(decoder: Decoder) -> bool:
    """Whether norms and residual sums may join the products of one row: all layers have codes."""
    return all(
        isinstance(owner_linear, CodedLinear)
        for layer in decoder.layers
        for owner in (layer.attention, layer.mlp)
        for owner_linear in vars(owner).values()
        if isinstance(owner_linear, Linear)
    )


def _warn_of_expanded(decoder: Decoder, plan: QuantisedPlan) -> None:
    # A table of rows is small beside the layers, and many formats leave it out anyway.
    expanded = {name: size for name, size in plan.expanded.items() if "embed" not in name}
    if not expanded:
        return
    logger.warning(
        "%d quantised weights (%s, …) have no quantised product on %s and were expanded to %s: "
        "%.2f GiB",
        len(expanded),
        next(iter(expanded)),
        decoder.device,
        decoder.dtype,
        sum(expanded.values()) * decoder.dtype.itemsize / 2**30,
    )
