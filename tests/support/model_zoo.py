"""Tiny random models of each family: the transformers model and our decoder with its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from engine.models.decoder import Decoder
from engine.models.registry import decoder_config

# Small, but with grouped heads, head_dim * heads != hidden_size somewhere, and odd sizes.
SIZES = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Test id -> (transformers config class, what differs from SIZES).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied-mha": ("LlamaConfig", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-gelu-mqa": (
        "LlamaConfig",
        {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 1, "head_dim": 32},
    ),
    "mistral-window": ("MistralConfig", {"sliding_window": 19, "head_dim": 64}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen3-window": (
        "Qwen3Config",
        {
            "head_dim": 16,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 21,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.4,
            "logits_scaling": 0.7,
        },
    ),
    "smollm3": (
        "SmolLM3Config",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 18},
    ),
    "smollm3-list": (
        "SmolLM3Config",
        {"no_rope_layers": [0, 1, 1], "tie_word_embeddings": False, "attention_bias": True},
    ),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 32, "sliding_window": 15, "query_pre_attn_scalar": 24},
    ),
    "gemma2-caps": (
        "Gemma2Config",
        {"head_dim": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 32, "sliding_window": 15, "sliding_window_pattern": 3},
    ),
    "gemma3-scaled": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "sliding_window": 15,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "final_logit_softcapping": 2.5,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
    ),
}


class DictCheckpoint:
    """A checkpoint held in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = dict(tensors)
        self.read_names: list[str] = []

    def names(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read_into(self, name: str, out: torch.Tensor) -> None:
        assert out.is_contiguous()
        assert out.shape == self.tensors[name].shape
        self.read_names.append(name)
        out.copy_(self.tensors[name])


def hf_model(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A transformers model of a row of `FAMILIES`, random weights, float32, eager attention."""
    class_name, changes = FAMILIES[family]
    config = getattr(transformers, class_name)(**{**SIZES, **changes, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for name, parameter in model.named_parameters():
            # Norms start as ones and biases as zeros: too tame to show a mistake.
            scale = 0.3 if parameter.dim() == 1 else 0.12
            offset = 1.0 if "norm" in name and "gemma" not in family else 0.0
            parameter.data = torch.randn_like(parameter) * scale + offset
    return model.eval().requires_grad_(False)


def config_dict(model: Any) -> dict[str, Any]:
    """The model's `config.json`, with the architecture's name that saving would add."""
    return {**model.config.to_dict(), "architectures": [type(model).__name__]}


def decoder_like(model: Any, *, dtype: torch.dtype = torch.float32, **options: Any) -> Decoder:
    """Our decoder with the weights of a transformers model."""
    decoder = Decoder(decoder_config(config_dict(model)), torch.device("cpu"), dtype, **options)
    decoder.load(DictCheckpoint(model.state_dict()))
    return decoder
