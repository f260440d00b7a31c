"""Whole models in every quantised format, against transformers on the dequantised weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gguf.quants
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf_random import random_blocks
from loader_files import llama_config, random_model, write_folder, write_gguf
from model_driver import PagedDriver
from quantised_formats import FORMATS
from transformers import LlamaConfig, PreTrainedModel

from engine.layers.cpu_quantised import has_quick_products
from engine.layers.linear import Linear
from engine.layers.quantised_linear import QuantisedLinear
from engine.loader.checkpoint import open_checkpoint
from engine.loader.gguf_blocks import BITS_OF_TYPE
from engine.loader.resolve import resolve_model
from engine.models.decoder import Decoder
from engine.models.quantised_loading import make_factory
from engine.models.registry import decoder_config

CPU = torch.device("cpu")
PROMPT = torch.randint(3, 64, (24,), generator=torch.Generator().manual_seed(1)).tolist()
GGUF = [f"gguf-{name}" for name in (*BITS_OF_TYPE, "mixed")]


def config_of(**changes: Any) -> LlamaConfig:
    """Rows are multiples of what formats put in one block."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "tie_word_embeddings": False}
    return llama_config(**{**sizes, **changes})


def hf_folder(folder: Path, model: PreTrainedModel, name: str) -> None:
    """Store `model` in a format, and give it the numbers that are stored."""
    kind = FORMATS[name]
    tensors: dict[str, torch.Tensor] = {}
    for key, weight in model.state_dict().items():
        module = key.removesuffix(".weight")
        if not module.endswith("_proj"):
            tensors[key] = weight.clone()
            continue
        written, numbers = kind.write(weight.clone())
        tensors |= {module + ending: value for ending, value in written.items()}
        weight.copy_(numbers)
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    config |= {"dtype": "bfloat16", "quantization_config": kind.config}
    write_folder(folder, tensors, config)


def gguf_file(path: Path, model: PreTrainedModel, type_name: str) -> None:
    """Store random blocks for every matrix, and give `model` the numbers they stand for.

    "mixed" is what llama.cpp calls Q4_K_M: some matrices in Q6_K, the others in Q4_K.
    """
    is_mixed = type_name == "mixed"
    encoded = {}
    for seed, (key, weight) in enumerate(model.state_dict().items()):
        if weight.dim() != 2:
            continue
        if is_mixed:
            type_name = "Q6_K" if "v_proj" in key or "down" in key or "head" in key else "Q4_K"
        ggml_type = GGMLQuantizationType[type_name]
        # Of the size of an ordinary weight, whatever the type.
        unit = np.abs(gguf.quants.dequantize(random_blocks(type_name, 1, 256), ggml_type)).mean()
        blocks = random_blocks(type_name, *weight.shape, scale=0.3 / unit, seed=seed)
        encoded[key] = (blocks, ggml_type)
        weight.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, ggml_type)))
    write_gguf(path, model, encoded=encoded)


@pytest.fixture
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    """(checkpoint, transformers' model of the same numbers in float32)."""
    name = request.param
    is_gguf = name.startswith("gguf-")
    changes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64} if is_gguf else {}
    model = random_model(config_of(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.5
        if is_gguf:
            path = tmp_path / "model.gguf"
            gguf_file(path, model, name.removeprefix("gguf-"))
        else:
            path = tmp_path / name
            hf_folder(path, model, name)
    return path, model


def load(path: Path, dtype: torch.dtype, *, saves_memory: bool = False) -> Decoder:
    files = resolve_model(str(path))
    decoder = Decoder(decoder_config(files.config), CPU, dtype)
    with open_checkpoint(files) as checkpoint:
        decoder.load(
            checkpoint, make_factory(CPU, dtype, decoder.step_rows, saves_memory=saves_memory)
        )
    return decoder


def is_quantised(decoder: Decoder) -> bool:
    linears = [
        linear
        for layer in decoder.layers
        for linear in (
            layer.attention.qkv_proj,
            layer.attention.o_proj,
            layer.mlp.gate_up_proj,
            layer.mlp.down_proj,
        )
    ]
    return all(isinstance(linear, QuantisedLinear) for linear in linears)


def logits_of(decoder: Decoder) -> torch.Tensor:
    """[tokens, V] float32 of the prompt, half of it in one chunk and half token by token."""
    driver = PagedDriver(decoder, num_blocks=8, block_size=16, num_layers=decoder.config.num_layers)
    seq = driver.add(PROMPT)
    rows = [driver.step([(seq, len(PROMPT) // 2)])[0]]
    while seq.num_computed_tokens < len(PROMPT):
        rows.append(driver.step([(seq, 1)])[0])
    return torch.cat(rows).float()


def greedy(decoder: Decoder, count: int) -> list[int]:
    driver = PagedDriver(decoder, num_blocks=8, block_size=16, num_layers=decoder.config.num_layers)
    seq = driver.add(PROMPT)
    for _ in range(count):
        seq.token_ids.append(int(driver.step([(seq, None)])[0][-1].argmax()))
    return seq.token_ids[len(PROMPT) :]


@pytest.mark.parametrize("stored", ["gptq"], indirect=True)
def test_no_layer_in_codes_is_ever_allocated_in_numbers(
    stored: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated: list[list[str]] = []
    allocate = Linear.__getattr__

    def note(linear: Linear, name: str) -> torch.Tensor:
        weight = allocate(linear, name)
        if weight.device == CPU:
            allocated.append(list(linear.parts))
        return weight

    monkeypatch.setattr(Linear, "__getattr__", note)
    load(stored[0], torch.float32)
    # The output projection alone, which the recipe leaves out.
    assert allocated == [["lm_head"]]


@pytest.mark.parametrize("stored", [*FORMATS, *GGUF], indirect=True)
def test_float32_is_transformers_on_the_dequantised_weights(
    stored: tuple[Path, PreTrainedModel],
) -> None:
    path, model = stored
    decoder = load(path, torch.float32)
    assert is_quantised(decoder)
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0]
        answer = model.generate(
            torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
    assert (logits_of(decoder) - expected).abs().max() < 2e-4
    assert greedy(decoder, 12) == answer[0, len(PROMPT) :].tolist()


@pytest.mark.skipif(
    not has_quick_products(torch.bfloat16), reason="no quick products for quantised weights here"
)
@pytest.mark.parametrize("saves_memory", [False, True], ids=["quick", "small"])
@pytest.mark.parametrize("stored", [*FORMATS, *GGUF], indirect=True)
def test_bfloat16_is_as_near_as_plain_weights(
    stored: tuple[Path, PreTrainedModel], saves_memory: bool
) -> None:
    path, model = stored
    decoder = load(path, torch.bfloat16, saves_memory=saves_memory)
    assert is_quantised(decoder)
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0]
        plain = copy.deepcopy(model).bfloat16()(torch.tensor([PROMPT])).logits[0].float()
    error = (logits_of(decoder) - expected).pow(2).mean().sqrt()
    error_of_plain = (plain - expected).pow(2).mean().sqrt()
    assert error < 2.5 * error_of_plain
