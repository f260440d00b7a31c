"""compressed-tensors' `quantization_config`: groups of layers, each with a scheme of its own.

Source: `QuantizationConfig` and `QuantizationScheme` of vllm-project/compressed-tensors. A layer
belongs to the group that names it, else to one whose pattern (`re:…`) matches, else to the one for
its class ("Linear"); `ignore` is read the same way and wins.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from engine.loader.quantisation_values import QuantisationValues
from engine.loader.weight_scheme import WeightScheme

if TYPE_CHECKING:
    from collections.abc import Callable

_CLASS = "Linear"
_INT_FORMATS = ("int-quantized", "naive-quantized")
_FLOAT_FORMATS = ("float-quantized", "naive-quantized")


def compressed_rules(values: QuantisationValues) -> Callable[[str], WeightScheme | None]:
    """Name of a layer -> its scheme, None for plain numbers.

    Raises:
        UnsupportedModelError: A group's scheme is unknown, or the weights are sparse.
    """
    sparsity = values.get("sparsity_config")
    if sparsity and sparsity.get("format", "dense") != "dense":
        raise values.error("sparsity_config.format", sparsity.get("format"), "dense weights")
    ignore = values.names("ignore")
    whole_format = values.text("format", "")
    groups: list[tuple[tuple[str, ...], WeightScheme]] = []
    for name, group in values.mapping("config_groups").items():
        entry = QuantisationValues(group, f"{values.place}.config_groups[{name!r}]")
        if entry.get("weights") is None:
            continue
        scheme = _scheme(entry, entry.text("format", whole_format))
        groups.append((entry.names("targets"), scheme))
    if not groups:
        raise values.error("config_groups", values.get("config_groups"), "groups with weights")

    def scheme_of(module: str) -> WeightScheme | None:
        if any(_rank(target, module) for target in ignore):
            return None
        ranked = [
            (_rank(target, module), scheme) for targets, scheme in groups for target in targets
        ]
        rank, scheme = max(ranked, key=lambda pair: pair[0])
        return scheme if rank else None

    return scheme_of


def _rank(target: str, module: str) -> int:
    """How closely a target means a layer: 3 by name, 2 by pattern, 1 by class, 0 not at all."""
    if target == module:
        return 3
    if target.startswith("re:"):
        return 2 if re.match(target.removeprefix("re:"), module) else 0
    return 1 if target == _CLASS else 0


def _scheme(entry: QuantisationValues, kind: str) -> WeightScheme:
    weights = QuantisationValues(entry.get("weights"), f"{entry.place}.weights")
    numbers = weights.text("type", "int")
    is_symmetric = weights.flag("symmetric", True)
    if kind == "mxfp4-pack-quantized":
        return WeightScheme(layout="mxfp4-packed", bits=4, group=32)
    if kind == "pack-quantized" and numbers == "int":
        strategy = _strategy(weights, ("group", "channel", "tensor"))
        return WeightScheme(
            layout="packed",
            bits=weights.one_of("num_bits", (2, 3, 4, 5, 6, 8)),
            group=weights.group_size("group_size") if strategy == "group" else 0,
            is_symmetric=is_symmetric,
        )
    is_float = numbers == "float" and kind in _FLOAT_FORMATS
    if not is_float and not (numbers == "int" and kind in _INT_FORMATS):
        allowed = "pack-quantized, int-quantized, float-quantized or mxfp4-pack-quantized"
        raise entry.error("format", f"{kind} of {numbers} numbers", allowed)
    strategy = _strategy(weights, ("tensor", "channel", "block", "group"))
    tiles = {"tensor": (0, 0), "channel": (1, 0)}
    if strategy == "block":
        tile = weights.two_sizes("block_structure")
    elif strategy == "group":
        tile = (1, weights.group_size("group_size"))
    else:
        tile = tiles[strategy]
    activations, group = _activations(entry.get("input_activations"), entry.place)
    return WeightScheme(
        layout="eight",
        bits=weights.one_of("num_bits", (8,)),
        tile=tile,
        is_symmetric=is_symmetric,
        is_float=is_float,
        activations=activations,
        activation_group=group,
    )


def _strategy(values: QuantisationValues, allowed: tuple[str, ...]) -> str:
    default = "group" if values.get("group_size") is not None else "tensor"
    strategy = values.text("strategy", default)
    if strategy not in allowed:
        raise values.error("strategy", strategy, " or ".join(allowed))
    return strategy


def _activations(found: Any, place: str) -> tuple[str, int]:
    if found is None:
        return "none", 0
    values = QuantisationValues(found, f"{place}.input_activations")
    if values.get("num_bits") not in (8, 16):
        raise values.error("num_bits", values.get("num_bits"), "8")
    if not values.get("dynamic"):
        return "tensor", 0
    strategy = values.text("strategy", "token")
    return ("group", values.group_size("group_size")) if strategy == "group" else ("token", 0)
