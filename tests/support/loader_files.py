"""Tiny model files for the loader's tests: GGUF files by `gguf.GGUFWriter`, safetensors folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

TOKENS = ["<unk>", "<|bos|>", "<|eos|>", *(f"t{number}é" for number in range(61))]


def llama_config(**changes: Any) -> LlamaConfig:
    """Two layers whose rows hold whole blocks of 32; 4 q heads on 2 kv heads of 16."""
    options: dict[str, Any] = {
        "vocab_size": len(TOKENS),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaConfig(**(options | changes))


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """fp32 on the CPU; every weight random, norms and biases too."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    return model


def permute_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of the architecture llama (LlamaModel.permute)."""
    half = weight.shape[0] // num_heads // 2
    return (
        weight.reshape(num_heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    architecture: str = "llama",
    ggml_type: GGMLQuantizationType = GGMLQuantizationType.F32,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    tokens: Sequence[str] = TOKENS,
    encoded: Mapping[str, tuple[np.ndarray, GGMLQuantizationType]] | None = None,
) -> Path:
    """Write a model as llama.cpp's converter would: `gguf`'s name map, matrices in `ggml_type`.

    `encoded` has blocks and their type for some weights, by Hugging Face name, instead of the
    model's numbers. The first three tokens are of the control type.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(list(tokens))
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["t 1", "t 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in (metadata or {}).items():
        add_value(writer, key, value)
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture),
        config.num_hidden_layers,
    )
    tied = bool(config.tie_word_embeddings)
    for hf_name, weight in model.state_dict().items():
        if tied and hf_name == "lm_head.weight":
            continue
        gguf_name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        array, own_type = (encoded or {}).get(hf_name, (weight.numpy(), None))
        if architecture == "llama" and "q_proj" in hf_name:
            array = permute_rows(array, config.num_attention_heads)
        if architecture == "llama" and "k_proj" in hf_name:
            array = permute_rows(array, config.num_key_value_heads)
        if own_type is not None:
            writer.add_tensor(gguf_name, np.ascontiguousarray(array), raw_dtype=own_type)
        else:
            add_tensor(writer, gguf_name, array, ggml_type)
    for name, array in (tensors or {}).items():
        add_tensor(writer, name, array, GGMLQuantizationType.F32)
    finish(writer)
    return path


def add_tensor(
    writer: gguf.GGUFWriter, name: str, array: np.ndarray, ggml_type: GGMLQuantizationType
) -> None:
    """Vectors stay fp32, as in every real file."""
    if array.ndim < 2 or ggml_type == GGMLQuantizationType.F32:
        writer.add_tensor(name, np.ascontiguousarray(array, dtype=np.float32))
        return
    data = gguf.quants.quantize(np.ascontiguousarray(array), ggml_type)
    writer.add_tensor(name, data, raw_dtype=ggml_type)


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Metadata of the type that llama.cpp uses for such a Python value."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_int32 if value < 0 else writer.add_uint32)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_folder(
    folder: Path,
    tensors: Mapping[str, torch.Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
    num_shards: int = 1,
) -> Path:
    """A Hugging Face folder; more than one shard gets an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    tensors = tensors if tensors is not None else {"model.norm.weight": torch.ones(4)}
    if num_shards == 1:
        save_file(dict(tensors), folder / "model.safetensors")
        return folder
    weight_map = {}
    names = list(tensors)
    for shard in range(num_shards):
        filename = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        chosen = names[shard::num_shards]
        save_file({name: tensors[name] for name in chosen}, folder / filename)
        weight_map |= dict.fromkeys(chosen, filename)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
