"""Pooling against the same sums written out text by text in float64."""

from __future__ import annotations

import pytest
import torch
from tiny_encoders import packed

from engine.models.pooled_model import POOLING_MODES, pool

LENS = [1, 2, 2, 9, 31]


def expected(rows: torch.Tensor, mode: str) -> torch.Tensor:
    rows = rows.double()
    weights = torch.arange(1, len(rows) + 1, dtype=torch.float64)
    return {
        "cls": rows[0],
        "last": rows[-1],
        "mean": rows.mean(0),
        "max": rows.max(0).values,
        "mean_sqrt_len": rows.sum(0) / len(rows) ** 0.5,
        "weighted_mean": weights @ rows / weights.sum(),
    }[mode]


@pytest.mark.parametrize("mode", POOLING_MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_a_text(mode: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = (torch.randn(sum(LENS), 24) - 0.5).to(dtype)
    pooled = pool(hidden, packed(LENS), mode)
    assert pooled.dtype == torch.float32
    for ours, rows in zip(pooled, hidden.split(LENS), strict=True):
        assert (ours - expected(rows, mode)).abs().max() < 1e-6
