"""What a `Tokenizer` answers: special tokens, BOS, decoding, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from text_samples import any_text, hostile_texts
from text_tokenizers import (
    CONTROL_TOKENS,
    demo_gguf_metadata,
    trained_byte_level,
    trained_sentencepiece_like,
    write_folder,
)
from tokenizers import AddedToken

from engine.errors import CheckpointError, ModelNotFoundError, RequestError, UnsupportedModelError
from engine.text.tokenizer import Tokenizer


def copied(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(backend.to_str())


def with_bos(backend: tokenizers.Tokenizer, *, eos: bool = False) -> tokenizers.Tokenizer:
    backend = copied(backend)
    names = ("<s>", "</s>")
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=["<s>", "$A", *(["</s>"] if eos else [])],
        special_tokens=[(name, backend.token_to_id(name)) for name in names],
    )
    return backend


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = write_folder(
        tmp_path_factory.mktemp("qwen"),
        trained_byte_level("qwen2"),
        eos_token="<|im_end|>",
        pad_token={"content": "<|endoftext|>", "__type": "AddedToken"},
        chat_template="{{ messages }}",
    )
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("marked")
    return Tokenizer.from_folder(write_folder(folder, trained_sentencepiece_like()))


@pytest.mark.demo_model
def test_demo_model_facts() -> None:
    tokenizer = Tokenizer.from_gguf_metadata(demo_gguf_metadata())
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.special_token_ids == frozenset(range(17))
    assert tokenizer.special_tokens["<|im_start|>"] == 1
    assert tokenizer.special_token_map["eos_token"] == "<|im_end|>"
    assert tokenizer.eos_token_ids == {2}
    assert tokenizer.chat_template is not None
    # The file says add_bos_token=False.
    assert tokenizer.encode("Hello") == tokenizer.encode("Hello", add_special_tokens=False)
    assert tokenizer.encode("<|im_start|>user", parse_special=True)[0] == 1
    assert not tokenizer.special_token_ids & set(tokenizer.encode("<|im_start|>user<|im_end|>"))


def test_folder_facts(qwen: Tokenizer) -> None:
    assert qwen.bos_token_id is None
    assert qwen.eos_token_id == qwen.special_tokens["<|im_end|>"]
    assert qwen.eos_token_ids == {qwen.eos_token_id}
    assert qwen.special_token_map == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert set(qwen.special_tokens) == set(CONTROL_TOKENS)
    assert qwen.chat_template == "{{ messages }}"


def test_control_tokens_in_text_are_text(qwen: Tokenizer) -> None:
    for token, token_id in qwen.special_tokens.items():
        as_text = qwen.encode(f"a{token}b")
        assert token_id not in as_text
        assert qwen.decode(as_text) == f"a{token}b"
        assert token_id in qwen.encode(f"a{token}b", parse_special=True)


def test_other_added_tokens_always_match(qwen: Tokenizer) -> None:
    added = {token.content: token.token_id for token in qwen.added_tokens if not token.special}
    ids = qwen.encode("<think>x</think>")
    assert ids[0] == added["<think>"]
    assert ids[-1] == added["</think>"]
    assert qwen.decode(ids) == "<think>x</think>"


def test_added_tokens_that_overlap(tmp_path: Path) -> None:
    oracle = copied(trained_byte_level("gpt2"))
    oracle.add_special_tokens(["<a>", "<a>b", "a>b<", "<a"])
    oracle.add_tokens([AddedToken(text, normalized=False) for text in ("b<a>", "b", "><", "<é>")])
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, oracle))
    assert tokenizer.backend == "tiktoken"
    for parse_special in (False, True):
        oracle.encode_special_tokens = not parse_special
        for text in ("<a>b<a>b", "x<a>b<é>b<a", "<a>", "<a><a>b<a>", "a>b<a>b<", "<a" * 5, "b><b"):
            ids = tokenizer.encode(text, parse_special=parse_special)
            assert ids == oracle.encode(text, add_special_tokens=False).ids, text
            assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("kind", ["llama3", "marked"])
def test_bos_is_added_once(tmp_path: Path, kind: str, eos: bool) -> None:
    plain = trained_sentencepiece_like() if kind == "marked" else trained_byte_level(kind)
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, with_bos(plain, eos=eos)))
    bos, end = tokenizer.special_tokens["<s>"], tokenizer.special_tokens["</s>"]
    inner = tokenizer.encode("Hi", add_special_tokens=False)
    expected = [bos, *inner, *([end] if eos else [])]
    assert tokenizer.encode("Hi") == expected
    assert tokenizer.encode_batch(["Hi", "Hi"]) == [expected, expected]
    written = tokenizer.encode("<s>Hi</s>" if eos else "<s>Hi", parse_special=True)
    assert written.count(bos) == 1
    assert written.count(end) == int(eos)
    # As text, the control token does not count as the BOS.
    assert tokenizer.encode("<s>Hi")[0] == bos
    assert tokenizer.encode("<s>Hi").count(bos) == 1
    assert tokenizer.encode("") == ([bos, end] if eos else [bos])


@pytest.mark.parametrize("text", ["\ud800", "abc\udfffdef", "é\ud83d\ude00"])
def test_lone_surrogates_are_refused(qwen: Tokenizer, text: str) -> None:
    position = next(i for i, c in enumerate(text) if 0xD800 <= ord(c) < 0xE000)
    with pytest.raises(RequestError, match=rf"U\+D[8F][0-9A-F]+ at position {position}"):
        qwen.encode(text)
    with pytest.raises(RequestError, match=r"texts\[1\].*position"):
        qwen.encode_batch(["fine", text])


def test_text_must_be_str(qwen: Tokenizer) -> None:
    with pytest.raises(RequestError, match="bytes, not str"):
        qwen.encode(b"abc")  # type: ignore[arg-type]


def test_token_bytes_join_to_text(qwen: Tokenizer, marked: Tokenizer) -> None:
    for text in hostile_texts()[:200]:
        for tokenizer in (qwen, marked):
            ids = tokenizer.encode(text, add_special_tokens=False)
            joined = b"".join(map(tokenizer.token_bytes, ids)).decode(errors="replace")
            assert joined.removeprefix(" " if tokenizer is marked else "") == tokenizer.decode(ids)


def test_token_text_of_half_a_character(qwen: Tokenizer) -> None:
    ids = qwen.encode("\U000b1234")
    assert len(ids) > 1
    assert "\ufffd" in qwen.token_text(ids[0])
    assert qwen.token_bytes(ids[0]) == "\U000b1234".encode()[: len(qwen.token_bytes(ids[0]))]


def test_ids_beyond_the_vocabulary(qwen: Tokenizer, marked: Tokenizer) -> None:
    for tokenizer in (qwen, marked):
        ids = tokenizer.encode("Hi there", add_special_tokens=False)
        padded = [ids[0], tokenizer.vocab_size, *ids[1:], tokenizer.vocab_size + 1000]
        assert tokenizer.decode(padded) == "Hi there"
        assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
        assert tokenizer.token_text(tokenizer.vocab_size + 7) == ""
        with pytest.raises(RequestError, match="-1 is negative"):
            tokenizer.decode([ids[0], -1])
        with pytest.raises(RequestError, match="-3 is negative"):
            tokenizer.token_bytes(-3)


@settings(max_examples=150, deadline=None)
@given(text=any_text())
def test_round_trip(qwen: Tokenizer, text: str) -> None:
    import unicodedata

    normal = unicodedata.normalize("NFC", text)
    if unicodedata.normalize("NFC", normal) == normal and "\U00011383" not in text:
        assert qwen.decode(qwen.encode(text), skip_special_tokens=False) == normal


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_ids_decode_as_the_pipeline(qwen: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, qwen.vocab_size - 1), max_size=30))
    oracle = trained_byte_level("qwen2")
    for skip in (False, True):
        expected = oracle.decode(ids, skip_special_tokens=skip)
        assert qwen.decode(ids, skip_special_tokens=skip) == expected


# ------------------------------------------------------------------ tiktoken only where proven


def refusal(backend: tokenizers.Tokenizer, folder: Path) -> str:
    tokenizer = Tokenizer.from_folder(write_folder(folder, backend))
    text = "It's  42 naïve <|im_end|> tests\n\n  of [INST] e\u0301"
    backend.encode_special_tokens = True
    assert tokenizer.encode(text) == backend.encode(text, add_special_tokens=False).ids
    if tokenizer.fast_path_refusal is None:
        return ""
    assert tokenizer.backend == "tokenizers"
    return tokenizer.fast_path_refusal


def edited(kind: str, change: Any) -> tokenizers.Tokenizer:
    whole = json.loads(trained_byte_level(kind).to_str())
    change(whole)
    return tokenizers.Tokenizer.from_str(json.dumps(whole))


def test_unknown_split_is_not_proven(tmp_path: Path) -> None:
    def change(whole: Any) -> None:
        split = whole["pre_tokenizer"]["pretokenizers"][0]
        split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(r"\p{N}", r"\p{N}{1,2}")

    assert "pre-tokenizer" in refusal(edited("qwen2", change), tmp_path)


def test_prefix_space_is_not_proven(tmp_path: Path) -> None:
    def change(whole: Any) -> None:
        whole["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True

    assert "pre-tokenizer" in refusal(edited("gpt2", change), tmp_path)


def test_normalizer_is_not_proven(tmp_path: Path) -> None:
    def change(whole: Any) -> None:
        whole["normalizer"] = {"type": "Lowercase"}

    assert "Lowercase" in refusal(edited("gpt2", change), tmp_path)


def test_word_edges_are_not_proven(tmp_path: Path) -> None:
    backend = copied(trained_byte_level("gpt2"))
    backend.add_tokens([AddedToken("<mask>", lstrip=True)])
    assert "'<mask>'" in refusal(backend, tmp_path)


def test_ids_out_of_merge_order_are_not_proven(tmp_path: Path) -> None:
    def change(whole: Any) -> None:
        vocab = whole["model"]["vocab"]
        first, last = "".join(whole["model"]["merges"][0]), "".join(whole["model"]["merges"][-1])
        vocab[first], vocab[last] = vocab[last], vocab[first]

    assert "merge order" in refusal(edited("gpt2", change), tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "llama3"])
def test_unlisted_merge(tmp_path: Path, kind: str) -> None:
    """A token the merges never make: tiktoken would make it of any two tokens that spell it."""

    def change(whole: Any) -> None:
        vocab = whole["model"]["vocab"]
        # Both exist, and no merge joins them.
        joined = next(
            f"{left}{right}"
            for left in ("qu", "th", "he", "in")
            for right in ("he", "re", "th", "in")
            if left in vocab and right in vocab and f"{left}{right}" not in vocab
        )
        vocab[joined] = max(max(vocab.values()), *(t["id"] for t in whole["added_tokens"])) + 1

    backend = edited(kind, change)
    # Without `ignore_merges` the token is never made and tiktoken need not know it.
    expected = "one short" if kind == "llama3" else ""
    reason = refusal(backend, tmp_path)
    assert expected in reason
    assert bool(reason) == bool(expected)
    tokenizer = Tokenizer.from_folder(tmp_path)
    backend.encode_special_tokens = True
    for text in ("quhe thhe heth inin inre thth quthere quin hehe herein", *hostile_texts()[:100]):
        assert tokenizer.encode(text) == backend.encode(text, add_special_tokens=False).ids


# ------------------------------------------------------------------ folders


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no tokenizer folder"):
        Tokenizer.from_folder(tmp_path / "missing")
    with pytest.raises(ModelNotFoundError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_sentencepiece_file_only(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.model.*save_pretrained"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_file(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, trained_byte_level("gpt2"))
    (tmp_path / name).write_text('{"model": ', encoding="utf-8")
    with pytest.raises(CheckpointError, match=name):
        Tokenizer.from_folder(tmp_path)


def test_tokenizer_json_itself(tmp_path: Path) -> None:
    write_folder(tmp_path, trained_byte_level("gpt2"), eos_token="</s>")
    tokenizer = Tokenizer.from_folder(tmp_path / "tokenizer.json")
    assert tokenizer.eos_token_id == tokenizer.special_tokens["</s>"]


def test_config_adds_tokens(tmp_path: Path) -> None:
    backend = trained_byte_level("gpt2")
    next_id = backend.get_vocab_size()
    entry = {"content": "<new>", "special": True, "normalized": False, "lstrip": False}
    folder = write_folder(tmp_path, backend, added_tokens_decoder={str(next_id): entry})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.special_tokens["<new>"] == next_id
    assert tokenizer.vocab_size == next_id + 1
    assert tokenizer.encode("a<new>", parse_special=True)[-1] == next_id
    assert next_id not in tokenizer.encode("a<new>")
    write_folder(tmp_path, backend, added_tokens_decoder={str(next_id + 5): entry})
    with pytest.raises(CheckpointError, match=f"id {next_id + 5}.*would get {next_id}"):
        Tokenizer.from_folder(folder)


def test_older_special_tokens_map(tmp_path: Path) -> None:
    write_folder(tmp_path, trained_byte_level("gpt2"))
    tokens = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": None}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(tokens), encoding="utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.special_token_map == {"bos_token": "<s>", "eos_token": "</s>"}


def test_chat_template_places(tmp_path: Path) -> None:
    several = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    write_folder(tmp_path, trained_byte_level("gpt2"), chat_template=several)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.chat_template == "A"
    assert tokenizer.chat_templates == {"default": "A", "tool_use": "B"}
    (tmp_path / "chat_template.jinja").write_text("C", encoding="utf-8")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("D", encoding="utf-8")
    assert Tokenizer.from_folder(tmp_path).chat_templates == {"default": "C", "rag": "D"}
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "additional_chat_templates" / "rag.jinja").unlink()
    write_folder(tmp_path, trained_byte_level("gpt2"))
    assert Tokenizer.from_folder(tmp_path).chat_template is None


def test_padding_and_truncation_are_off(tmp_path: Path) -> None:
    backend = copied(trained_byte_level("gpt2"))
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, backend))
    text = "a much longer text than four tokens, certainly"
    assert len(tokenizer.encode(text)) > 4
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("a")) == 1


def test_word_piece_tokenizer(tmp_path: Path) -> None:
    """BERT's kind: no joined bytes, so everything goes through the pipeline."""
    vocab = ["[UNK]", "[CLS]", "[SEP]", "un", "##know", "##n", "the", "."]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(vocab={token: i for i, token in enumerate(vocab)})
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.add_special_tokens(["[CLS]", "[SEP]"])
    backend.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, backend))
    assert tokenizer.encode("the unknown.") == [1, 6, 3, 4, 5, 7, 2]
    assert tokenizer.decode([1, 6, 3, 4, 5, 7, 2]) == "the unknown."
    assert tokenizer.fast_path_refusal == "the model is not BPE"
    assert tokenizer.token_text(3) == "un"
