"""Streams of ids: the pieces are whole characters and together the full text."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from text_samples import any_text, hostile_texts
from text_tokenizers import trained_byte_level, trained_sentencepiece_like, write_folder

from engine.errors import RequestError
from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=["byte-level", "marked"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    backend = (
        trained_byte_level("llama3")
        if request.param == "byte-level"
        else trained_sentencepiece_like()
    )
    return Tokenizer.from_folder(write_folder(tmp_path_factory.mktemp("detok"), backend))


def split_at(ids: list[int], cuts: list[int]) -> list[list[int]]:
    places = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return [ids[start:end] for start, end in itertools.pairwise(places)]


def streamed(tokenizer: Tokenizer, parts: list[list[int]], skip: bool) -> tuple[list[str], str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    return [detokenizer.push(part) for part in parts], detokenizer.flush()


@settings(max_examples=200, deadline=None)
@given(text=any_text(), cuts=st.lists(st.integers(0, 10**6), max_size=20))
def test_text_in_any_pieces(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    ids = tokenizer.encode(text, parse_special=True)
    pieces, rest = streamed(tokenizer, split_at(ids, cuts), skip=True)
    assert "".join(pieces) + rest == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)
        assert rest == ""


@settings(max_examples=200, deadline=None)
@given(data=st.data(), cuts=st.lists(st.integers(0, 10**6), max_size=20), skip=st.booleans())
def test_any_ids_in_any_pieces(
    tokenizer: Tokenizer, data: st.DataObject, cuts: list[int], skip: bool
) -> None:
    """Also invalid UTF-8, control tokens and ids beyond the vocabulary."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    pieces, rest = streamed(tokenizer, split_at(ids, cuts), skip)
    assert "".join(pieces) + rest == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_character_comes_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x\U000b1234y", add_special_tokens=False)
    pieces, rest = streamed(tokenizer, [[token_id] for token_id in ids], skip=True)
    assert [piece for piece in pieces if piece and piece not in ("x", "y")] == ["\U000b1234"]
    assert rest == ""


def test_an_end_inside_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\U000b1234", add_special_tokens=False)[:-1]
    pieces, rest = streamed(tokenizer, [ids], skip=True)
    assert pieces == [""]
    assert rest == "\ufffd"
    assert rest == tokenizer.decode(ids)


def test_only_the_first_space_is_stripped(tokenizer: Tokenizer) -> None:
    for text in ("  two", " one", "none", " "):
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces, rest = streamed(tokenizer, [[token_id] for token_id in ids], skip=True)
        assert "".join(pieces) + rest == text


def test_negative_ids_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="-1 is negative"):
        IncrementalDetokenizer(tokenizer).push([5, -1])


def test_decoders_that_do_more_than_join(tmp_path: Path) -> None:
    vocab = ["[UNK]", "[SEP]", "un", "##know", "##n", "the", ".", "\ufffd"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(vocab={token: i for i, token in enumerate(vocab)})
    )
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.add_special_tokens(["[SEP]"])
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, backend))
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push([token_id]) for token_id in (5, 2, 3, 4, 1, 7, 6)]
    assert pieces == ["the", " un", "know", "n", "", " ", "\ufffd."]
    assert detokenizer.flush() == ""


def test_all_hostile_texts_token_by_token(tokenizer: Tokenizer) -> None:
    for text in hostile_texts():
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces, rest = streamed(tokenizer, [[token_id] for token_id in ids], skip=False)
        assert "".join(pieces) + rest == tokenizer.decode(ids, skip_special_tokens=False)
