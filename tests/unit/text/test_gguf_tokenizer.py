"""GGUF metadata gives the tokenizer it was made from."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tokenizers
from text_samples import hostile_texts
from text_tokenizers import trained_byte_level, trained_sentencepiece_like

from engine.errors import CheckpointError, UnsupportedModelError
from engine.text.chat_template import ChatTemplate
from engine.text.split_patterns import GGUF_PRE_TOKENIZERS
from engine.text.tokenizer import Tokenizer


def gguf_metadata(backend: tokenizers.Tokenizer, **entries: Any) -> dict[str, Any]:
    """Metadata as llama.cpp's converter writes it for a byte-level tokenizer."""
    tokens = [""] * backend.get_vocab_size()
    for token, token_id in backend.get_vocab().items():
        tokens[token_id] = token
    types = [1] * len(tokens)
    for token_id, added in backend.get_added_tokens_decoder().items():
        types[token_id] = 3 if added.special else 4
    merges = json.loads(backend.to_str())["model"]["merges"]
    metadata = {
        "model": "gpt2",
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(merge) for merge in merges],
        **entries,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


def sentencepiece_metadata(**entries: Any) -> dict[str, Any]:
    """Metadata with scores instead of merges; earlier tokens merge first."""
    backend = trained_sentencepiece_like()
    metadata = gguf_metadata(backend, model="llama")
    del metadata["tokenizer.ggml.merges"]
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    types[0] = 2
    for token_id, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x"):
            types[token_id] = 6
    metadata["tokenizer.ggml.scores"] = [-float(token_id) for token_id in range(len(tokens))]
    metadata["tokenizer.ggml.unknown_token_id"] = 0
    metadata["tokenizer.ggml.bos_token_id"] = 1
    metadata["tokenizer.ggml.eos_token_id"] = 2
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in entries.items()}


def assert_equals(tokenizer: Tokenizer, oracle: tokenizers.Tokenizer) -> None:
    for parse_special in (False, True):
        oracle.encode_special_tokens = not parse_special
        for text in hostile_texts()[::2]:
            got = tokenizer.encode(text, add_special_tokens=False, parse_special=parse_special)
            assert got == oracle.encode(text, add_special_tokens=False).ids, text
            assert tokenizer.decode(got) == oracle.decode(got)


@pytest.mark.parametrize(
    ("pre", "kind"),
    [
        ("gpt-2", "gpt2"),
        ("phi-2", "gpt2"),
        ("smollm", "smollm"),
        ("starcoder", "smollm"),
        ("refact", "smollm"),
        ("llama-bpe", "llama3"),
        ("qwen2", "qwen2"),
        ("qwen35", "qwen35"),
        ("tekken", "tekken"),
        ("gpt-4o", "gpt-4o"),
    ],
)
def test_byte_level_kinds(pre: str, kind: str) -> None:
    oracle = trained_byte_level(kind)
    tokenizer = Tokenizer.from_gguf_metadata(gguf_metadata(oracle, pre=pre))
    assert tokenizer.backend == "tiktoken", tokenizer.fast_path_refusal
    assert_equals(tokenizer, oracle)


@pytest.mark.parametrize("pre", sorted(GGUF_PRE_TOKENIZERS))
def test_every_known_name_loses_no_text(pre: str) -> None:
    metadata = gguf_metadata(trained_byte_level("gpt2"), pre=pre)
    tokenizer = Tokenizer.from_gguf_metadata(metadata)
    text = "It's 12345 über-naïve tests: (a+b)²\r\n\n\t x  42 日本語 👍🏽"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_default_split_cuts_punctuation_first() -> None:
    metadata = gguf_metadata(trained_byte_level("gpt2"), pre="default")
    tokenizer = Tokenizer.from_gguf_metadata(metadata)
    assert tokenizer.backend == "tokenizers"
    pieces = [tokenizer.token_text(token_id) for token_id in tokenizer.encode("a.$+12345")]
    assert "".join(pieces) == "a.$+12345"
    assert all("3" not in piece or "4" not in piece for piece in pieces)


@pytest.mark.parametrize("pre", [None, "", "no-such-split", "deepseek-v3"])
def test_unknown_split_is_refused(pre: str | None) -> None:
    metadata = gguf_metadata(trained_byte_level("gpt2"), pre=pre)
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.ggml\.pre.*smollm.*wrong token"):
        Tokenizer.from_gguf_metadata(metadata)


@pytest.mark.parametrize("kind", ["bert", "t5", "rwkv", None])
def test_unknown_kind_is_refused(kind: str | None) -> None:
    metadata = gguf_metadata(trained_byte_level("gpt2"), model=kind, pre="gpt-2")
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.ggml\.model"):
        Tokenizer.from_gguf_metadata(metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
        ({"tokens": ["a", "b", "a"], "token_type": [1, 1, 1]}, "'a' as id 0 and 2"),
        ({"token_type": [1, 1]}, "2 entries in token_type"),
        ({"merges": ["ab"]}, "'ab' is not a pair"),
        ({"merges": ["zz qq"]}, "do not fit its tokens"),
        ({"eos_token_id": 10**6}, "eos_token_id=1000000"),
    ],
)
def test_damaged_metadata(change: dict[str, Any], message: str) -> None:
    metadata = gguf_metadata(trained_byte_level("gpt2"), **{"pre": "gpt-2", **change})
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_gguf_metadata(metadata)


