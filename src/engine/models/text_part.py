"""The text part of checkpoints that also have eyes: the same decoder, other names around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engine.errors import UnsupportedModelError
from engine.models.description import DecoderConfig
from engine.models.registry import decoder_config

TEXT_PARTS: Mapping[str, Mapping[str, str]] = {
    "Gemma3ForConditionalGeneration": {"gemma3_text": "Gemma3ForCausalLM"},
    "Llama4ForConditionalGeneration": {"llama4_text": "Llama4ForCausalLM"},
    "Mistral3ForConditionalGeneration": {
        "mistral": "MistralForCausalLM",
        "ministral3": "Ministral3ForCausalLM",
    },
}
"""Architecture -> kind of its text part -> the architecture of that kind on its own."""
_OTHER_PARTS = ("vision_tower.", "vision_model.", "multi_modal_projector.")
# On the hub, and in the model's own layout.
_INNER_NAMES = (("language_model.", ""), ("model.language_model.", "model."))


def has_text_part(hf_config: Mapping[str, Any]) -> bool:
    """Whether the config is of an architecture in `TEXT_PARTS`."""
    return any(name in TEXT_PARTS for name in hf_config.get("architectures") or ())


def text_part_config(hf_config: Mapping[str, Any]) -> DecoderConfig:
    """Describe the text part.

    Such configs leave out what equals a default of transformers, so they are completed by it.

    Raises:
        UnsupportedModelError: The text part is of a kind that the decoder does not have.
    """
    from transformers import AutoConfig

    architecture = next(name for name in hf_config["architectures"] if name in TEXT_PARTS)
    kinds = TEXT_PARTS[architecture]
    values = {key: value for key, value in hf_config.items() if key != "model_type"}
    try:
        whole = AutoConfig.for_model(hf_config.get("model_type"), **values)
    except Exception as error:
        msg = f"transformers cannot read the config of {architecture}: {error}"
        raise UnsupportedModelError(msg) from error
    text = whole.text_config.to_dict()
    if text["model_type"] not in kinds:
        msg = (
            f"{architecture} config: its text part is of the kind {text['model_type']!r}; "
            f"supported are {', '.join(kinds)}."
        )
        raise UnsupportedModelError(msg)
    text["architectures"] = [kinds[text["model_type"]]]
    text["tie_word_embeddings"] = bool(whole.tie_word_embeddings)
    described = decoder_config(text)
    return dataclasses.replace(described, architecture=architecture, is_text_part=True)


class TextPart:
    """A checkpoint of text and images, with the names of the text part alone.

    Args:
        source: The whole checkpoint.
    """

    def __init__(self, source: Any) -> None:
        self._source = source
        names: Mapping[str, Sequence[int]] | None = source.names()
        self._whole_names: dict[str, str] | None = None
        if names is not None:
            self._whole_names = {
                inner: name for name in names if (inner := _inner_name(name)) is not None
            }
            self._shapes = {inner: names[name] for inner, name in self._whole_names.items()}

    def names(self) -> Mapping[str, Sequence[int]] | None:
        """Tensor name -> shape, as in `WeightSource`."""
        return None if self._whole_names is None else self._shapes

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """As in `WeightSource`."""
        self._source.read_into(self._whole(name), out)

    def quantised(self, name: str) -> Any:
        """As in `QuantisedSource`."""
        return self._source.quantised(self._whole(name))

    def quantised_stack(self, name: str) -> Any:
        """As in `QuantisedSource`."""
        return self._source.quantised_stack(self._whole(name))

    def _whole(self, name: str) -> str:
        return name if self._whole_names is None else self._whole_names.get(name, name)


def _inner_name(name: str) -> str | None:
    """The text part's own name of a tensor; None for tensors of other parts."""
    if name.removeprefix("model.").startswith(_OTHER_PARTS):
        return None
    for outer, inner in _INNER_NAMES:
        if name.startswith(outer):
            return inner + name.removeprefix(outer)
    return name
