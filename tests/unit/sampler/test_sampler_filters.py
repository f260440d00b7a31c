"""What the filters keep: the CPU path and the twin against transformers' warpers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampler_support import FILTERS, hugging_face_kept, make_sampler

from engine.kernels import sampling_reference as twin
from engine.runner.sampling_cpu import row_threshold

VOCAB_SIZES = [5, 100, 4999, 20_000]


def _logits(vocab_size: int, scale: float, seed: int) -> torch.Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("fields", FILTERS, ids=str)
@pytest.mark.parametrize("scale", [0.05, 1.0, 4.0])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_kept_set_equals_hugging_face(vocab_size: int, scale: float, fields: dict) -> None:
    logits = _logits(vocab_size, scale, seed=vocab_size)
    if fields.get("top_k", 0) > vocab_size:
        fields = {**fields, "top_k": 0}
    expected = hugging_face_kept(logits, fields)
    sampler = make_sampler([fields], vocab_size)

    x = logits.numpy()
    settings = sampler.tables.settings[0].numpy()
    on_cpu = torch.from_numpy(x >= np.float32(row_threshold(x, float(x.max()), settings)))
    threshold = twin.filter_thresholds_reference(logits[None], sampler.tables, torch.tensor([0]))

    assert torch.equal(on_cpu, expected)
    assert torch.equal(logits >= threshold[0], expected)


@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_ties_at_a_threshold_are_all_kept(fields: dict) -> None:
    """bf16 logits have many equal values: the kept set is whole groups of them."""
    logits = _logits(6000, 2.0, seed=3).bfloat16().float()
    expected = hugging_face_kept(logits, fields)
    smallest_kept = logits[expected].min()
    with_ties = logits >= smallest_kept
    sampler = make_sampler([fields], 6000)

    x = logits.numpy()
    threshold = row_threshold(x, float(x.max()), sampler.tables.settings[0].numpy())

    assert torch.equal(torch.from_numpy(x >= np.float32(threshold)), with_ties)


def test_equal_logits_are_all_kept() -> None:
    x = np.zeros(10_000, np.float32)
    for fields in ({"top_k": 5}, {"top_p": 0.1}, {"min_p": 1.0}):
        settings = make_sampler([fields], 10_000).tables.settings[0].numpy()
        assert (x >= row_threshold(x, 0.0, settings)).all()


def test_top_p_counts_mass_after_top_k() -> None:
    """Four equal tokens under top_k 4: half of their mass is two tokens, whatever the rest is."""
    logits = torch.zeros(1000)
    logits[:4] = torch.tensor([1.0003, 1.0002, 1.0001, 1.0])
    settings = make_sampler([{"top_k": 4, "top_p": 0.5}], 1000).tables.settings[0].numpy()
    threshold = row_threshold(logits.numpy(), float(logits.max()), settings)
    assert np.flatnonzero(logits.numpy() >= np.float32(threshold)).tolist() == [0, 1]