def test_missing_merges() -> None:
    metadata = gguf_metadata(trained_byte_level("gpt2"), pre="gpt-2")
    del metadata["tokenizer.ggml.merges"]
    with pytest.raises(CheckpointError, match="no merges"):
        Tokenizer.from_gguf_metadata(metadata)


@pytest.mark.parametrize(
    ("pre", "add_bos", "expected"),
    [
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("qwen2", None, False),
        ("qwen2", True, True),
    ],
)
def test_add_bos(pre: str, add_bos: bool | None, expected: bool) -> None:
    backend = trained_byte_level("gpt2")
    bos, eos = backend.token_to_id("<s>"), backend.token_to_id("</s>")
    entries = {"pre": pre, "bos_token_id": bos, "eos_token_id": eos, "add_eos_token": add_bos}
    metadata = gguf_metadata(backend, **entries)
    if add_bos is None:
        del metadata["tokenizer.ggml.add_eos_token"]
    else:
        metadata["tokenizer.ggml.add_bos_token"] = add_bos
    ids = Tokenizer.from_gguf_metadata(metadata).encode("Hi")
    assert (ids[0] == bos) == expected
    assert (ids[-1] == eos) == bool(add_bos)


def test_ends_of_a_turn_and_templates() -> None:
    backend = trained_byte_level("gpt2")
    end, turn = backend.token_to_id("<|endoftext|>"), backend.token_to_id("<|im_end|>")
    metadata = gguf_metadata(backend, pre="gpt-2", eos_token_id=end, eot_token_id=turn)
    metadata["tokenizer.chat_template"] = "A"
    metadata["tokenizer.chat_template.tool_use"] = "B"
    tokenizer = Tokenizer.from_gguf_metadata(metadata)
    assert tokenizer.eos_token_id == end
    assert tokenizer.eos_token_ids == {end, turn}
    assert tokenizer.chat_templates == {"default": "A", "tool_use": "B"}


def test_sentencepiece_scores_give_the_merges() -> None:
    tokenizer = Tokenizer.from_gguf_metadata(sentencepiece_metadata())
    oracle = trained_sentencepiece_like()
    assert tokenizer.backend == "tokenizers"
    for text in hostile_texts():
        oracle.encode_special_tokens = True
        expected = oracle.encode(text, add_special_tokens=True).ids
        assert tokenizer.encode(text) == expected, text
        assert tokenizer.decode(expected) == oracle.decode(expected)


def test_sentencepiece_without_a_space_in_front() -> None:
    tokenizer = Tokenizer.from_gguf_metadata(sentencepiece_metadata(add_space_prefix=False))
    ids = tokenizer.encode("the fox", add_special_tokens=False)
    assert not tokenizer.token_text(ids[0]).startswith(" ")
    assert tokenizer.decode(ids) == "the fox"
    ids = tokenizer.encode(" the fox", add_special_tokens=False)
    assert tokenizer.decode(ids) == " the fox"


def test_sentencepiece_user_defined_tokens_match_whole() -> None:
    metadata = sentencepiece_metadata()
    token_id = len(metadata["tokenizer.ggml.tokens"]) - 1
    metadata["tokenizer.ggml.tokens"][token_id] = "  <mark>"
    metadata["tokenizer.ggml.token_type"][token_id] = 4
    tokenizer = Tokenizer.from_gguf_metadata(metadata)
    assert token_id in tokenizer.encode("a  <mark>b")
    assert tokenizer.decode(tokenizer.encode("a  <mark>")) == "a  <mark>"


def test_sentencepiece_scores_must_tell_an_order() -> None:
    metadata = sentencepiece_metadata()
    metadata["tokenizer.ggml.scores"] = [0.0] * len(metadata["tokenizer.ggml.tokens"])
    with pytest.raises(UnsupportedModelError, match="same score"):
        Tokenizer.from_gguf_metadata(metadata)
    del metadata["tokenizer.ggml.scores"]
    with pytest.raises(CheckpointError, match="no scores"):
        Tokenizer.from_gguf_metadata(metadata)


def test_phi3_swallows_white_space_after_control_tokens() -> None:
    metadata = sentencepiece_metadata() | {"general.architecture": "phi3"}
    last = len(metadata["tokenizer.ggml.tokens"]) - 1
    metadata["tokenizer.ggml.tokens"][last] = "<|user|>"
    metadata["tokenizer.ggml.token_type"][last] = 3
    tokenizer = Tokenizer.from_gguf_metadata(metadata)
    assert tokenizer.encode("<|user|>\n the", parse_special=True) == tokenizer.encode(
        "<|user|>the", parse_special=True
    )
    spaced = tokenizer.encode("<s> the", parse_special=True)
    assert spaced != tokenizer.encode("<s>the", parse_special=True)
    # A message with a control token is encoded in parts; those drop the same white space.
    template = ChatTemplate("<|user|>\n{{ messages[0].content }}", tokenizer)
    chat = [{"role": "user", "content": "the </s>"}]
    assert template.encode(chat)[1:] == [
        last,
        *tokenizer.encode("the </s>", add_special_tokens=False),
    ]
