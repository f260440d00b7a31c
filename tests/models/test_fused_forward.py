"""The forward for few rows computes what the plain one does, with the same weights."""

from __future__ import annotations

import pytest
import torch
from model_driver import build_metadata
from model_zoo import FAMILIES, config_dict, hf_model

from engine.models.decoder import Decoder, can_fuse
from engine.models.registry import decoder_config

FUSED = {
    "gemma",
    "llama",
    "ministral",
    "ministral3",
    "mistral",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
}
"""Families; others have something between a product and the residual stream."""


def can_fuse_family(family: str) -> bool:
    return can_fuse(decoder_config(config_dict(hf_model(family))), torch.bfloat16)


def test_which_families_are_fused() -> None:
    assert {family.split("-")[0] for family in FAMILIES if can_fuse_family(family)} == FUSED


def decoder_of(family: str) -> Decoder:
    config = decoder_config(config_dict(hf_model(family)))
    decoder = Decoder(config, torch.device("cpu"), torch.float32)
    for name, weight in decoder.named_weights():
        weight.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return decoder


def run(decoder: Decoder, forward: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(logits, all caches) of a step with a decode and a short prompt."""
    metadata = build_metadata([(3, 1, [2]), (0, 4, [1])], 16)
    generator = torch.Generator().manual_seed(0)
    caches = [
        torch.randn(decoder.kv_cache_shape(3, 16), generator=generator)
        for _ in range(2 * len(decoder.layers))
    ]
    pairs = list(zip(caches[::2], caches[1::2], strict=True))
    ids = torch.tensor([5, 9, 9, 0, 77])
    with torch.inference_mode():
        hidden = getattr(decoder, forward)(ids, pairs, metadata)
        return decoder.compute_logits(hidden), caches


@pytest.mark.parametrize("family", [name for name in FAMILIES if name.split("-")[0] in FUSED])
def test_fused_forward_is_the_plain_one(family: str) -> None:
    decoder = decoder_of(family)
    if not can_fuse(decoder.config, torch.bfloat16):
        assert any(decoder.config.experts)
        return
    want, want_caches = run(decoder, "forward")
    got, got_caches = run(decoder, "_forward_few_rows")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got_caches, want_caches, rtol=1e-4, atol=1e-4)
