"""Tiny Llama folders in Hugging Face's layout: config, safetensors, tokenizer, chat template."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB_SIZE = 300
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A Llama with 2 layers, 4 query heads on 2 KV heads of 16, 300 tokens, 512 positions."""
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    return {**config, **changes}


def write_tiny_llama(
    folder: str | Path, *, seed: int = 0, with_tokenizer: bool = True, **changes: Any
) -> Path:
    """Write a random Llama into `folder` and return it. Weights are large enough to be decided."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    config = tiny_config(**changes)
    (path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.25

    hidden, head_dim = config["hidden_size"], config["head_dim"]
    q_size = config["num_attention_heads"] * head_dim
    kv_size = config["num_key_value_heads"] * head_dim
    tensors = {
        "model.embed_tokens.weight": random(config["vocab_size"], hidden),
        "model.norm.weight": torch.ones(hidden),
    }
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        tensors |= {
            prefix + "self_attn.q_proj.weight": random(q_size, hidden),
            prefix + "self_attn.k_proj.weight": random(kv_size, hidden),
            prefix + "self_attn.v_proj.weight": random(kv_size, hidden),
            prefix + "self_attn.o_proj.weight": random(hidden, q_size),
            prefix + "mlp.gate_proj.weight": random(config["intermediate_size"], hidden),
            prefix + "mlp.up_proj.weight": random(config["intermediate_size"], hidden),
            prefix + "mlp.down_proj.weight": random(hidden, config["intermediate_size"]),
            prefix + "input_layernorm.weight": torch.ones(hidden),
            prefix + "post_attention_layernorm.weight": torch.ones(hidden),
        }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    if with_tokenizer:
        write_byte_tokenizer(path)
    return path


def write_byte_tokenizer(path: Path) -> None:
    """A byte-level BPE tokenizer with the 256 bytes, a few merges and ChatML's control tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    byte_tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIALS, *byte_tokens])}
    merges = []
    for pair in [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("a", "n"), ("an", "d")]:
        merges.append(pair)
        vocab["".join(pair)] = len(vocab)
    for pair in itertools.product("bcdfghjklmpqrsvwxyz", "aeou"):
        if len(vocab) == VOCAB_SIZE:
            break
        merges.append(pair)
        vocab["".join(pair)] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": SPECIALS[0],
                "eos_token": SPECIALS[2],
                "chat_template": CHAT_TEMPLATE,
            }
        )
    )
