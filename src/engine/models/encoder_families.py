"""Which encoder architectures are run, and what their `config.json` files say.

To add a family: a builder that states what differs from BERT, its row below, and its row in the
tests' zoo of tiny encoders, which compares it with transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import UnsupportedModelError
from engine.layers.rope import RopeConfig
from engine.models.config_parts import ACTIVATIONS
from engine.models.config_reader import ConfigReader
from engine.models.encoder_config import EncoderConfig, EncoderNames, HeadConfig

_SCORES = "ForSequenceClassification"

_DISTILBERT_NAMES = EncoderNames(
    qkv=tuple(f"transformer.layer.{{}}.attention.{name}_lin" for name in "qkv"),
    output="transformer.layer.{}.attention.out_lin",
    attention_norm="transformer.layer.{}.sa_layer_norm",
    up="transformer.layer.{}.ffn.lin1",
    down="transformer.layer.{}.ffn.lin2",
    mlp_norm="transformer.layer.{}.output_layer_norm",
)
_MPNET_NAMES = EncoderNames(
    qkv=tuple(f"encoder.layer.{{}}.attention.attn.{name}" for name in "qkv"),
    output="encoder.layer.{}.attention.attn.o",
    attention_norm="encoder.layer.{}.attention.LayerNorm",
    position_bias="encoder.relative_attention_bias",
)
_MODERNBERT_NAMES = EncoderNames(
    words="embeddings.tok_embeddings",
    embedding_norm="embeddings.norm",
    qkv=("layers.{}.attn.Wqkv",),
    output="layers.{}.attn.Wo",
    attention_norm="layers.{}.attn_norm",
    up="layers.{}.mlp.Wi",
    down="layers.{}.mlp.Wo",
    mlp_norm="layers.{}.mlp_norm",
    final_norm="final_norm",
)


def _bert_like(config: ConfigReader, **switches: Any) -> EncoderConfig:
    """A description with BERT's spelling of sizes, and the family's own switches on top."""
    num_heads = config.size("num_attention_heads")
    hidden_size = config.size("hidden_size")
    if hidden_size % num_heads:
        raise config.error("hidden_size", f"must be a multiple of the {num_heads} heads")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise config.error("position_embedding_type", "is not supported; 'absolute' is")
    if config.flag("is_decoder", False):
        raise config.error("is_decoder", "is not supported: an encoder looks both ways")
    max_positions = config.size("max_position_embeddings", 512)
    fields: dict[str, Any] = {
        "max_positions": max_positions,
        "num_position_rows": max_positions,
        "num_token_types": config.size("type_vocab_size", 2),
        "norm_eps": config.number("layer_norm_eps", 1e-12),
        "activation": _activation(config, "hidden_act", "gelu"),
        "num_layers": config.size("num_hidden_layers"),
        "intermediate_size": config.size("intermediate_size"),
        **switches,
    }
    return EncoderConfig(
        architecture=config.owner,
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        **fields,
    )


def _activation(config: ConfigReader, key: str, default: str) -> str:
    name = config.get(key, default)
    if name == "relu":
        return "relu"
    if name not in ACTIVATIONS:
        raise config.error(key, f"must be relu or one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _bert(config: ConfigReader) -> EncoderConfig:
    return _bert_like(
        config,
        prefixes=("", "bert."),
        head=HeadConfig(pooling="cls", dense="bert.pooler.dense", out="classifier"),
    )


def _roberta(config: ConfigReader) -> EncoderConfig:
    """RoBERTa and its multilingual and French relatives: positions begin after the padding's."""
    offset = int(config.number("pad_token_id", 1, above=-1)) + 1
    rows = config.size("max_position_embeddings", 512)
    if rows <= offset:
        raise config.error("max_position_embeddings", f"must be more than {offset}")
    return _bert_like(
        config,
        prefixes=("", "roberta."),
        max_positions=rows - offset,
        position_offset=offset,
        head=HeadConfig(pooling="cls", dense="classifier.dense", out="classifier.out_proj"),
    )


def _mpnet(config: ConfigReader) -> EncoderConfig:
    description = _roberta(config)
    return dataclasses.replace(
        description,
        names=_MPNET_NAMES,
        prefixes=("", "mpnet."),
        num_token_types=0,
        num_position_buckets=config.size("relative_attention_num_buckets", 32),
    )


def _distilbert(config: ConfigReader) -> EncoderConfig:
    spelled = {
        **config.values,
        "hidden_size": config.get("dim", 768),
        "num_attention_heads": config.get("n_heads", 12),
        "num_hidden_layers": config.get("n_layers", 6),
        "intermediate_size": config.get("hidden_dim", 3072),
        "hidden_act": config.get("activation", "gelu"),
    }
    return _bert_like(
        ConfigReader(spelled, config.owner),
        names=_DISTILBERT_NAMES,
        prefixes=("", "distilbert."),
        num_token_types=0,
        norm_eps=1e-12,
        head=HeadConfig(pooling="cls", dense="pre_classifier", activation="relu", out="classifier"),
    )


