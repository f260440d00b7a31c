"""Our encoder against transformers, float32, on tiny random models of every family."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from tiny_encoders import FAMILIES, SIZES, VOCAB_SIZE, hf_encoder, packed

import engine.layers.packed_attention as attention
from engine.errors import CheckpointError, UnsupportedModelError
from engine.models.encoder import Encoder
from engine.models.encoder_families import ENCODER_ARCHITECTURES, encoder_config

TOLERANCE = 1e-5  # hidden states are of order 2
LENS = [1, 5, 5, 17, 17, 17, 40, 150]


class Weights:
    """A transformers model's weights as a checkpoint."""

    def __init__(self, model: Any, prefix: str = "") -> None:
        self._tensors = {prefix + name: value for name, value in model.state_dict().items()}

    def names(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self._tensors.items()}

    def read_into(self, name: str, out: torch.Tensor) -> None:
        out.copy_(self._tensors[name])


def described(model: Any, **changes: Any) -> Any:
    return encoder_config(
        {**model.config.to_dict(), "architectures": [type(model).__name__], **changes}
    )


@functools.cache
def models(family: str) -> tuple[Any, Encoder]:
    model = hf_encoder(family)
    encoder = Encoder(described(model), torch.device("cpu"), torch.float32)
    encoder.load(Weights(model))
    return model, encoder


def random_texts(lens: list[int], seed: int = 0) -> list[torch.Tensor]:
    rng = random.Random(seed)
    return [torch.tensor([rng.randrange(5, VOCAB_SIZE) for _ in range(n)]) for n in lens]


def run(encoder: Encoder, texts: list[torch.Tensor], types: torch.Tensor | None = None) -> Any:
    lens = [len(text) for text in texts]
    ids = torch.cat(texts)
    hidden = encoder.forward(ids, torch.zeros_like(ids) if types is None else types, packed(lens))
    return hidden.split(lens)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_transformers(family: str) -> None:
    model, encoder = models(family)
    texts = random_texts(LENS)
    for text, ours in zip(texts, run(encoder, texts), strict=True):
        with torch.no_grad():
            theirs = model(input_ids=text[None]).last_hidden_state[0]
        assert (ours - theirs).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert"])
def test_the_padded_way_of_gpus_gives_the_same(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, encoder = models(family)
    texts = random_texts(LENS, seed=3)
    expected = torch.cat(run(encoder, texts))
    monkeypatch.setattr(attention, "_by_length", attention._padded)
    assert (torch.cat(run(encoder, texts)) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_does_not_depend_on_its_neighbours(family: str) -> None:
    """Bit by bit, on a CPU."""
    _, encoder = models(family)
    texts = random_texts(LENS, seed=1)
    for text, in_batch in zip(texts, run(encoder, texts), strict=True):
        [alone] = run(encoder, [text])
        assert torch.equal(alone, in_batch)


def test_token_types() -> None:
    model, encoder = models("bert")
    [text] = random_texts([20], seed=2)
    types = (torch.arange(20) >= 9).long()
    [ours] = run(encoder, [text], types)
    with torch.no_grad():
        theirs = model(input_ids=text[None], token_type_ids=types[None]).last_hidden_state[0]
    assert (ours - theirs).abs().max() < TOLERANCE


def test_longest_text() -> None:
    for family in ("bert", "roberta", "modernbert"):
        model, encoder = models(family)
        length = encoder.config.max_positions
        [text] = random_texts([length], seed=4)
        with torch.no_grad():
            theirs = model(input_ids=text[None]).last_hidden_state[0]
        [ours] = run(encoder, [text])
        assert (ours - theirs).abs().max() < TOLERANCE
    assert models("roberta")[1].config.max_positions == SIZES["max_position_embeddings"] - 2


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet", "distilbert", "modernbert"])
def test_checkpoints_with_a_prefix(family: str) -> None:
    """As saved with a masked language model's head."""
    model, encoder = models(family)
    prefix = encoder.config.prefixes[1]
    other = Encoder(encoder.config, torch.device("cpu"), torch.float32)
    other.load(Weights(model, prefix))
    texts = random_texts([3, 9])
    assert torch.equal(torch.cat(run(other, texts)), torch.cat(run(encoder, texts)))


def test_every_family_is_in_the_zoo() -> None:
    assert {name for name, _ in FAMILIES.values()} == set(ENCODER_ARCHITECTURES.values())


def test_bad_checkpoints_are_named() -> None:
    model = hf_encoder("bert")
    device = torch.device("cpu")
    with pytest.raises(CheckpointError, match=r"lacks 'encoder\.layer\.3\.attention"):
        Encoder(described(model, num_hidden_layers=4), device, torch.float32).load(Weights(model))
    with pytest.raises(CheckpointError, match="config says 2 layers"):
        Encoder(described(model, num_hidden_layers=2), device, torch.float32).load(Weights(model))
    with pytest.raises(CheckpointError, match="has shape"):
        Encoder(described(model, vocab_size=121), device, torch.float32).load(Weights(model))
    with pytest.raises(CheckpointError, match="lacks 'embeddings"):
        Encoder(described(model), device, torch.float32).load(Weights(model, "other."))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": 66}, "multiple of the 4 heads"),
        ({"hidden_act": "swoosh"}, "hidden_act='swoosh'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"num_hidden_layers": None}, "'num_hidden_layers' is missing"),
    ],
)
def test_bad_configs_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        described(hf_encoder("bert"), **changes)


def test_classifiers_of_several_labels_are_refused() -> None:
    model = hf_encoder("bert", "ForSequenceClassification", num_labels=3)
    with pytest.raises(UnsupportedModelError, match="3 labels"):
        described(model)
