"""Tiny random models of architectures that run in transformers' own code."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from model_zoo import SIZES, DictCheckpoint
from safetensors.torch import load_file

from engine.models.transformers_config import transformers_config
from engine.models.transformers_model import TransformersModel

_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}

# Test id -> (transformers config class, what differs from SIZES).
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("ApertusConfig", {}),
    "arcee": ("ArceeConfig", {}),
    "bitnet": ("BitNetConfig", {}),
    "cohere-qk-norm": ("CohereConfig", {"use_qk_norm": True, "logit_scale": 0.6}),
    "cwm": ("CwmConfig", {"sliding_window": 17}),
    "diffllama": ("DiffLlamaConfig", {}),
    "dots1": ("Dots1Config", _EXPERTS),
    "ernie4.5": ("Ernie4_5Config", {}),
    "exaone4": (
        "Exaone4Config",
        {"sliding_window": 15, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "glm": ("GlmConfig", {"head_dim": 16}),
    "glm4-moe": ("Glm4MoeConfig", {**_EXPERTS, "head_dim": 16}),
    "granite-moe-shared": ("GraniteMoeSharedConfig", {"num_local_experts": 3}),
    "helium": ("HeliumConfig", {"head_dim": 16}),
    "hunyuan": ("HunYuanDenseV1Config", {"head_dim": 16}),
    "nemotron": ("NemotronConfig", {}),
    "olmo": ("OlmoConfig", {}),
    "olmoe-clipped": (
        "OlmoeConfig",
        {"clip_qkv": 0.5, "num_experts": 3, "num_experts_per_tok": 2},
    ),
    "persimmon": ("PersimmonConfig", {}),
    "phimoe": ("PhimoeConfig", {"num_local_experts": 4}),
    "seed-oss": ("SeedOssConfig", {"head_dim": 16}),
    "vaultgemma": ("VaultGemmaConfig", {"head_dim": 16, "sliding_window": 12}),
}


def other_model(name: str, **more: Any) -> Any:
    """A transformers model of a row of `OTHERS`, random weights, float32."""
    config_class, changes = OTHERS[name]
    return random_model(config_class, {**changes, **more})


def random_model(config_class: str, changes: dict[str, Any]) -> Any:
    """A tiny transformers model with random weights, float32."""
    config = getattr(transformers, config_class)(**{**SIZES, "num_hidden_layers": 2, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Not sdpa, which in some versions leaves out the bound on the scores.
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for parameter in model.parameters():
            is_matrix = parameter.dim() > 1
            parameter.data = torch.randn_like(parameter) * (0.12 if is_matrix else 0.3)
            parameter.data += 0.0 if is_matrix else 1.0
    return model.eval().requires_grad_(False)


def over_paged_kv(model: Any, *, max_model_len: int | None = None) -> TransformersModel:
    """The same model in an engine's hands, by way of a folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder, save_original_format=False)
        config = json.loads((folder / "config.json").read_text())
        described = transformers_config(config, folder, trust_remote_code=False)
        ours = TransformersModel(
            described, torch.device("cpu"), torch.float32, max_model_len=max_model_len
        )
        ours.load(DictCheckpoint(load_file(folder / "model.safetensors")))
    return ours
