"""The fused forwards compute what the plain one does, with the same weights."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import metadata_on
from model_driver import build_metadata
from model_zoo import FAMILIES, config_dict, hf_model

from engine.layers.attention import Attention
from engine.layers.linear import Linear
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
    for layer in decoder.layers:
        attention = layer.attention
        if isinstance(attention, Attention) and attention.qk_norm == "unweighted":
            for norm in (attention.q_norm, attention.k_norm):
                norm.weight.fill_(1.0)  # loading does, no checkpoint has them
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
    for forward in ("_forward_few_rows", "_forward_weighed"):
        got, got_caches = run(decoder, forward)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got_caches, want_caches, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_products_that_add_to_the_residual_stream(
    monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """As on a GPU, in float32 on the CPU: the library's product adds to what is there."""
    decoder = decoder_of(family)
    want, want_caches = run(decoder, "forward")
    added: list[int] = []
    accumulate = Linear.accumulate

    def counted(linear: Linear, hidden: torch.Tensor, x: torch.Tensor) -> None:
        added.append(x.shape[0])
        accumulate(linear, hidden, x)

    monkeypatch.setattr(Linear, "accumulate", counted)
    for layer in decoder.layers:
        for half in (layer.attention, layer.mlp):
            for part in vars(half).values():
                if isinstance(part, Linear):
                    part.uses_plain_product = True
    got, got_caches = run(decoder, "forward")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got_caches, want_caches, rtol=1e-4, atol=1e-4)
    if family.split("-")[0] in FUSED:
        config = decoder.config
        gated = [experts is None for experts in config.experts]
        want_attentions = 0 if config.output_bias else len(gated)
        assert len(added) == want_attentions + (0 if config.mlp_bias else sum(gated))
    elif decoder.config.norm_places != "before" or decoder.config.residual_scale != 1.0:
        assert not added


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("num_rows", [20, 100, 256])
def test_fused_forward_on_a_gpu_is_as_exact_as_the_plain_one(family: str, num_rows: int) -> None:
    """Both in bfloat16 against float32 on the CPU, with the same rounded weights."""
    wide = decoder_of(family)
    narrow = Decoder(wide.config, torch.device("cuda"), torch.bfloat16)
    for (_, weight), (_, other) in zip(wide.named_weights(), narrow.named_weights(), strict=True):
        other.copy_(weight)
        weight.copy_(other)
    ids = torch.randint(wide.config.vocab_size, (num_rows,))
    metadata = build_metadata([(0, 1, [row]) for row in range(num_rows)], 16)

    def logits(decoder: Decoder, forward: str) -> torch.Tensor:
        device, shape = decoder.device, decoder.kv_cache_shape(num_rows, 16)
        caches = [
            tuple(torch.zeros(shape, device=device, dtype=decoder.dtype) for _ in "kv")
            for _ in decoder.layers
        ]
        decoder._max_weighed_tokens = 0
        with torch.inference_mode():
            hidden = getattr(decoder, forward)(
                ids.to(device), caches, metadata_on(metadata, device)
            )
            return decoder.compute_logits(hidden).cpu().float()

    want = logits(wide, "forward")
    plain, fused = (
        (logits(narrow, forward) - want).norm() for forward in ("forward", "_forward_weighed")
    )
    assert plain < 0.05 * want.norm()
    assert fused < 1.5 * plain
