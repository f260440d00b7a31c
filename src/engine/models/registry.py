"""Which architectures the decoder runs.

To add a family: a builder in `families` that states what differs from Llama, its row here, and its
rows in the tests' zoo of tiny models, which compares it with transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import UnsupportedModelError, nearest_name_hint
from engine.models import families
from engine.models.config_reader import ConfigReader
from engine.models.description import DecoderConfig

_BUILDERS: dict[str, Callable[[ConfigReader], DecoderConfig]] = {
    "Gemma2ForCausalLM": families.gemma2,
    "Gemma3ForCausalLM": families.gemma3,
    "GraniteForCausalLM": families.granite,
    "LlamaForCausalLM": families.llama,
    "MistralForCausalLM": families.mistral,
    "Qwen2ForCausalLM": families.qwen2,
    "Qwen3ForCausalLM": families.qwen3,
    "SmolLM3ForCausalLM": families.smollm3,
}


def decoder_config(hf_config: Mapping[str, Any]) -> DecoderConfig:
    """Describe the model of a Hugging Face `config.json`.

    Args:
        hf_config: The parsed file, spelled as before or since transformers 5.

    Raises:
        UnsupportedModelError: The architecture is not supported, a key is missing or holds
            nonsense, or the config asks for something the decoder does not do.
    """
    names = hf_config.get("architectures")
    if not isinstance(names, list | tuple) or not names:
        msg = f"The config has architectures={names!r}; one of {_supported()} is needed."
        raise UnsupportedModelError(msg)
    for name in names:
        if name in _BUILDERS:
            return _BUILDERS[name](ConfigReader(hf_config, name))
    hint = nearest_name_hint(str(names[0]), _BUILDERS)
    msg = f"Architecture {names[0]!r} is not supported.{hint} Supported are {_supported()}."
    raise UnsupportedModelError(msg)


def supported_architectures() -> tuple[str, ...]:
    """Names that `decoder_config` accepts."""
    return tuple(_BUILDERS)


def _supported() -> str:
    return ", ".join(_BUILDERS)
