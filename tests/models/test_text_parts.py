"""The text part of models with eyes, against transformers' whole models."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers
from model_driver import PagedDriver
from model_zoo import SIZES, DictCheckpoint, stored_weights

from engine.errors import CheckpointError, UnsupportedModelError
from engine.models.any_model import describe_model
from engine.models.decoder import Decoder
from engine.models.description import DecoderConfig
from engine.models.text_part import TEXT_PARTS

_TEXT = {**SIZES, "head_dim": 16}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
# Test id -> (prefix of transformers' classes, its text config, its vision config, the rest).
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("Gemma3", {"sliding_window": 15}, {}, {"mm_tokens_per_image": 4}),
    "mistral": (
        "Mistral3",
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "pixtral"},
        {"tie_word_embeddings": False},
    ),
    "ministral3": ("Mistral3", {"model_type": "ministral3"}, {"model_type": "pixtral"}, {}),
    "llama4": (
        "Llama4",
        {"num_local_experts": 3, "attention_chunk_size": 64, "no_rope_layer_interval": 2},
        {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        {},
    ),
}


def whole_model(case: str) -> Any:
    name, text, vision, others = CASES[case]
    config = getattr(transformers, f"{name}Config")(
        text_config={**_TEXT, **text}, vision_config={**_VISION, **vision}, **others
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() == 1 else 0.12
            parameter.data = torch.randn_like(parameter) * scale
    return model.eval().requires_grad_(False)


def described(model: Any) -> DecoderConfig:
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    result = describe_model(config, None, trust_remote_code=False)
    assert isinstance(result, DecoderConfig)
    return result


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["of the hub", "of the model"])
def test_logits_of_text(case: str, layout: str) -> None:
    model = whole_model(case)
    decoder = Decoder(described(model), torch.device("cpu"), torch.float32)
    stored = stored_weights(model)
    if layout == "of the model":
        stored = {
            name.replace("language_model.model.", "model.language_model.").replace(
                "language_model.lm_head", "lm_head"
            ): tensor
            for name, tensor in stored.items()
        }
    decoder.load(DictCheckpoint(stored))
    token_ids = random.Random(3).choices(range(5, 200), k=70)
    driver = PagedDriver(decoder, num_blocks=10, block_size=16, num_layers=3)
    [logits] = driver.step([(driver.add(token_ids), None)])
    with torch.no_grad():
        want = model(input_ids=torch.tensor([token_ids])).logits[0]
    assert (logits - want).abs().max() < 1e-4


def test_every_architecture_is_compared() -> None:
    names = {f"{case[0]}ForConditionalGeneration" for case in CASES.values()}
    assert names == set(TEXT_PARTS)


def test_a_tensor_of_the_text_part_that_is_missing_is_named() -> None:
    model = whole_model("mistral")
    stored = stored_weights(model)
    del stored["language_model.model.norm.weight"]
    decoder = Decoder(described(model), torch.device("cpu"), torch.float32)
    with pytest.raises(CheckpointError, match=r"lacks 'model\.norm\.weight'"):
        decoder.load(DictCheckpoint(stored))


def test_another_text_part_is_named() -> None:
    config = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": {"model_type": "qwen3"},
    }
    with pytest.raises(UnsupportedModelError, match="kind 'qwen3'; supported are mistral"):
        describe_model(config, None, trust_remote_code=False)
