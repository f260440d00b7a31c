"""`config.json` into a `DecoderConfig`: every family, defaults, and refusals by name."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from model_table import DOCUMENT, document
from model_zoo import FAMILIES, config_dict, described, hf_model

from engine.errors import UnsupportedModelError
from engine.models.registry import decoder_config, supported_architectures

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        decoder_config(config)
    return str(caught.value)


def test_zoo_covers_every_architecture() -> None:
    zoo = {described(family).architecture for family in FAMILIES}
    assert zoo == set(supported_architectures())


def test_the_document_lists_what_is_tested() -> None:
    assert DOCUMENT.read_text() == document(), "run: python tests/support/model_table.py"


def test_defaults_of_a_minimal_config_are_those_of_transformers() -> None:
    described = decoder_config(LLAMA)
    hf = transformers.LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "architectures"})
    assert described == decoder_config({**hf.to_dict(), "architectures": ["LlamaForCausalLM"]})
    assert described.num_kv_heads == 4
    assert described.head_dim == 16


@pytest.mark.parametrize(
    "family",
    [
        "Cohere",
        "Cohere2",
        "DeepseekV3",
        "GPTNeoX",
        "Gemma",
        "Gemma2",
        "Gemma3",
        "Glm4",
        "GptOss",
        "Granite",
        "GraniteMoe",
        "Llama4",
        "Ministral",
        "Ministral3",
        "Mistral",
        "Mixtral",
        "Olmo2",
        "Olmo3",
        "Olmoe",
        "Phi",
        "Phi3",
        "Qwen2",
        "Qwen2Moe",
        "Qwen3",
        "Qwen3Moe",
        "SmolLM3",
        "StableLm",
        "Starcoder2",
    ],
)
def test_defaults_of_other_families_are_those_of_transformers(family: str) -> None:
    minimal = {
        **LLAMA,
        "num_hidden_layers": 13,
        "num_key_value_heads": 2,
        "architectures": [f"{family}ForCausalLM"],
    }
    class_name = {"Gemma3": "Gemma3TextConfig", "Llama4": "Llama4TextConfig"}.get(
        family, f"{family}Config"
    )
    hf = getattr(transformers, class_name)(
        **{key: value for key, value in minimal.items() if key != "architectures"}
    )
    described = decoder_config(minimal)
    assert described == decoder_config({**hf.to_dict(), "architectures": minimal["architectures"]})


def test_windows_by_layer() -> None:
    def windows(name: str, **changes: Any) -> tuple[int | None, ...]:
        config = {**LLAMA, "num_hidden_layers": 4, "architectures": [name], **changes}
        return decoder_config(config).sliding_windows

    qwen = "Qwen2ForCausalLM"
    on = {"use_sliding_window": True, "sliding_window": 9}
    assert windows("LlamaForCausalLM", sliding_window=9) == (None,) * 4
    assert windows("MistralForCausalLM", sliding_window=9) == (9,) * 4
    assert windows("MistralForCausalLM", sliding_window=None) == (None,) * 4
    assert windows(qwen, sliding_window=9, max_window_layers=0) == (None,) * 4
    assert windows(qwen, **on, max_window_layers=2) == (None, None, 9, 9)
    types = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    assert windows(qwen, **on, layer_types=types) == (None, 9, None, None)


def test_gemma3_reads_its_old_spelling_as_transformers_does() -> None:
    old = {
        **LLAMA,
        "architectures": ["Gemma3ForCausalLM"],
        "rope_theta": 5e5,
        "rope_local_base_freq": 700.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 2,
        "sliding_window": 32,
    }
    hf = transformers.Gemma3TextConfig(**{k: v for k, v in old.items() if k != "architectures"})
    described = decoder_config(old)
    assert described == decoder_config({**hf.to_dict(), "architectures": old["architectures"]})
    local, everywhere = described.ropes
    assert local is not None
    assert everywhere is not None
    assert (local.kind, local.theta, everywhere.kind, everywhere.theta) == (
        ("default", 700.0, "linear", 5e5)
    )


def test_unknown_architecture_is_named_with_the_supported_ones() -> None:
    message = refusal({**LLAMA, "architectures": ["LlamaForCausalLN"]})
    assert "'LlamaForCausalLN'" in message
    assert "Did you mean 'LlamaForCausalLM'?" in message
    for name in supported_architectures():
        assert name in message


@pytest.mark.parametrize("names", [None, [], "LlamaForCausalLM"])
def test_config_without_architectures(names: Any) -> None:
    assert "architectures=" in refusal({**LLAMA, "architectures": names})


@pytest.mark.parametrize("key", [k for k in LLAMA if k != "architectures"])
def test_missing_key_is_named(key: str) -> None:
    message = refusal({k: v for k, v in LLAMA.items() if k != key})
    assert f"{key!r} is missing" in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"vocab_size": 1.5}, "vocab_size=1.5"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers='two'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"hidden_size": 63}, "hidden_size=63"),
        ({"head_dim": 15}, "head_dim=15"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps=-1e-06"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
        ({"attention_bias": 1}, "attention_bias=1"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention"]},
            "layer_types=",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention", "mamba"]},
            "layer_types=",
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "use_sliding_window",
        ),
        (
            {
                "architectures": ["MistralForCausalLM"],
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "layer_types=",
        ),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": -4}, "sliding_window=-4"),
        ({"architectures": ["Qwen2ForCausalLM"], "max_window_layers": "x"}, "max_window_layers="),
    ],
)
def test_bad_value_is_named(changes: dict[str, Any], named: str) -> None:
    assert named in refusal({**LLAMA, **changes})


def test_describing_leaves_the_config_alone() -> None:
    config = config_dict(hf_model("qwen2-window"))
    before = repr(config)
    decoder_config(config)
    assert repr(config) == before
