"""Tiny random encoders of each family as folders, with a WordPiece tokenizer."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.kernels.packed_texts import PackedTexts

VOCAB_SIZE = 120
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 200,
    "pad_token_id": 0,
}

# Test id -> (name of the family's classes, what differs from SIZES).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {}),
    "bert-tanh-gelu": ("Bert", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5}),
    "roberta": ("Roberta", {"pad_token_id": 1}),
    "camembert": ("Camembert", {"pad_token_id": 1, "hidden_act": "relu"}),
    "xlm-roberta": ("XLMRoberta", {"pad_token_id": 1, "type_vocab_size": 1}),
    "mpnet": ("MPNet", {"pad_token_id": 1}),
    "distilbert": (
        "DistilBert",
        {"dim": 64, "hidden_dim": 96, "n_layers": 3, "n_heads": 4},
    ),
    "modernbert": (
        "ModernBert",
        {
            "num_hidden_layers": 5,
            "local_attention": 16,
            "global_attn_every_n_layers": 3,
            "bos_token_id": 2,
            "cls_token_id": 2,
            "eos_token_id": 3,
            "sep_token_id": 3,
        },
    ),
    "modernbert-biases": (
        "ModernBert",
        {
            "num_hidden_layers": 2,
            "local_attention": 24,
            "attention_bias": True,
            "mlp_bias": True,
            "norm_bias": True,
            "classifier_bias": True,
            "classifier_pooling": "mean",
            "bos_token_id": 2,
            "cls_token_id": 2,
            "eos_token_id": 3,
            "sep_token_id": 3,
        },
    ),
}


def hf_encoder(family: str, ending: str = "Model", **changes: Any) -> Any:
    """A transformers model with random weights, large enough to tell errors from noise."""
    name, own = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **own, **changes})
    torch.manual_seed(7)
    model = getattr(transformers, f"{name}{ending}")(config).eval()
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for weight in model.parameters():
            middle, spread = (0.0, 0.15) if weight.dim() > 1 else (0.5, 0.2)
            weight.normal_(middle, spread, generator=generator)
    return model


def write_encoder(folder: Path, family: str = "bert", ending: str = "Model", **changes: Any) -> Any:
    """Save a tiny model and a tokenizer into `folder`; returns the transformers model."""
    model = hf_encoder(family, ending, **changes)
    model.save_pretrained(folder)
    write_wordpiece(folder, has_types=FAMILIES[family][0] == "Bert")
    return model


def write_wordpiece(folder: Path, *, has_types: bool = True) -> None:
    """A lower-casing tokenizer of single letters; with BERT's or RoBERTa's pairs around texts."""
    from tokenizers import (
        Tokenizer,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [*string.ascii_lowercase, *string.digits, ".", ",", "?", ":"]
    tokens = [*special, *letters, *(f"##{letter}" for letter in string.ascii_lowercase)]
    vocab = {token: index for index, token in enumerate(tokens)}
    assert len(vocab) <= VOCAB_SIZE
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1" if has_types else "[CLS] $A [SEP] [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    # As in files that were saved while a training script had both switched on.
    tokenizer.enable_truncation(12)
    tokenizer.enable_padding(length=12)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "BertTokenizer", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_layout(
    folder: Path,
    *,
    pooling: dict[str, Any] | None = None,
    modules: tuple[str, ...] = ("Transformer", "Pooling", "Normalize"),
    prompts: dict[str, str] | None = None,
    default_prompt_name: str | None = None,
    max_seq_length: int | None = None,
) -> None:
    """The files of sentence-transformers beside the model; `Dense` modules are written by hand."""
    entries = [
        {
            "idx": index,
            "name": str(index),
            "path": "" if kind == "Transformer" else f"{index}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    if "Pooling" in modules:
        path = folder / f"{modules.index('Pooling')}_Pooling"
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(pooling or {"pooling_mode_mean_tokens": True}))
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": prompts or {}, "default_prompt_name": default_prompt_name})
    )
    if max_seq_length is not None:
        (folder / "sentence_bert_config.json").write_text(
            json.dumps({"max_seq_length": max_seq_length, "do_lower_case": False})
        )


def packed(lens: list[int]) -> PackedTexts:
    """Layout of texts of these lengths, shortest first."""
    return PackedTexts(
        lens_host=lens,
        starts=torch.tensor([0, *lens]).cumsum(0).int(),
        positions=torch.cat([torch.arange(length) for length in lens]),
        device=torch.device("cpu"),
    )
