"""Blocks taken apart hold the numbers that the `gguf` package gives."""

from __future__ import annotations

from pathlib import Path

import gguf.quants
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from loader_files import llama_config, random_model, write_gguf

from engine.loader import gguf_blocks
from engine.loader.checkpoint import open_checkpoint
from engine.loader.gguf_blocks import BITS_OF_TYPE, QuantisedMatrix, split_blocks
from engine.loader.resolve import resolve_model


def encoded_matrix(type_name: str) -> np.ndarray:
    numbers = np.random.default_rng(7).normal(size=(24, 96)).astype(np.float32)
    return gguf.quants.quantize(numbers, GGMLQuantizationType[type_name])


@pytest.mark.parametrize("type_name", BITS_OF_TYPE)
def test_expanded_numbers_are_those_of_the_gguf_package(type_name: str) -> None:
    encoded = encoded_matrix(type_name)
    blocks = split_blocks(encoded, type_name)
    expected = gguf.quants.dequantize(encoded, GGMLQuantizationType[type_name])
    assert blocks.codes.shape == (24, 96)
    assert blocks.codes.dtype == (torch.int8 if BITS_OF_TYPE[type_name] == 8 else torch.uint8)
    # One rounding more or less: code times scale plus minimum in float32, in another order.
    np.testing.assert_allclose(blocks.expand().numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("type_name", BITS_OF_TYPE)
def test_rows_can_be_taken_alone(type_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_blocks, "_CHUNK_BYTES", 500)
    stored = QuantisedMatrix(encoded_matrix(type_name), type_name)
    assert stored.shape == (24, 96)
    chunks = [rows.expand() for rows in stored.chunks()]
    assert len(chunks) > 1
    assert torch.equal(torch.cat(chunks), stored.read().expand())
    rows = torch.tensor([5, 0, 23, 5])
    assert torch.equal(stored.take(rows).expand(), stored.read().expand()[rows])


def test_interleaved_heads_come_in_hugging_faces_order() -> None:
    encoded = encoded_matrix("Q4_1")
    plain = QuantisedMatrix(encoded, "Q4_1").read().expand()
    turned = QuantisedMatrix(encoded, "Q4_1", num_heads=3).read().expand()
    # Row j of half h of a head of 8 rows is row 2j + h of that head in the file.
    for head in range(3):
        for half in range(2):
            for j in range(4):
                assert torch.equal(turned[8 * head + 4 * half + j], plain[8 * head + 2 * j + half])


@pytest.mark.parametrize("type_name", BITS_OF_TYPE)
def test_a_checkpoint_gives_its_matrices_as_they_are(tmp_path: Path, type_name: str) -> None:
    ggml_type = GGMLQuantizationType[type_name]
    path = write_gguf(tmp_path / "tiny.gguf", random_model(llama_config()), ggml_type=ggml_type)
    with open_checkpoint(resolve_model(str(path))) as checkpoint:
        names = checkpoint.names()
        assert names is not None
        for name, shape in names.items():
            stored = checkpoint.quantised(name)
            if len(shape) == 1:
                assert stored is None, name
                continue
            assert stored is not None, name
            expected = torch.empty(shape)
            checkpoint.read_into(name, expected)
            torch.testing.assert_close(stored.read().expand(), expected, rtol=0, atol=1e-5)
        assert checkpoint.quantised("model.no.such.weight") is None


def test_other_encodings_are_not_given_in_blocks(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", random_model(llama_config()))
    with open_checkpoint(resolve_model(str(path))) as checkpoint:
        assert checkpoint.quantised("model.layers.0.mlp.up_proj.weight") is None


def test_forgotten_pages_are_read_again(tmp_path: Path) -> None:
    ggml_type = GGMLQuantizationType.Q8_0
    path = write_gguf(tmp_path / "tiny.gguf", random_model(llama_config()), ggml_type=ggml_type)
    files = resolve_model(str(path))
    with open_checkpoint(files) as checkpoint:
        stored = checkpoint.quantised("model.embed_tokens.weight")
        assert stored is not None
        before = stored.read().expand()
    # The checkpoint is closed, the file still open and its memory given back.
    assert torch.equal(stored.take(torch.tensor([7])).expand(), before[7:8])
