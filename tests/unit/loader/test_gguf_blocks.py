"""Blocks taken apart hold the numbers that the `gguf` package gives."""

from __future__ import annotations

import gguf.quants
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType

from engine.loader.gguf_blocks import BITS_OF_TYPE, QuantisedMatrix, split_blocks


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
def test_rows_can_be_taken_alone(type_name: str) -> None:
    stored = QuantisedMatrix(encoded_matrix(type_name), type_name)
    assert stored.shape == (24, 96)
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
