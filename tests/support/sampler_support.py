"""Helpers of the sampler's tests: batches of options, kept sets and Hugging Face processors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from engine.runner.sampler import Sampler
from engine.sampling_params import SamplingParams


def make_sampler(
    options: Sequence[dict[str, Any]],
    vocab_size: int,
    *,
    device: str = "cpu",
    seeds: Sequence[int] | None = None,
    **row_options: Any,
) -> Sampler:
    """A sampler whose row i has `SamplingParams(**options[i])`, flushed."""
    sampler = Sampler(vocab_size, len(options), device)
    for row, fields in enumerate(options):
        seed = seeds[row] if seeds is not None else row + 1
        sampler.set_row(row, SamplingParams(**fields), seed=seed, **row_options)
    sampler.flush()
    return sampler


def draw(
    sampler: Sampler, logits: torch.Tensor, rows: Sequence[int], positions: Sequence[int]
) -> list[int]:
    """Token ids of one `sample` call."""
    device = logits.device
    variant = sampler.variant(np.asarray(rows))
    row_tensor = torch.tensor(rows, dtype=torch.int64, device=device)
    position_tensor = torch.tensor(positions, dtype=torch.int64, device=device)
    return sampler.sample(logits, row_tensor, position_tensor, variant).tolist()


def hugging_face_kept(logits: torch.Tensor, fields: dict[str, Any]) -> torch.Tensor:
    """[V] bool, what transformers' own warpers keep, in the sampler's order, in float64."""
    from transformers import generation

    scores = logits.double()[None]
    input_ids = torch.zeros((1, 1), dtype=torch.int64)
    temperature = fields.get("temperature", 1.0)
    warpers: list[Any] = []
    if temperature != 1.0:
        warpers.append(generation.TemperatureLogitsWarper(float(temperature)))
    if fields.get("min_p"):
        warpers.append(generation.MinPLogitsWarper(fields["min_p"]))
    if fields.get("top_k", 0) > 0:
        warpers.append(generation.TopKLogitsWarper(fields["top_k"]))
    if fields.get("top_p", 1.0) < 1.0:
        warpers.append(generation.TopPLogitsWarper(fields["top_p"]))
    for warper in warpers:
        scores = warper(input_ids, scores)
    return scores[0] > -torch.inf


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 50},
    {"top_k": 700},
    {"top_k": 4000},
    {"top_p": 0.05},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.02},
    {"min_p": 0.5},
    {"top_k": 20, "top_p": 0.8, "temperature": 0.7},
    {"top_k": 300, "top_p": 0.95, "min_p": 0.001, "temperature": 1.7},
    {"top_p": 0.7, "min_p": 0.05, "temperature": 3.0},
]
"""Options that between them reach every branch of the filters."""
