"""What stands around texts and pairs, and how they are cut, against the `tokenizers` library."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_encoders import write_wordpiece
from tokenizers import Tokenizer as Backend

from engine.text.text_template import TextTemplate, cut_longest_first
from engine.text.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=[True, False], ids=["bert", "roberta"])
def tokenizers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, TextTemplate, Backend]:
    folder: Path = tmp_path_factory.mktemp("wordpiece")
    write_wordpiece(folder, has_types=request.param)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.no_padding()
    tokenizer = Tokenizer.from_folder(folder)
    return tokenizer, tokenizer.template(), backend


TEXTS = ["", "a", "abcdefgh", "some words", "x" * 30]


@pytest.mark.parametrize("limit", [2, 3, 9, 40])
@pytest.mark.parametrize("text", TEXTS)
def test_single(tokenizers: tuple[Tokenizer, TextTemplate, Backend], text: str, limit: int) -> None:
    tokenizer, template, backend = tokenizers
    backend.enable_truncation(limit)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert template.single(ids, limit) == backend.encode(text).ids
    assert template.single(ids) == tokenizer.encode(text)


@pytest.mark.parametrize("limit", [5, 8, 9, 21, 22, 80])
@pytest.mark.parametrize("first", TEXTS)
@pytest.mark.parametrize("second", TEXTS)
def test_pairs(
    tokenizers: tuple[Tokenizer, TextTemplate, Backend], first: str, second: str, limit: int
) -> None:
    tokenizer, template, backend = tokenizers
    backend.enable_truncation(limit, strategy="longest_first")
    expected = backend.encode(first, second)
    ids, start = template.pair(
        *(tokenizer.encode(text, add_special_tokens=False) for text in (first, second)), limit
    )
    assert ids == expected.ids
    types = [int(place >= start) for place in range(len(ids))]
    assert types == expected.type_ids


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 130))
def test_cuts_keep_what_they_can(first: int, second: int, room: int) -> None:
    kept = cut_longest_first(first, second, room)
    assert sum(kept) == min(first + second, room)
    assert kept[0] <= first
    assert kept[1] <= second