def _modernbert(config: ConfigReader) -> EncoderConfig:
    """ModernBERT: rotation, norms before each half, gated feed-forward, mostly local attention."""
    num_layers = config.size("num_hidden_layers")
    max_positions = config.size("max_position_embeddings", 8192)
    every = config.size("global_attn_every_n_layers", 3)
    kinds = config.get(
        "layer_types",
        ["sliding_attention" if i % every else "full_attention" for i in range(num_layers)],
    )
    if len(kinds) != num_layers or set(kinds) - {"sliding_attention", "full_attention"}:
        raise config.error("layer_types", f"must hold {num_layers} known kinds")
    nested = config.get("rope_parameters", {})
    thetas = {
        kind: (nested.get(kind) or {}).get("rope_theta") or config.number(key, default)
        for kind, key, default in (
            ("full_attention", "global_rope_theta", 160_000.0),
            ("sliding_attention", "local_rope_theta", 10_000.0),
        )
    }
    if any((nested.get(kind) or {}).get("rope_type", "default") != "default" for kind in thetas):
        raise config.error("rope_parameters", "asks for a rotation that is not supported")
    side = config.size("local_attention", 128) // 2
    norm_bias = config.flag("norm_bias", False)
    return _bert_like(
        config,
        names=_MODERNBERT_NAMES,
        prefixes=("", "model."),
        max_positions=max_positions,
        num_position_rows=0,
        num_token_types=0,
        norm_eps=config.number("norm_eps", 1e-5),
        norm_bias=norm_bias,
        is_pre_norm=True,
        has_final_norm=True,
        activation=_activation(config, "hidden_activation", "gelu"),
        is_gated=True,
        attention_bias=config.flag("attention_bias", False),
        mlp_bias=config.flag("mlp_bias", False),
        ropes=tuple(
            RopeConfig(
                theta=thetas[kind],
                max_position_embeddings=max_positions,
                original_max_position_embeddings=max_positions,
            )
            for kind in kinds
        ),
        windows=tuple(side if kind == "sliding_attention" else None for kind in kinds),
        head=HeadConfig(
            pooling=config.get("classifier_pooling", "cls"),
            dense="head.dense",
            dense_bias=config.flag("classifier_bias", False),
            activation=_activation(config, "classifier_activation", "gelu"),
            norm="head.norm",
            norm_bias=norm_bias,
            norm_eps=config.number("norm_eps", 1e-5),
            out="classifier",
        ),
    )


_BUILDERS: dict[str, Callable[[ConfigReader], EncoderConfig]] = {
    "Bert": _bert,
    "Camembert": _roberta,
    "DistilBert": _distilbert,
    "MPNet": _mpnet,
    "ModernBert": _modernbert,
    "Roberta": _roberta,
    "XLMRoberta": _roberta,
}

_KINDS = ("Model", "ForMaskedLM", "ForPreTraining", _SCORES)
"""Architectures of a family that hold a usable encoder; a head for another purpose is not read."""

ENCODER_ARCHITECTURES: dict[str, str] = {
    f"{family}{kind}": family for family in _BUILDERS for kind in _KINDS
}
"""Architecture -> family."""


def encoder_config(hf_config: Mapping[str, Any]) -> EncoderConfig:
    """Describe the encoder of a Hugging Face `config.json`, with a head if it scores.

    Args:
        hf_config: The parsed file; its first architecture is in `ENCODER_ARCHITECTURES`.

    Raises:
        UnsupportedModelError: A key is missing or holds nonsense, the config asks for something
            the encoder does not do, or it classifies into several labels.
    """
    architecture = hf_config["architectures"][0]
    description = _BUILDERS[ENCODER_ARCHITECTURES[architecture]](
        ConfigReader(hf_config, architecture)
    )
    if not architecture.endswith(_SCORES):
        return dataclasses.replace(description, head=None)
    check_one_label(hf_config)
    # Behind the family's own prefix: a bare one belongs to a model without a head.
    return dataclasses.replace(description, prefixes=description.prefixes[1:])


def check_one_label(hf_config: Mapping[str, Any]) -> None:
    """Refuse a classifier that gives several numbers: which of them ranks is not known.

    Raises:
        UnsupportedModelError: There is not exactly one label.
    """
    labels = hf_config.get("id2label") or {}
    num_labels = hf_config.get("num_labels") or len(labels) or 2
    if num_labels != 1:
        msg = (
            f"{hf_config['architectures'][0]} has {num_labels} labels. A model that scores a "
            "document for a query has one; classifiers are not supported."
        )
        raise UnsupportedModelError(msg)
