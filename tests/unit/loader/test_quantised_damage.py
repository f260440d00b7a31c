"""Quantised checkpoints whose tensors contradict their config or each other are refused by name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loader_files import write_folder
from quantised_formats import FORMATS, compressed_config, mxfp4

from engine.errors import CheckpointError
from engine.loader.checkpoint import open_checkpoint
from engine.loader.resolve import resolve_model

MODULE = "model.layers.0.mlp.up_proj"
Tensors = dict[str, torch.Tensor]


def folder(tmp_path: Path, tensors: Tensors, config: dict[str, Any], num_shards: int = 1) -> Path:
    full = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": config,
    }
    return write_folder(tmp_path / "m", tensors, full, num_shards=num_shards)


def tensors_of(name: str) -> Tensors:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    tensors, _ = FORMATS[name].write(weight)
    stored = {MODULE + ending: tensor for ending, tensor in tensors.items()}
    return {**stored, "model.norm.weight": torch.ones(4)}


def opened(path: Path) -> None:
    with open_checkpoint(resolve_model(str(path))):
        pass


def lose(ending: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(MODULE + ending)


def change(ending: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    def apply(tensors: Tensors) -> None:
        tensors[MODULE + ending] = how(tensors[MODULE + ending]).contiguous()

    return apply


def cut(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:-1]


DAMAGE: dict[str, tuple[str, Callable[[Tensors], object], str]] = {
    "gptq without scales": ("gptq", lose(".scales"), r"'.*up_proj\.scales' is missing"),
    "gptq with other zeros": (
        "gptq",
        change(".qzeros", cut),
        r"up_proj\.qzeros' has the shape \(2, 8\); .* ask for \(3, 8\)",
    ),
    "gptq of floats": (
        "gptq",
        change(".qweight", torch.Tensor.float),
        r"qweight' has the dtype torch\.float32; .* torch\.int32",
    ),
    "gptq with other groups": (
        "gptq",
        change(".g_idx", torch.zeros_like),
        r"g_idx' names the groups of columns otherwise; .* below 3 exactly 32 times",
    ),
    "awq with other scales": ("awq", change(".scales", cut), r"scales' has the shape \(2, 64\)"),
    "packed without a shape": ("w4a16", lose(".weight_shape"), r"weight_shape' is missing"),
    "packed of another shape": (
        "w4a16",
        change(".weight_shape", lambda shape: shape + 1),
        r"weight_packed' has the shape \(64, 12\); .* \(65, 13\)",
    ),
    "asymmetric without zeros": (
        "w4a16-asymmetric",
        lose(".weight_zero_point"),
        r"weight_zero_point' is missing",
    ),
    "fp8 without scales": ("fp8-rows", lose(".weight_scale"), r"stored as F8_E4M3, but the scales"),
    "fp8 with other scales": (
        "deepseek-fp8",
        change(".weight_scale_inv", cut),
        r"weight_scale_inv' has the shape \(1, 3\); .* \(2, 3\)",
    ),
    "int8 for fp8": (
        "fp8-rows",
        change(".weight", lambda weight: weight.view(torch.int8)),
        r"weight' has the dtype torch\.int8; .* torch\.float8_e4m3fn",
    ),
    "static without a scale": (
        "static-fp8",
        lose(".input_scale"),
        r"activation_scale' is missing",
    ),
    "nf4 without a state": (
        "nf4",
        lose(".weight.quant_state.bitsandbytes__nf4"),
        r"quant_state\.bitsandbytes__nf4' is missing",
    ),
    "nf4 with another state": (
        "nf4",
        change(".weight.quant_state.bitsandbytes__nf4", cut),
        r"bitsandbytes__nf4' is not a description",
    ),
    "nf4 cut short": (
        "nf4",
        change(".weight", cut),
        r"weight' has 3071 bytes; .* 3072 for 64 x 96",
    ),
    "int8 with other rows": ("llm-int8", change(".SCB", cut), r"SCB' has the shape \(63,\)"),
    "int8 in tiles": (
        "llm-int8",
        change(".weight_format", lambda code: code + 1),
        r"weight_format' is not 0",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case: str, tmp_path: Path) -> None:
    name, damage, message = DAMAGE[case]
    tensors = tensors_of(name)
    opened(folder(tmp_path / "whole", tensors, FORMATS[name].config))
    damage(tensors)
    if case == "fp8 without scales":
        tensors |= {
            f"{MODULE}2{key.removeprefix(MODULE)}": value
            for key, value in tensors_of(name).items()
            if key.startswith(MODULE)
        }
    with pytest.raises(CheckpointError, match=message):
        opened(folder(tmp_path, tensors, FORMATS[name].config))


@pytest.mark.parametrize(
    ("stored", "said", "message"),
    [
        (
            "gptq",
            "fp8-rows",
            r"up_proj\.qweight' belongs to the layouts gptq and awq, but .* 'eight'",
        ),
        ("gptq", "awq", r"qweight' stands for 12 columns; .* a multiple of the group size 32"),
        ("nf4", "llm-int8", r"weight\.absmax' belongs to the layouts bnb4, but"),
        ("w4a16", "w8a16", r"weight_packed' has the shape \(64, 12\); .* \(64, 24\)"),
        ("w4a16", "w4a16-rows", r"weight_scale' has the shape \(64, 3\); .* \(64, 1\)"),
        ("fp8-rows", "fp8-tensor", r"weight_scale' has the shape \(64, 1\); .* \(1, 1\)"),
    ],
)
def test_a_config_of_another_format_is_refused(
    stored: str, said: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        opened(folder(tmp_path, tensors_of(stored), FORMATS[said].config))


def test_codes_of_a_layer_that_is_left_out_are_refused(tmp_path: Path) -> None:
    config = {**FORMATS["awq"].config, "modules_to_not_convert": ["up_proj"]}
    with pytest.raises(CheckpointError, match=r"up_proj is stored in codes .* leaves this layer"):
        opened(folder(tmp_path, tensors_of("awq"), config))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = folder(tmp_path, tensors_of("gptq"), FORMATS["gptq"].config, num_shards=2)
    opened(path)
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 weight files"):
        opened(path)


def test_scales_of_a_kv_cache_are_left_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = tensors_of("fp8-rows")
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    with caplog.at_level(logging.WARNING, logger="engine"):
        path = folder(tmp_path, tensors, FORMATS["fp8-rows"].config)
        with open_checkpoint(resolve_model(str(path))) as checkpoint:
            assert set(checkpoint.names() or ()) == {f"{MODULE}.weight", "model.norm.weight"}
    assert "1 scales for a KV cache in 8 bits (model.layers.0.self_attn.k_scale" in caplog.text


def test_weights_outlive_the_checkpoint_but_cannot_be_read_anew(tmp_path: Path) -> None:
    path = folder(tmp_path, tensors_of("gptq"), FORMATS["gptq"].config)
    with open_checkpoint(resolve_model(str(path))) as checkpoint:
        stored = checkpoint.quantised(f"{MODULE}.weight")
    assert stored is not None
    assert stored.take(torch.tensor([1])).shape == (1, 96)
    with pytest.raises(CheckpointError, match="was closed"):
        checkpoint.read_into("model.norm.weight", torch.empty(4))


def test_stacked_and_packed_mxfp4_agree_with_their_libraries(tmp_path: Path) -> None:
    stored, numbers = mxfp4(torch.randn(3, 64, 48))
    name = "model.layers.0.mlp.experts.down_proj"
    tensors = {f"{name}_{ending}": value for ending, value in stored.items()}
    path = folder(tmp_path / "stack", tensors, {"quant_method": "mxfp4"})
    with open_checkpoint(resolve_model(str(path))) as checkpoint:
        assert checkpoint.names() == {name: (3, 64, 48)}
        stack = checkpoint.quantised_stack(name)
        assert stack is not None
        read = torch.stack([one.read(torch.device("cpu")).expand().T for one in stack])
        assert torch.equal(read, numbers)
        out = torch.empty(3, 64, 48)
        checkpoint.read_into(name, out)
        assert torch.equal(out, numbers)
    packed = {
        f"{MODULE}.weight_packed": stored["blocks"][0].flatten(1),
        f"{MODULE}.weight_scale": stored["scales"][0],
    }
    config = compressed_config({"num_bits": 4, "type": "float"}, "mxfp4-pack-quantized")
    path = folder(tmp_path / "packed", packed, config)
    with open_checkpoint(resolve_model(str(path))) as checkpoint:
        weight = checkpoint.quantised(f"{MODULE}.weight")
        assert weight is not None
        assert torch.equal(weight.read(torch.device("cpu")).expand(), numbers[0].T)
    tensors[f"{name}_scales"] = tensors[f"{name}_scales"][:2].contiguous()
    with pytest.raises(CheckpointError, match=r"down_proj_scales' has the shape"):
        opened(folder(tmp_path / "damaged", tensors, {"quant_method": "mxfp4"}))


def test_biases_of_zeros_that_autogptq_adds_are_left_unread(tmp_path: Path) -> None:
    tensors = tensors_of("gptq")
    other = "model.layers.1.mlp.up_proj"
    layer = [key for key in tensors if MODULE in key]
    tensors |= {key.replace(MODULE, other): tensors[key].clone() for key in layer}
    tensors |= {f"{MODULE}.bias": torch.zeros(64), f"{other}.bias": torch.zeros(64)}

    def names() -> set[str]:
        path = folder(tmp_path, tensors, FORMATS["gptq"].config)
        with open_checkpoint(resolve_model(str(path))) as checkpoint:
            return set(checkpoint.names() or ())

    assert names() == {f"{MODULE}.weight", f"{other}.weight", "model.norm.weight"}
    tensors[f"{other}.bias"] = torch.ones(64)
    assert {f"{MODULE}.bias", f"{other}.bias"} <= names()


def test_dummy_weights_of_a_quantised_model_are_plain_and_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder(tmp_path, tensors_of("gptq"), FORMATS["gptq"].config)
    files = resolve_model(str(path))
    with (
        caplog.at_level(logging.WARNING, logger="engine"),
        open_checkpoint(files, load_format="dummy") as checkpoint,
    ):
        assert checkpoint.quantised(f"{MODULE}.weight") is None
    assert "config.json describes weights quantised with gptq" in caplog.text
