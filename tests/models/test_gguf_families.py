"""GGUF files of further architectures: written as llama.cpp's converter would, run by the decoder.

Tensor names come from the `gguf` package. What the converter does beyond renaming is spelled out in
`converted`: experts stacked, Gemma's norms as 1 + weight, halves of heads interleaved.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf.constants import GGMLQuantizationType
from loader_files import TOKENS, add_tensor, add_value, finish, permute_rows
from model_driver import PagedDriver
from model_zoo import stored_weights

from engine.errors import CheckpointError
from engine.layers.moe import MixtureOfExperts
from engine.layers.quantised_linear import QuantisedLinear
from engine.loader.checkpoint import open_checkpoint
from engine.loader.gguf_architectures import ARCHITECTURES
from engine.loader.resolve import resolve_model
from engine.models.decoder import Decoder
from engine.models.quantised_loading import make_factory
from engine.models.registry import decoder_config

SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_EXPERT_KEYS = {"expert_used_count": 2}

# Architecture -> (config class, what differs from SIZES, its own metadata).
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 32, "sliding_window": 15, "query_pre_attn_scalar": 32},
        {
            "attention.sliding_window": 15,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 32,
            "sliding_window": 15,
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        {
            "attention.sliding_window": 15,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
            "rope.freq_base": 1e6,
        },
    ),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.4,
            "logits_scaling": 0.7,
            "tie_word_embeddings": True,
        },
        {
            "embedding_scale": 6.0,
            "residual_scale": 0.3,
            "attention.scale": 0.4,
            "logit_scale": 0.7,
        },
    ),
    "llama": (
        "MixtralConfig",
        {"num_local_experts": 3, "num_experts_per_tok": 2},
        {**_EXPERT_KEYS, "expert_count": 3, "rope.freq_base": 1e6},
    ),
    "olmo2": ("Olmo2Config", {}, {}),
    "phi3": (
        "Phi3Config",
        {
            "sliding_window": 20,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
            },
        },
        {"attention.sliding_window": 20, "rope.dimension_count": 12},
    ),
    "qwen2moe": (
        "Qwen2MoeConfig",
        {**EXPERTS, "num_experts": 3, "shared_expert_intermediate_size": 48},
        {
            **_EXPERT_KEYS,
            "expert_count": 3,
            "expert_feed_forward_length": 32,
            "expert_shared_feed_forward_length": 48,
        },
    ),
    "qwen3moe": (
        "Qwen3MoeConfig",
        {**EXPERTS, "num_experts": 3, "norm_topk_prob": True, "head_dim": 32},
        {**_EXPERT_KEYS, "expert_count": 3, "expert_feed_forward_length": 32},
    ),
    "smollm3": ("SmolLM3Config", {}, {"rope.freq_base": 2e6}),
}


def model_of(architecture: str) -> Any:
    config_class, changes, _ = FAMILIES[architecture]
    config = getattr(transformers, config_class)(**{**SIZES, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name and "gemma" not in architecture
            parameter.data = torch.randn_like(parameter) * 0.15 + (1.0 if is_norm else 0.0)
    return model.eval().requires_grad_(False)


def converted(architecture: str, model: Any) -> dict[str, np.ndarray]:
    """The model's tensors under `gguf`'s names, as the converter writes them."""
    config = model.config
    stored = {name: tensor.numpy() for name, tensor in stored_weights(model).items()}
    stacked: dict[str, dict[int, np.ndarray]] = {}
    for name in list(stored):
        if match := re.search(r"experts\.(\d+)\.", name):
            whole = name.replace(match[0], "experts.")
            stacked.setdefault(whole, {})[int(match[1])] = stored.pop(name)
    stored |= {
        name: np.stack([parts[number] for number in range(len(parts))])
        for name, parts in stacked.items()
    }
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture),
        config.num_hidden_layers,
    )
    tensors = {}
    for name, array in stored.items():
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        if "gemma" in architecture and name.endswith("norm.weight"):
            array = array + 1
        if architecture in ("llama", "granite", "smollm3"):
            if "q_proj" in name:
                array = permute_rows(array, config.num_attention_heads)
            if "k_proj" in name:
                array = permute_rows(array, config.num_key_value_heads)
        if "shared_expert_gate" in name:
            array = array[0]
        tensors[gguf_name] = array
    return tensors


def write(
    path: Path,
    architecture: str,
    model: Any,
    ggml_type: GGMLQuantizationType = GGMLQuantizationType.F32,
    change: Callable[[dict[str, np.ndarray]], Any] | None = None,
) -> Path:
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // 4
    writer = gguf.GGUFWriter(path, architecture)
    metadata = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        **FAMILIES[architecture][2],
    }
    for key, value in metadata.items():
        add_value(writer, f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["t 1", "t 2"])
    tensors = converted(architecture, model)
    if change is not None:
        change(tensors)
    for name, array in tensors.items():
        add_tensor(writer, name, array, ggml_type)
    finish(writer)
    return path


def decoder_from(path: Path, *, in_codes: bool = False) -> Decoder:
    files = resolve_model(str(path))
    device, dtype = torch.device("cpu"), torch.float32
    decoder = Decoder(decoder_config(files.config), device, dtype)
    with open_checkpoint(files) as checkpoint:
        factory = make_factory(device, dtype, decoder.step_rows) if in_codes else None
        decoder.load(checkpoint, factory)
    return decoder


def test_every_architecture_is_compared() -> None:
    assert set(FAMILIES) | {"qwen2", "qwen3"} == set(ARCHITECTURES)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_logits_are_those_of_the_model_written(tmp_path: Path, architecture: str) -> None:
    model = model_of(architecture)
    decoder = decoder_from(write(tmp_path / "x.gguf", architecture, model))
    token_ids = torch.randint(3, len(TOKENS), (40,)).tolist()
    driver = PagedDriver(decoder, num_blocks=8, block_size=16, num_layers=decoder.config.num_layers)
    [logits] = driver.step([(driver.add(token_ids), None)])
    want = model(torch.tensor([token_ids])).logits[0]
    assert (logits - want).abs().max() < 1e-4


@pytest.mark.parametrize("architecture", ["qwen3moe", "gemma2"])
def test_quantised_matrices_are_expanded(tmp_path: Path, architecture: str) -> None:
    """Experts too: every weight is what `gguf` itself dequantises."""
    model = model_of(architecture)
    kind = GGMLQuantizationType.Q8_0
    path = write(tmp_path / "x.gguf", architecture, model, kind)
    plain = write(tmp_path / "plain.gguf", architecture, model)
    with (
        open_checkpoint(resolve_model(str(path))) as ours,
        open_checkpoint(resolve_model(str(plain))) as exact,
    ):
        for name, shape in (ours.names() or {}).items():
            got, want = torch.empty(shape), torch.empty(shape)
            ours.read_into(name, got)
            exact.read_into(name, want)
            if len(shape) == 2:
                coded = gguf.quants.quantize(want.numpy(), kind)
                want = torch.from_numpy(gguf.quants.dequantize(coded, kind))
            assert torch.equal(got, want), name


@pytest.mark.parametrize("architecture", ["qwen3moe", "phi3", "gemma2"])
def test_quantised_matrices_run_quantised(tmp_path: Path, architecture: str) -> None:
    """Experts and merged projections too: in float32 as the expanded ones, without a warning."""
    model = model_of(architecture)
    path = write(tmp_path / "x.gguf", architecture, model, GGMLQuantizationType.Q5_1)
    logits = []
    for in_codes in (False, True):
        decoder = decoder_from(path, in_codes=in_codes)
        layer = decoder.layers[1]
        assert isinstance(layer.attention.qkv_proj, QuantisedLinear) is in_codes
        if architecture == "qwen3moe":
            assert isinstance(layer.mlp, MixtureOfExperts)
            assert layer.mlp.has_products is in_codes
        driver = PagedDriver(
            decoder, num_blocks=8, block_size=16, num_layers=decoder.config.num_layers
        )
        logits += driver.step([(driver.add(list(range(3, 43))), None)])
    assert (logits[0] - logits[1]).abs().max() < 1e-4


def test_experts_of_another_number_are_noticed(tmp_path: Path) -> None:
    def lose_one(tensors: dict[str, np.ndarray]) -> None:
        name = "blk.1.ffn_up_exps.weight"
        tensors[name] = tensors[name][:2]

    path = write(tmp_path / "x.gguf", "qwen3moe", model_of("qwen3moe"), change=lose_one)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.2\.up_proj"):
        decoder_from(path)
