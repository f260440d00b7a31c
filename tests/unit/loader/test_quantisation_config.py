"""`quantization_config` is read for every layer as the libraries read it, and nonsense is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_formats import FORMATS, compressed_config

from engine.errors import UnsupportedModelError
from engine.loader.gguf_blocks import BITS_OF_TYPE
from engine.loader.quantisation_config import METHODS, names_module, read_quantisation
from engine.loader.weight_scheme import WeightScheme

Q_PROJ = "model.layers.3.self_attn.q_proj"
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}


def scheme_of(config: dict[str, Any], module: str = Q_PROJ) -> WeightScheme | None:
    found = read_quantisation({"quantization_config": config})
    assert found is not None
    return found.scheme_of(module)


def test_plain_checkpoints_have_none() -> None:
    assert read_quantisation({"model_type": "llama"}) is None
    assert read_quantisation({"quantization_config": None}) is None


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_leaves_out_what_it_lists(name: str) -> None:
    config = FORMATS[name].config
    assert scheme_of(config) is not None
    lists = {
        "gptq": "modules_to_not_convert",
        "awq": "modules_to_not_convert",
        "fp8": "modules_to_not_convert",
        "bitsandbytes": "llm_int8_skip_modules",
        "compressed-tensors": "ignore",
    }
    ignoring = {**config, lists[config["quant_method"]]: ["lm_head", Q_PROJ]}
    assert scheme_of(ignoring) is None
    assert scheme_of(ignoring, "lm_head") is None
    assert scheme_of(ignoring, "model.layers.3.self_attn.k_proj") is not None


@pytest.mark.parametrize(
    "pattern", ["lm_head", "layers.1", "mlp.gate", r"model\.layers\.1.*", "gate"]
)
def test_names_mean_what_they_mean_to_transformers(pattern: str) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    modules = [
        "lm_head",
        "model.layers.1",
        "model.layers.1.mlp.gate",
        "model.layers.1.mlp.gate_proj",
        "model.layers.11.mlp.gate",
        "model.layers.11.self_attn.q_proj",
    ]
    for module in modules:
        if pattern == "layers.1" and module == "model.layers.1.mlp.gate":
            # Older versions took parts in the middle too, and files written for them remain.
            continue
        if pattern == "layers.1" and module == "model.layers.1.mlp.gate_proj":
            continue
        expected = not should_convert_module(module, [pattern])
        assert names_module((pattern,), module) is expected, module


def test_compressed_groups_are_chosen_as_the_library_does() -> None:
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
    )

    names = ["self_attn", "mlp", "lm_head", "other"]
    model = torch.nn.ModuleDict(
        {name: torch.nn.ModuleDict({"proj": torch.nn.Linear(128, 128)}) for name in names}
    )
    config = compressed_config(INT4, "pack-quantized")
    config["ignore"] = ["lm_head.proj", "re:oth.*"]
    config["config_groups"]["group_1"] = {"targets": ["re:.*attn.proj"], "weights": INT8}
    config["config_groups"]["group_2"] = {
        "targets": ["mlp.proj"],
        "weights": {**INT8, "num_bits": 3},
    }
    theirs = QuantizationConfig(**{**config, "quantization_status": QuantizationStatus.INITIALIZED})
    apply_quantization_config(model, theirs)
    for name in names:
        module = f"{name}.proj"
        expected = getattr(model[name]["proj"], "quantization_scheme", None)
        found = scheme_of(config, module)
        bits = None if expected is None else expected.weights.num_bits
        assert (None if found is None else found.bits) == bits, module


def test_blocks_may_be_written_as_older_files_do() -> None:
    weights = {"num_bits": 8, "type": "float", "strategy": "block"}
    for written in ("64x128", [64, 128]):
        config = compressed_config({**weights, "block_structure": written}, "float-quantized")
        found = scheme_of(config)
        assert found is not None
        assert found.tile == (64, 128)


def test_gptq_rules_for_some_layers() -> None:
    config = {
        **FORMATS["gptq"].config,
        "dynamic": {
            r"-:model\.layers\.0\.": {},
            r"+:model\.layers\.3\..*q_proj": {"bits": 8, "group_size": 64},
        },
    }
    assert scheme_of(config, "model.layers.0.mlp.up_proj") is None
    changed = scheme_of(config)
    assert changed is not None
    assert (changed.bits, changed.group) == (8, 64)
    other = scheme_of(config, "model.layers.3.mlp.up_proj")
    assert other is not None
    assert (other.bits, other.group) == (4, 32)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"quant_method": "hqq"}, r"quant_method is 'hqq'; .*gptq, awq"),
    "no method": ({"bits": 4}, "quant_method is ''"),
    "no bits": ({**FORMATS["gptq"].config, "bits": None}, r"bits is None; .* 2 or 3 or 4 or 8"),
    "odd bits": ({**FORMATS["awq"].config, "bits": 3}, r"bits is 3; the engine runs 4"),
    "group": ({**FORMATS["gptq"].config, "group_size": "all"}, "group_size is 'all'"),
    "marlin": (
        {**FORMATS["gptq"].config, "checkpoint_format": "marlin"},
        "checkpoint_format is 'marlin'; the engine runs gptq or gptq_v2",
    ),
    "gemv": ({**FORMATS["awq"].config, "version": "gemv"}, "version is 'gemv'"),
    "no groups": ({**FORMATS["w4a16"].config, "config_groups": {}}, "config_groups is {}"),
    "sparse": (
        {**FORMATS["w4a16"].config, "sparsity_config": {"format": "sparse-24-bitmask"}},
        "sparsity_config.format is 'sparse-24-bitmask'",
    ),
    "nvfp4": (
        compressed_config({"num_bits": 4, "type": "float"}, "nvfp4-pack-quantized"),
        r"config_groups\['group_0'\]\.format is 'nvfp4-pack-quantized of float numbers'",
    ),
    "block": (
        {**FORMATS["deepseek-fp8"].config, "weight_block_size": [128]},
        r"weight_block_size is \[128\]",
    ),
    "activations": (
        {**FORMATS["deepseek-fp8"].config, "activation_scheme": "sometimes"},
        "activation_scheme is 'sometimes'; the engine runs dynamic or static",
    ),
    "both": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": True},
        "load_in_4bit",
    ),
    "a list": ({**FORMATS["awq"].config, "modules_to_not_convert": "lm_head"}, "a list of names"),
}


@pytest.mark.parametrize("case", WRONG)
def test_nonsense_is_named(case: str) -> None:
    config, message = WRONG[case]
    with pytest.raises(UnsupportedModelError, match=message):
        read_quantisation({"quantization_config": config})


def test_a_config_that_is_no_object_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match="quantization_config is 'gptq'"):
        read_quantisation({"quantization_config": "gptq"})


def test_the_document_lists_all_formats() -> None:
    text = (Path(__file__).parents[3] / "docs" / "QUANTISATION.md").read_text()
    table = text.split("## Formats")[1].split("##")[0]
    for name in (*BITS_OF_TYPE, *METHODS):
        assert re.search(rf"\b{name}\b", table), name


def test_every_method_has_a_format_in_the_tests() -> None:
    methods = {kind.config["quant_method"] for kind in FORMATS.values()}
    assert methods | {"mxfp4"} == set(METHODS)
