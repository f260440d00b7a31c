"""GGUF metadata, as the config dict a Hugging Face folder would have in `config.json`.

An architecture is a row of `gguf_architectures.ARCHITECTURES`. Key names are those of the GGUF
specification (ggml-org/ggml, docs/gguf.md) and of the `gguf` package's constants.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from engine.errors import CheckpointError, UnsupportedModelError
from engine.loader.gguf_architectures import ARCHITECTURES, GGUFArchitecture
from engine.loader.gguf_rope import rope_parameters

if TYPE_CHECKING:
    from engine.loader.gguf_file import GGUFFile


REFUSED_KEYS: Final = (
    "expert_count",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.temperature_length",
)
"""Features that change what the weights mean, refused where the architecture does not read them."""
END_OF_TURN_TOKENS: Final = frozenset(
    {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>"}
)
"""Control tokens that end an answer even where the file does not name them, as in llama.cpp: many
older chat models were converted with the base model's end of text alone."""
_CONTROL_TOKEN: Final = 3


class GGUFKeys:
    """A file's architecture metadata, checked for type and sense while it is read."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.architecture: str = self._architecture()

    def _architecture(self) -> str:
        name = self.file.metadata.get("general.architecture")
        if name not in ARCHITECTURES:
            msg = (
                f"{self.file.path}: GGUF architecture {name!r} is not supported, only "
                f"{', '.join(map(repr, ARCHITECTURES))}. Load the model's safetensors checkpoint "
                "instead."
            )
            raise UnsupportedModelError(msg)
        return str(name)

    def get(self, key: str) -> Any:
        """The value of `<architecture>.<key>`, or None."""
        return self.file.metadata.get(f"{self.architecture}.{key}")

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer; a list of equal ones (one per layer) counts as one."""
        value = self.get(key)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if isinstance(value, list):
            msg = f"{self.file.path}: {key} differs from layer to layer, which is not supported."
            raise UnsupportedModelError(msg)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.bad_value(key, value, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number, as the shortest decimal of its fp32 value: 1e-05, not 9.99…e-06."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= 0:
            raise self.bad_value(key, value, "a positive number")
        return float(str(np.float32(value)))

    def bad_value(self, key: str, value: Any, expected: str) -> CheckpointError:
        """The error for a value of this file."""
        found = "missing" if value is None else repr(value)
        full_key = f"{self.architecture}.{key}"
        return CheckpointError(f"{self.file.path}: {full_key} is {found}, expected {expected}.")


def gguf_config(file: GGUFFile) -> dict[str, Any]:
    """The Hugging Face config of the model in a GGUF file.

    Rope settings stand in `rope_parameters`, as transformers 5 spells them. `dtype` is the stored
    one; of a quantised file it is bfloat16.

    Raises:
        UnsupportedModelError: The architecture, or a feature of this file, is not supported.
        CheckpointError: Metadata is missing or makes no sense.
    """
    keys = GGUFKeys(file)
    architecture = gguf_architecture(keys)
    _refuse_features(keys, architecture)
    num_q_heads = keys.count("attention.head_count")
    hidden_size = keys.count("embedding_length")
    head_dim = keys.count("attention.key_length", hidden_size // num_q_heads)
    if keys.count("attention.value_length", head_dim) != head_dim:
        msg = f"{file.path}: heads with keys and values of different sizes are not supported."
        raise UnsupportedModelError(msg)
    config: dict[str, Any] = {
        "hidden_size": hidden_size,
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.count("block_count"),
        "num_attention_heads": num_q_heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", num_q_heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.count("context_length"),
        "vocab_size": _vocab_size(file, hidden_size),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": rope_parameters(
            keys, head_dim, may_turn_partly=architecture.turns_partly
        ),
        "dtype": _stored_dtype(file),
        **_architecture_entries(keys, architecture),
    }
    config |= architecture.entries(keys, config)
    vocab_size = config["vocab_size"]
    for entry, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token_id = _token_id(file, key, vocab_size)
        if token_id is not None:
            config[f"{entry}_token_id"] = token_id
    return config


def gguf_eos_token_ids(file: GGUFFile) -> tuple[int, ...]:
    """Ids that end an answer: end of text, of turn and of message, as named or recognised.

    Where the file names no end of turn, control tokens with a usual text for it count.
    """
    tokens: Any = file.metadata.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    num_tokens = len(tokens)
    named = {key: _token_id(file, key, num_tokens) for key in ("eos", "eot", "eom")}
    token_ids = [token_id for token_id in named.values() if token_id is not None]
    types = file.metadata.get("tokenizer.ggml.token_type")
    if named["eot"] is None and isinstance(types, list) and len(types) == num_tokens:
        token_ids += [
            token_id
            for token_id, token_type in enumerate(types)
            if token_type == _CONTROL_TOKEN and tokens[token_id] in END_OF_TURN_TOKENS
        ]
    return tuple(dict.fromkeys(token_ids))


def gguf_architecture(keys: GGUFKeys) -> GGUFArchitecture:
    """The row of `ARCHITECTURES` for this file; those of one name may differ in features."""
    architecture = ARCHITECTURES[keys.architecture]
    if keys.get("expert_count") and architecture.with_experts is not None:
        return architecture.with_experts
    if keys.get("attention.sliding_window") and architecture.with_window is not None:
        return architecture.with_window
    return architecture


def _refuse_features(keys: GGUFKeys, architecture: GGUFArchitecture) -> None:
    for key in REFUSED_KEYS:
        if keys.get(key) and key not in architecture.reads:
            msg = (
                f"{keys.file.path}: {keys.architecture}.{key}={keys.get(key)!r} is a feature that "
                f"is not supported in GGUF files of the architecture {keys.architecture!r}."
            )
            raise UnsupportedModelError(msg)
    num_parts = keys.file.metadata.get("split.count", 1)
    if num_parts != 1:
        msg = (
            f"{keys.file.path} is one of {num_parts} parts of a model. Merge them first: "
            "llama-gguf-split --merge <first part> <merged file>."
        )
        raise UnsupportedModelError(msg)


def _architecture_entries(keys: GGUFKeys, architecture: GGUFArchitecture) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    if (
        keys.get("attention.sliding_window")
        and "attention.sliding_window" not in architecture.reads
    ):
        if architecture != ARCHITECTURES[keys.architecture].with_window:
            msg = (
                f"{keys.file.path}: a sliding window is not supported in GGUF files of the "
                f"architecture {keys.architecture!r}."
            )
            raise UnsupportedModelError(msg)
        entries["sliding_window"] = keys.count("attention.sliding_window")
    if architecture.states_biases:
        entries["attention_bias"] = "blk.0.attn_q.bias" in keys.file.tensors
        entries["mlp_bias"] = "blk.0.ffn_up.bias" in keys.file.tensors
    return entries | {
        "architectures": [architecture.hf_architecture],
        "model_type": architecture.model_type,
    }


def _vocab_size(file: GGUFFile, hidden_size: int) -> int:
    """Rows of the embedding; metadata may count fewer, without the padding."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        msg = f"{file.path}: there is no tensor 'token_embd.weight'; the file holds no model."
        raise CheckpointError(msg)
    if len(embedding.shape) != 2 or embedding.shape[1] != hidden_size:
        msg = (
            f"{file.path}: tensor 'token_embd.weight' has shape {embedding.shape}, expected "
            f"(vocabulary size, {hidden_size})."
        )
        raise CheckpointError(msg)
    return embedding.shape[0]


def _stored_dtype(file: GGUFFile) -> str:
    """Of most of the weights; a quantised weight fits bfloat16's precision and needs its range."""
    num_elements: Counter[str] = Counter()
    for info in file.tensors.values():
        num_elements[info.ggml_type.name] += math.prod(info.shape)
    most_common = num_elements.most_common(1)[0][0]
    return {"F32": "float32", "F16": "float16"}.get(most_common, "bfloat16")


def _token_id(file: GGUFFile, key: str, num_tokens: int) -> int | None:
    """A special token's id. Converters write -1 or 2**32 - 1 for "none"."""
    token_id = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    if isinstance(token_id, int) and 0 <= token_id < num_tokens:
        return token_id
    return None
