"""Embeddings on a GPU: the ways of attention that a CPU has not, against the CPU's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoints import write_tiny_llama
from tiny_encoders import write_encoder, write_layout
from transformers import AutoModel

from engine import ConfigError, Engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TEXTS = [f"{'word ' * (n % 37)}{n}" for n in range(120)]


def vectors(folder: Path, **options: object) -> np.ndarray:
    with Engine(str(folder), **options) as engine:
        found: np.ndarray = engine.embed(TEXTS, normalize=True)
        return found


@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert"])
@pytest.mark.parametrize(
    ("dtype", "least_cosine"), [("float32", 0.999999), ("bfloat16", 0.999), ("float16", 0.9999)]
)
def test_encoders(family: str, dtype: str, least_cosine: float, tmp_path: Path) -> None:
    write_encoder(tmp_path, family)
    write_layout(tmp_path)
    expected = vectors(tmp_path, device="cpu", num_threads=2)
    found = vectors(tmp_path, device="cuda", dtype=dtype)
    assert (found * expected).sum(1).min() > least_cosine


def test_pooled_decoders(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    found = []
    for device, dtype in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")):
        with Engine(str(tmp_path), task="embed", device=device, dtype=dtype) as engine:
            found.append(engine.embed(TEXTS, normalize=True))
            token_ids = [engine.tokenizer.encode(text) for text in TEXTS]
    expected, wide, narrow = found
    assert (wide * expected).sum(1).min() > 0.999999
    # No further away than transformers is in the same dtype, both at their worst text.
    model = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        states = [model(torch.tensor([ids])).last_hidden_state[0, -1].float() for ids in token_ids]
    theirs = torch.nn.functional.normalize(torch.stack(states)).numpy()
    worst = 1.0 - (theirs * expected).sum(1).min()
    assert 1.0 - (narrow * expected).sum(1).min() < 1.5 * worst


def test_batch_invariance(tmp_path: Path) -> None:
    write_encoder(tmp_path)
    write_layout(tmp_path)
    with Engine(str(tmp_path), device="cuda", dtype="bfloat16", batch_invariant=True) as engine:
        together = engine.embed(TEXTS)
        for text, vector in zip(TEXTS[:30], together, strict=False):
            assert np.array_equal(engine.embed(text), vector)
    with pytest.raises(ConfigError, match="batch_invariant=True is not there"):
        Engine(str(tmp_path), device="cuda", dtype="float32", batch_invariant=True)


@pytest.mark.parametrize("placement", ["thread", "process"])
def test_memory_comes_back(placement: str, tmp_path: Path) -> None:
    write_encoder(tmp_path)
    vectors(tmp_path, device="cuda")  # contexts and workspaces
    before = torch.cuda.mem_get_info()[0]
    vectors(tmp_path, device="cuda", placement=placement)
    assert before - torch.cuda.mem_get_info()[0] < 64 << 20
