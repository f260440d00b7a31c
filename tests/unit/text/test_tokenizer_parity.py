"""Token ids equal those of the `tokenizers` pipeline, whatever path produced them."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from text_samples import any_text, hostile_texts
from text_tokenizers import (
    BYTE_LEVEL_KINDS,
    demo_gguf_metadata,
    demo_oracle,
    trained_byte_level,
    trained_sentencepiece_like,
    write_folder,
)

from engine.text import tiktoken_encoder
from engine.text.split_patterns import RECENT_NUMERALS
from engine.text.tokenizer import Tokenizer

Pair = tuple[Tokenizer, tokenizers.Tokenizer]


@pytest.fixture(scope="module")
def demo() -> Pair:
    return Tokenizer.from_gguf_metadata(demo_gguf_metadata()), demo_oracle()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    built: dict[str, Pair] = {}

    def build(kind: str) -> Pair:
        if kind not in built:
            oracle = trained_byte_level(kind)
            folder: Path = tmp_path_factory.mktemp(kind)
            built[kind] = Tokenizer.from_folder(write_folder(folder, oracle)), oracle
        return built[kind]

    return build


def oracle_ids(oracle: tokenizers.Tokenizer, text: str, *, parse_special: bool) -> list[int]:
    oracle.encode_special_tokens = not parse_special
    return oracle.encode(text, add_special_tokens=False).ids


def assert_same(pair: Pair, text: str) -> None:
    tokenizer, oracle = pair
    for parse_special in (False, True):
        got = tokenizer.encode(text, add_special_tokens=False, parse_special=parse_special)
        assert got == oracle_ids(oracle, text, parse_special=parse_special), (text, parse_special)
    oracle_text = oracle.decode(got, skip_special_tokens=False)
    assert tokenizer.decode(got, skip_special_tokens=False) == oracle_text


def test_enough_hostile_texts() -> None:
    assert len(hostile_texts()) >= 700


@pytest.mark.demo_model
def test_demo_model_hostile_texts(demo: Pair) -> None:
    assert demo[0].backend == "tiktoken"
    for text in hostile_texts():
        assert_same(demo, text)


@pytest.mark.demo_model
@settings(max_examples=300, deadline=None)
@given(text=any_text())
def test_demo_model_any_text(demo: Pair, text: str) -> None:
    assert_same(demo, text)


@pytest.mark.parametrize("kind", BYTE_LEVEL_KINDS)
def test_trained_hostile_texts(trained: Callable[[str], Pair], kind: str) -> None:
    pair = trained(kind)
    assert pair[0].backend == "tiktoken", pair[0].fast_path_refusal
    for text in hostile_texts():
        assert_same(pair, text)


@pytest.mark.parametrize("kind", BYTE_LEVEL_KINDS)
@settings(max_examples=120, deadline=None)
@given(text=any_text())
def test_trained_any_text(trained: Callable[[str], Pair], kind: str, text: str) -> None:
    assert_same(trained(kind), text)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BYTE_LEVEL_KINDS)
def test_every_character_is_split_alike(trained: Callable[[str], Pair], kind: str) -> None:
    """Each code point beside a letter, a digit, white space and punctuation."""
    tokenizer, oracle = trained(kind)
    recent = re.compile(RECENT_NUMERALS)
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(codes), 2000):
        # A numeral that sends its text to the pipeline would take the others along.
        batch = recent.sub("", "".join(map(chr, codes[start : start + 2000])))
        text = "".join(f"a{c}b {c}1{c}.{c}\n" for c in batch)
        assert tokenizer.encode(text) == oracle_ids(oracle, text, parse_special=False)


def test_recent_numerals_go_through_the_pipeline(trained: Callable[[str], Pair]) -> None:
    pair = trained("smollm")
    numerals = re.findall(RECENT_NUMERALS, "".join(map(chr, range(0x10000, 0x20000))))
    assert len(numerals) > 80
    for numeral in numerals:
        assert unicodedata.category(numeral) in ("Nd", "Nl", "No", "Cn")
        assert_same(pair, f"a{numeral}b {numeral}1{numeral}{numeral}.   {numeral}")


@pytest.mark.demo_model
def test_bytes_that_are_no_token(demo: Pair) -> None:
    # The merge list drops U+0004, which is no token, and then merges the points around it.
    tokenizer, oracle = demo
    assert tokenizer.encode(".\x04.") == oracle.encode("..").ids
    assert tokenizer.encode("\x04") == []


@pytest.mark.demo_model
@pytest.mark.parametrize("text", [" " * 1_100_000 + "x", " x" + "\n \t" * 100_000 + "1"])
def test_very_long_runs(demo: Pair, text: str) -> None:
    """tiktoken alone would panic on the first."""
    tokenizer, oracle = demo
    assert tokenizer.encode(text) == oracle_ids(oracle, text, parse_special=False)


@pytest.mark.demo_model
def test_threads_agree(demo: Pair) -> None:
    tokenizer, _ = demo
    texts = hostile_texts()
    expected = [tokenizer.encode(text, parse_special=True) for text in texts]

    def work(seed: int) -> bool:
        order = list(range(len(texts)))
        random.Random(seed).shuffle(order)
        return all(
            tokenizer.encode(texts[i], parse_special=True) == expected[i]
            and tokenizer.decode(expected[i]) is not None
            for i in order
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_sentencepiece_like_goes_through_the_pipeline(tmp_path: Path) -> None:
    oracle = trained_sentencepiece_like()
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, oracle))
    assert tokenizer.backend == "tokenizers"
    assert tokenizer.fast_path_refusal
    for text in hostile_texts():
        assert_same((tokenizer, oracle), text)


@pytest.mark.parametrize("parse_special", [False, True])
@pytest.mark.parametrize("kind", BYTE_LEVEL_KINDS)
def test_batch_of_hostile_texts(
    trained: Callable[[str], Pair],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    parse_special: bool,
) -> None:
    """One call over all of them: no text may see its neighbours, on one thread or on several."""
    tokenizer, oracle = trained(kind)
    monkeypatch.setattr(tiktoken_encoder, "_CHARS_PER_THREAD", 1000)
    texts = hostile_texts() * 3
    random.Random(kind).shuffle(texts)
    got = tokenizer.encode_batch(texts, add_special_tokens=False, parse_special=parse_special)
    assert got == [oracle_ids(oracle, text, parse_special=parse_special) for text in texts]


def test_long_batch_is_cut_into_groups_in_order() -> None:
    pieces = ["a" * length for length in (5, 1, 1, 1, 90, 1, 1, 40, 40)]
    groups = tiktoken_encoder._equal_groups(pieces, 3, sum(map(len, pieces)))
    assert [piece for group in groups for piece in group] == pieces
    assert [sum(map(len, group)) for group in groups] == [98, 42, 40]
    assert tiktoken_encoder._equal_groups(["a"] * 8, 4, 8) == [["a", "a"]] * 4


def test_texts_that_hold_the_mark_between_texts(trained: Callable[[str], Pair]) -> None:
    tokenizer, oracle = trained("llama3")
    assert tokenizer._fast is not None
    mark = tokenizer._fast._mark
    texts = ["one", f"a{mark}b", mark[:-1], mark, mark[0], mark[1:] + mark[:5], "two"]
    got = tokenizer.encode_batch(texts)
    assert got == [oracle_ids(oracle, text, parse_special=False) for text in texts]


@pytest.mark.parametrize("length", range(1, 25))
def test_a_text_that_ends_like_the_mark_begins(trained: Callable[[str], Pair], length: int) -> None:
    tokenizer, oracle = trained("qwen2")
    assert tokenizer._fast is not None
    texts = ["x" + tokenizer._fast._mark[:length], tokenizer._fast._mark[length:] + "y"]
    got = tokenizer.encode_batch(texts)
    assert got == [oracle_ids(oracle, text, parse_special=False) for text in texts]
