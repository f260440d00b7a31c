"""Tiny random models of each family: the transformers model and our decoder with its weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from engine.models.decoder import Decoder
from engine.models.description import DecoderConfig
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

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 5e4,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 44}
MLA = {
    **MOE,
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
FAMILIES |= {
    "gemma": ("GemmaConfig", {"head_dim": 32}),
    "ministral": (
        "MinistralConfig",
        {
            "head_dim": 16,
            "sliding_window": 17,
            "layer_types": ["full_attention", *["sliding_attention"] * 2],
        },
    ),
    "ministral3": (
        "Ministral3Config",
        {
            "head_dim": 32,
            "rope_parameters": {
                **YARN,
                "original_max_position_embeddings": 16,
                "llama_4_scaling_beta": 0.3,
            },
        },
    ),
    "phi3": ("Phi3Config", {"sliding_window": 20}),
    "phi3-longrope": (
        "Phi3Config",
        {
            "original_max_position_embeddings": 256,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0 + 0.1 * i for i in range(6)],
                "long_factor": [2.0 + i for i in range(6)],
            },
        },
    ),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", {"sliding_window": 15, "num_key_value_heads": 4}),
    "olmo3-yarn": (
        "Olmo3Config",
        {
            "sliding_window": 15,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
    ),
    "glm4": ("Glm4Config", {"head_dim": 32}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": 19}),
    "stablelm": ("StableLmConfig", {"use_qkv_bias": True}),
    "stablelm-parallel": (
        "StableLmConfig",
        {"use_parallel_residual": True, "partial_rotary_factor": 0.5},
    ),
    "gpt2": ("GPT2Config", {}),
    "gpt-bigcode": ("GPTBigCodeConfig", {}),
    "gpt-bigcode-mha": ("GPTBigCodeConfig", {"multi_query": False, "n_inner": 100}),
    "gpt-j": ("GPTJConfig", {"rotary_dim": 8}),
    "gpt-neox": ("GPTNeoXConfig", {"rotary_pct": 0.5}),
    "gpt-neox-sequential": (
        "GPTNeoXConfig",
        {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new"},
    ),
    "falcon": ("FalconConfig", {}),
    "falcon-groups": (
        "FalconConfig",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    ),
    "falcon-sequential": (
        "FalconConfig",
        {"parallel_attn": False, "multi_query": False, "ffn_hidden_size": 100},
    ),
    "opt": ("OPTConfig", {"ffn_dim": 100}),
    "phi": ("PhiConfig", {}),
    "cohere": ("CohereConfig", {"logit_scale": 0.6}),
    "cohere2": ("Cohere2Config", {"sliding_window": 18, "sliding_window_pattern": 3}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "intermediate_size": 52}),
    "mixtral-window": (
        "MixtralConfig",
        {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 21},
    ),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {**MOE, "num_experts": 5, "shared_expert_intermediate_size": 36},
    ),
    "qwen2-moe-mixed": (
        "Qwen2MoeConfig",
        {
            **MOE,
            "num_experts": 3,
            "shared_expert_intermediate_size": 36,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 16,
        },
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {**MOE, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True, "head_dim": 32},
    ),
    "qwen3-moe-mixed": (
        "Qwen3MoeConfig",
        {**MOE, "num_experts": 3, "mlp_only_layers": [1], "head_dim": 16, "sliding_window": None},
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": 5, "num_experts_per_tok": 2}),
    "granite-moe": (
        "GraniteMoeConfig",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.4,
            "logits_scaling": 0.7,
        },
    ),
    "gpt-oss": (
        "GptOssConfig",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 12,
            "swiglu_limit": 1.1,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            "num_local_experts": 4,
            "head_dim": 16,
            "intermediate_size_mlp": 88,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 3,
            "attention_chunk_size": 64,
            "floor_scale": 8,
        },
    ),
    "llama4-top2": (
        "Llama4TextConfig",
        {
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "head_dim": 32,
            "use_qk_norm": False,
            "attention_bias": True,
        },
    ),
    "deepseek-v2": (
        "DeepseekV2Config",
        {**MLA, "n_routed_experts": 6, "routed_scaling_factor": 1.5},
    ),
    "deepseek-v2-groups": (
        "DeepseekV2Config",
        {
            **MLA,
            "q_lora_rank": 28,
            "n_routed_experts": 6,
            "topk_method": "group_limited_greedy",
            "n_group": 3,
            "topk_group": 2,
            "first_k_dense_replace": 0,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.7},
        },
    ),
    "deepseek-v3": (
        "DeepseekV3Config",
        {**MLA, "q_lora_rank": 28, "n_routed_experts": 8, "n_group": 4, "topk_group": 2},
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
        for module in model.modules():
            # transformers 5.17 has gpt-oss's bound as a constant, which tiny models never meet.
            if hasattr(module, "limit") and hasattr(config, "swiglu_limit"):
                module.limit = config.swiglu_limit
        tensors = [*model.named_parameters(), *_stored_buffers(model)]
        for name, parameter in tensors:
            # Norms start as ones and biases as zeros: too tame to show a mistake.
            scale = 0.3 if parameter.dim() == 1 else 0.12
            is_norm = "norm" in name or ".ln_" in name
            offset = 1.0 if is_norm and not name.endswith("bias") and "gemma" not in family else 0.0
            parameter.data = torch.randn_like(parameter) * scale + offset
    return model.eval().requires_grad_(False)


def _stored_buffers(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Buffers that checkpoints hold, such as the bias of DeepSeek's router."""
    stored = model.state_dict()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in stored]


def stored_weights(model: Any) -> dict[str, torch.Tensor]:
    """The model's tensors as transformers writes them to disk."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors")


def config_dict(model: Any) -> dict[str, Any]:
    """The model's `config.json`, with the architecture's name that saving would add."""
    return {**model.config.to_dict(), "architectures": [type(model).__name__]}


def described(family: str) -> DecoderConfig:
    """Our description of a row of `FAMILIES`; no weights are made."""
    class_name, changes = FAMILIES[family]
    config = getattr(transformers, class_name)(**{**SIZES, **changes})
    model_class = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    return decoder_config({**config.to_dict(), "architectures": [model_class.__name__]})


def decoder_like(model: Any, *, dtype: torch.dtype = torch.float32, **options: Any) -> Decoder:
    """Our decoder with the weights of a transformers model."""
    decoder = Decoder(decoder_config(config_dict(model)), torch.device("cpu"), dtype, **options)
    decoder.load(DictCheckpoint(stored_weights(model)))
    return decoder
