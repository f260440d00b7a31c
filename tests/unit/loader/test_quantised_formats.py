"""Every quantised safetensors format is read as the library that writes it reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loader_files import write_folder
from quantised_formats import FORMATS

from engine.layers.quantised_codes import QuantisedCodes
from engine.layers.quantised_eight import QuantisedEight
from engine.loader import stored_rows
from engine.loader.checkpoint import open_checkpoint
from engine.loader.resolve import resolve_model

CPU = torch.device("cpu")
MODULE = "model.layers.0.self_attn.q_proj"


def random_weight(num_rows: int = 96, num_columns: int = 160) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(num_rows, num_columns, generator=generator) * 0.3


def write(tmp_path: Path, name: str) -> tuple[Path, torch.Tensor]:
    """A checkpoint of one layer of that format, and its numbers."""
    tensors, numbers = FORMATS[name].write(random_weight())
    stored = {MODULE + ending: value for ending, value in tensors.items()}
    stored["model.norm.weight"] = torch.ones(4)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": FORMATS[name].config,
    }
    return write_folder(tmp_path / name, stored, config), numbers


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_those_of_the_formats_own_library(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_rows, "_CHUNK_CODES", 2000)
    folder, numbers = write(tmp_path, name)
    with open_checkpoint(resolve_model(str(folder))) as checkpoint:
        assert checkpoint.names() == {f"{MODULE}.weight": (96, 160), "model.norm.weight": (4,)}
        stored = checkpoint.quantised(f"{MODULE}.weight")
        assert stored is not None
        assert checkpoint.quantised("model.norm.weight") is None
        weight = stored.read(CPU)
        assert isinstance(weight, QuantisedCodes | QuantisedEight)
        whole = weight.expand()
        # One rounding of float32 more or less.
        bound = 1e-6 * float(numbers.abs().max())
        torch.testing.assert_close(whole, numbers, rtol=0, atol=bound)
        # The numbers are not zeros, and near the weight.
        assert (whole - random_weight()).abs().max() < 0.7

        chunks = list(stored.chunks())
        assert len(chunks) > 1
        assert torch.equal(torch.cat([chunk.expand() for chunk in chunks]), whole)
        assert torch.equal(stored.first_row().expand(), whole[:1])
        rows = torch.tensor([70, 3, 95, 3])
        assert torch.equal(stored.take(rows), whole[rows])
        turned = stored.in_order(torch.arange(95, -1, -1))
        assert torch.equal(turned.read(CPU).expand(), whole.flip(0))
        assert torch.equal(torch.cat([c.expand() for c in turned.chunks()]), whole.flip(0))
        out = torch.empty(96, 160)
        checkpoint.read_into(f"{MODULE}.weight", out)
        assert torch.equal(out, whole)
