"""`quantization_config` of a checkpoint's config.json, read into `WeightScheme`s layer by layer."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.errors import UnsupportedModelError
from engine.loader.quantisation_compressed import compressed_rules
from engine.loader.quantisation_values import QuantisationValues
from engine.loader.weight_scheme import WeightScheme

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True, slots=True)
class QuantisationConfig:
    """How the layers of a checkpoint are stored.

    Attributes:
        method: As the config calls it.
        scheme_of: Name of a layer -> its scheme; None for one that is stored as plain numbers.
    """

    method: str
    scheme_of: Callable[[str], WeightScheme | None]


def read_quantisation(config: Mapping[str, Any]) -> QuantisationConfig | None:
    """The description in a `config.json`; None where the weights are plain numbers.

    Raises:
        UnsupportedModelError: The method, or one of its settings, is unknown or nonsense.
    """
    found = next((config[key] for key in _KEYS if config.get(key) is not None), None)
    if found is None:
        return None
    values = QuantisationValues(found)
    method = values.method()
    if method not in METHODS:
        msg = (
            f"config.json: quantization_config.quant_method is {method!r}; the engine runs "
            f"{', '.join(METHODS)}, and GGUF files. Use a checkpoint in one of these formats."
        )
        raise UnsupportedModelError(msg)
    return QuantisationConfig(method, METHODS[method](values))


def _gptq(values: QuantisationValues) -> Callable[[str], WeightScheme | None]:
    kind = values.text("checkpoint_format", values.text("format", "gptq"))
    if kind not in ("gptq", "gptq_v2"):
        raise values.error("checkpoint_format", kind, "gptq or gptq_v2")
    if values.text("pack_dtype", "int32") != "int32":
        raise values.error("pack_dtype", values.get("pack_dtype"), "int32")
    base = WeightScheme(
        layout="gptq",
        bits=values.one_of("bits", (2, 3, 4, 8)),
        group=values.group_size("group_size"),
        zeros_less_one=kind == "gptq",
    )
    skips = values.names("modules_to_not_convert")
    dynamic = values.mapping("dynamic")

    def scheme_of(module: str) -> WeightScheme | None:
        if names_module(skips, module):
            return None
        for pattern, changes in dynamic.items():
            if re.match(pattern.removeprefix("-:").removeprefix("+:"), module) is None:
                continue
            if pattern.startswith("-:"):
                return None
            own = QuantisationValues({"bits": base.bits, **changes}, f"dynamic[{pattern!r}]")
            group = own.group_size("group_size") if "group_size" in changes else base.group
            return replace(base, bits=own.one_of("bits", (2, 3, 4, 8)), group=group)
        return base

    return scheme_of


def _awq(values: QuantisationValues) -> Callable[[str], WeightScheme | None]:
    version = values.text("version", values.text("format", "gemm")).lower()
    if version != "gemm":
        raise values.error("version", version, "gemm")
    bits_key = "bits" if values.get("bits") is not None else "w_bit"
    group_key = "group_size" if values.get("group_size") is not None else "q_group_size"
    scheme = WeightScheme(
        layout="awq",
        bits=values.one_of(bits_key, (4,)),
        group=values.group_size(group_key),
    )
    return _all_but(values.names("modules_to_not_convert"), scheme)


def _fp8(values: QuantisationValues) -> Callable[[str], WeightScheme | None]:
    block = values.get("weight_block_size")
    tile = (0, 0)
    if block is not None:
        tile = values.two_sizes("weight_block_size")
    kind = values.text("activation_scheme", "dynamic")
    if kind not in ("dynamic", "static"):
        raise values.error("activation_scheme", kind, "dynamic or static")
    activations = "tensor" if kind == "static" else "token" if block is None else "group"
    scheme = WeightScheme(
        layout="eight",
        bits=8,
        tile=tile,
        is_float=True,
        activations=activations,
        activation_group=tile[1] if activations == "group" else 0,
    )
    skips = values.names("modules_to_not_convert") + values.names("ignored_layers")
    return _all_but(skips, scheme)


def _bitsandbytes(values: QuantisationValues) -> Callable[[str], WeightScheme | None]:
    in_4, in_8 = values.flag("load_in_4bit", False), values.flag("load_in_8bit", False)
    if in_4 == in_8:
        raise values.error("load_in_4bit", in_4, f"not load_in_8bit={in_8}: one of both")
    kind = values.text("bnb_4bit_quant_type", "fp4") if in_4 else ""
    if kind not in ("", "nf4", "fp4"):
        raise values.error("bnb_4bit_quant_type", kind, "nf4 or fp4")
    if in_4:
        scheme = WeightScheme(layout="bnb4", bits=4)
    else:
        scheme = WeightScheme(layout="bnb8", bits=8, tile=(1, 0), activations="token")
    return _all_but(values.names("llm_int8_skip_modules"), scheme)


def _mxfp4(values: QuantisationValues) -> Callable[[str], WeightScheme | None]:
    scheme = WeightScheme(layout="mxfp4", bits=4, group=32)
    return _all_but(values.names("modules_to_not_convert"), scheme)


def _all_but(skips: tuple[str, ...], scheme: WeightScheme) -> Callable[[str], WeightScheme | None]:
    return lambda module: None if names_module(skips, module) else scheme


METHODS: Mapping[str, Callable[[QuantisationValues], Callable[[str], WeightScheme | None]]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": compressed_rules,
    "fp8": _fp8,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": _mxfp4,
}
"""`quant_method` -> what reads the rest of the object."""


def names_module(patterns: tuple[str, ...], module: str) -> bool:
    """Whether one of the patterns means a layer, as in transformers' `modules_to_not_convert`.

    A pattern is a name, the beginning or the end of one in whole parts ("lm_head" is both), or a
    regular expression that matches from the beginning.
    """
    for pattern in patterns:
        if module == pattern or module.startswith(f"{pattern}.") or module.endswith(f".{pattern}"):
            return True
        if f".{pattern}." in f".{module}.":
            return True
        try:
            if re.match(rf"{pattern}\.", module) or re.fullmatch(pattern, module):
                return True
        except re.error:
            continue
    return False
