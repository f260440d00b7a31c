"""Blocks taken apart hold the numbers that the `gguf` package gives."""

from __future__ import annotations

from pathlib import Path

import gguf.quants
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf_random import random_blocks
from loader_files import llama_config, random_model, write_gguf

from engine.layers.quantised_codes import QuantisedCodes
from engine.loader import stored_rows
from engine.loader.checkpoint import open_checkpoint
from engine.loader.gguf_blocks import BITS_OF_TYPE, GGUFMatrix
from engine.loader.resolve import resolve_model

CPU = torch.device("cpu")
WRITABLE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def expanded(weight: object) -> torch.Tensor:
    assert isinstance(weight, QuantisedCodes)
    return weight.expand()


@pytest.mark.parametrize("type_name", BITS_OF_TYPE)
def test_expanded_numbers_are_those_of_the_gguf_package(type_name: str) -> None:
    encoded = random_blocks(type_name, 24, 768)
    stored = GGUFMatrix(encoded, type_name)
    weight = stored.read(CPU)
    assert isinstance(weight, QuantisedCodes)
    assert weight.shape == stored.shape == (24, 768)
    assert weight.bits == BITS_OF_TYPE[type_name]
    assert weight.codes.dtype == torch.uint8
    assert int(weight.codes.max()) == (1 << weight.bits) - 1
    expected = gguf.quants.dequantize(encoded, GGMLQuantizationType[type_name])
    # One rounding more or less: code times scale plus minimum in float32, in another order.
    bound = 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(weight.expand().numpy(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("type_name", BITS_OF_TYPE)
def test_rows_can_be_taken_alone(type_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_rows, "_CHUNK_CODES", 4000)
    stored = GGUFMatrix(random_blocks(type_name, 24, 768), type_name)
    chunks = [expanded(rows) for rows in stored.chunks()]
    assert len(chunks) > 1
    whole = expanded(stored.read(CPU))
    assert torch.equal(torch.cat(chunks), whole)
    rows = torch.tensor([5, 0, 23, 5])
    assert torch.equal(stored.take(rows), whole[rows])
    assert torch.equal(expanded(stored.first_row()), whole[:1])
    out = torch.empty(24, 768)
    stored.expand_into(out)
    assert torch.equal(out, whole)


@pytest.mark.parametrize("type_name", ["Q4_1", "Q6_K"])
def test_interleaved_heads_come_in_hugging_faces_order(type_name: str) -> None:
    encoded = random_blocks(type_name, 24, 256)
    plain = expanded(GGUFMatrix(encoded, type_name).read(CPU))
    turned = GGUFMatrix(encoded, type_name, num_heads=3)
    # Row j of half h of a head of 8 rows is row 2j + h of that head in the file.
    order = torch.tensor(
        [8 * head + 2 * j + half for head in range(3) for half in range(2) for j in range(4)]
    )
    assert torch.equal(expanded(turned.read(CPU)), plain[order])
    assert torch.equal(turned.take(torch.tensor([9, 3])), plain[order[[9, 3]]])
    reversed_rows = torch.arange(23, -1, -1)
    assert torch.equal(expanded(turned.in_order(reversed_rows).read(CPU)), plain[order].flip(0))


@pytest.mark.parametrize("type_name", WRITABLE)
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
            torch.testing.assert_close(expanded(stored.read(CPU)), expected, rtol=0, atol=1e-5)
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
        before = expanded(stored.read(CPU))
    # The checkpoint is closed, the file still open and its memory given back.
    assert torch.equal(stored.take(torch.tensor([7])), before[7:8])
