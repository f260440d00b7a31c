"""Rotary tables against transformers' formulas, and whole models with each kind."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from model_driver import PagedDriver
from model_zoo import config_dict, decoder_like, hf_model
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.errors import UnsupportedModelError
from engine.layers.rope import ROPE_KINDS, RopeConfig, build_cos_sin, inverse_frequencies
from engine.models.registry import decoder_config

HEAD_DIM = 16
FACTORS = {
    "short_factor": [1.0 + 0.05 * i for i in range(HEAD_DIM // 2)],
    "long_factor": [1.5 + 0.9 * i for i in range(HEAD_DIM // 2)],
}
# (test id, rope_parameters as in config.json, max_position_embeddings of the config)
KINDS: list[tuple[str, dict[str, Any], int]] = [
    ("default", {"rope_type": "default", "rope_theta": 500.0}, 256),
    ("linear", {"rope_type": "linear", "factor": 3.0}, 256),
    (
        "proportional",
        {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        256,
    ),
    (
        "proportional-factor",
        {
            "rope_type": "proportional",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.25,
            "factor": 2.0,
        },
        256,
    ),
    ("dynamic", {"rope_type": "dynamic", "factor": 2.0}, 256),
    (
        "yarn",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        256,
    ),
    (
        "yarn-all-options",
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 6.0,
            "beta_slow": 0.4,
            "mscale": 0.8,
            "mscale_all_dim": 1.3,
            "truncate": False,
        },
        256,
    ),
    (
        "yarn-attention-factor",
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "attention_factor": 0.7,
        },
        256,
    ),
    (
        "longrope",
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            **FACTORS,
        },
        256,
    ),
    (
        "longrope-attention-factor",
        {
            "rope_type": "longrope",
            "attention_factor": 1.25,
            "original_max_position_embeddings": 64,
            **FACTORS,
        },
        256,
    ),
    (
        "llama3",
        {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        256,
    ),
]
IDS = [kind for kind, _, _ in KINDS]


def hf_config(parameters: dict[str, Any], max_positions: int, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=HEAD_DIM * 4,
        num_attention_heads=4,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_theta": 10_000.0, **parameters},
        **more,
    )


def our_rope(config: LlamaConfig) -> RopeConfig:
    described = decoder_config({**config.to_dict(), "architectures": ["LlamaForCausalLM"]})
    rope = described.ropes[0]
    assert rope is not None
    return rope


def test_every_kind_of_the_installed_transformers_is_known() -> None:
    assert set(ROPE_INIT_FUNCTIONS) | {"default"} == set(ROPE_KINDS)
    assert {parameters["rope_type"] for _, parameters, _ in KINDS} == set(ROPE_KINDS)


@pytest.mark.parametrize(("kind", "parameters", "max_positions"), KINDS, ids=IDS)
@pytest.mark.parametrize("seq_len", [50, 256, 300])
def test_frequencies_are_those_of_transformers(
    kind: str, parameters: dict[str, Any], max_positions: int, seq_len: int
) -> None:
    config = hf_config(parameters, max_positions)
    rope = our_rope(config)
    ours, our_factor = inverse_frequencies(rope, HEAD_DIM, seq_len)
    if parameters["rope_type"] == "default":
        exponents = torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM
        theirs, their_factor = (1 / 500.0**exponents).float(), 1.0
    else:
        compute = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
        theirs, their_factor = compute(config, seq_len=seq_len)
    torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=0)
    assert our_factor == pytest.approx(their_factor, rel=1e-12)


def test_table_holds_cosines_and_sines_of_every_position() -> None:
    rope = RopeConfig(
        kind="yarn",
        max_position_embeddings=128,
        original_max_position_embeddings=32,
        parameters={"attention_factor": 1.5},
    )
    table = build_cos_sin(rope, 8, 100, torch.device("cpu"))
    inv_freq, _ = inverse_frequencies(rope, 8, 100)
    assert table.shape == (100, 2, 4)
    assert table.dtype == torch.float32
    assert table.is_contiguous()
    for position, pair in ((0, 0), (1, 3), (99, 2)):
        angle = position * inv_freq[pair].item()
        assert table[position, 0, pair].item() == pytest.approx(1.5 * math.cos(angle), abs=1e-5)
        assert table[position, 1, pair].item() == pytest.approx(1.5 * math.sin(angle), abs=1e-5)


def model_logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0]


def our_logits(model: Any, token_ids: list[int], max_model_len: int | None) -> torch.Tensor:
    decoder = decoder_like(model, max_model_len=max_model_len)
    driver = PagedDriver(decoder, num_blocks=24, block_size=16, num_layers=2)
    return driver.step([(driver.add(token_ids), None)])[0]


# Sequence length and `max_model_len` where a kind that depends on a length agrees: within the
# original context, beyond it (longrope), at exactly the longest sequence (dynamic).
@pytest.mark.parametrize(("kind", "parameters", "max_positions"), KINDS, ids=IDS)
@pytest.mark.parametrize("where", ["within", "beyond"])
def test_whole_model_with_each_kind(
    kind: str, parameters: dict[str, Any], max_positions: int, where: str
) -> None:
    is_dynamic = parameters["rope_type"] == "dynamic"
    seq_len, max_model_len = (60, 64) if where == "within" else (90, 256)
    if is_dynamic and where == "beyond":
        seq_len = max_model_len = 300
    model = hf_model(
        "llama",
        num_hidden_layers=2,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_theta": 10_000.0, **parameters},
    )
    token_ids = random.Random(3).choices(range(211), k=seq_len)
    ours = our_logits(model, token_ids, max_model_len)
    assert (ours - model_logits(model, token_ids)).abs().max().item() < 1e-4


def test_old_spelling_means_the_same() -> None:
    parameters = next(parameters for kind, parameters, _ in KINDS if kind == "llama3")
    new = config_dict(hf_model("llama", rope_parameters=parameters))
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    old |= {"rope_theta": 1e4, "rope_scaling": scaling}
    older = {**old, "rope_scaling": {**scaling, "type": scaling["rope_type"]}}
    del older["rope_scaling"]["rope_type"]
    assert decoder_config(new) == decoder_config(old) == decoder_config(older)


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "spiral"}, "spiral"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": -2}, "factor=-2"),
        ({"rope_type": "linear", "factor": "much"}, "factor='much'"),
        ({"rope_type": "default", "rope_theta": 0.0}, "rope_theta=0.0"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "short_factor"),
        (
            {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1},
            "high_freq_factor=1",
        ),
        ({"full_attention": {"rope_type": "default"}}, "differs between layers"),
        ("yarn", "rope_parameters='yarn'"),
    ],
)
def test_bad_parameters_are_named(rope: Any, named: str) -> None:
    config = {**config_dict(hf_model("llama")), "rope_parameters": rope}
    with pytest.raises(UnsupportedModelError) as caught:
        decoder_config(config)
    assert named in str(caught.value)
    assert "LlamaForCausalLM" in str(caught.value)
