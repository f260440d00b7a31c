"""Which architectures the decoder runs.

To add a family: a builder in `families` that states what differs from Llama, its row here, and its
rows in the tests' zoo of tiny models, which compares it with transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import UnsupportedModelError, nearest_name_hint
from engine.models import families, families_gpt, families_moe
from engine.models.config_reader import ConfigReader
from engine.models.description import DecoderConfig

_BUILDERS: dict[str, Callable[[ConfigReader], DecoderConfig]] = {
    "Cohere2ForCausalLM": families_gpt.cohere2,
    "CohereForCausalLM": families_gpt.cohere,
    "DeepseekV2ForCausalLM": families_moe.deepseek_v2,
    "DeepseekV3ForCausalLM": families_moe.deepseek_v3,
    "FalconForCausalLM": families_gpt.falcon,
    "GPT2LMHeadModel": families_gpt.gpt2,
    "GPTBigCodeForCausalLM": families_gpt.gpt_bigcode,
    "GPTJForCausalLM": families_gpt.gptj,
    "GPTNeoXForCausalLM": families_gpt.gpt_neox,
    "Gemma2ForCausalLM": families.gemma2,
    "Gemma3ForCausalLM": families.gemma3,
    "GemmaForCausalLM": families.gemma,
    "Glm4ForCausalLM": families.glm4,
    "GptOssForCausalLM": families_moe.gpt_oss,
    "GraniteForCausalLM": families.granite,
    "GraniteMoeForCausalLM": families_moe.granite_moe,
    "Llama4ForCausalLM": families_moe.llama4,
    "LlamaForCausalLM": families.llama,
    "Ministral3ForCausalLM": families.ministral3,
    "MinistralForCausalLM": families.ministral,
    "MistralForCausalLM": families.mistral,
    "MixtralForCausalLM": families_moe.mixtral,
    "OPTForCausalLM": families_gpt.opt,
    "Olmo2ForCausalLM": families.olmo2,
    "Olmo3ForCausalLM": families.olmo3,
    "OlmoeForCausalLM": families_moe.olmoe,
    "Phi3ForCausalLM": families.phi3,
    "PhiForCausalLM": families_gpt.phi,
    "Qwen2ForCausalLM": families.qwen2,
    "Qwen2MoeForCausalLM": families_moe.qwen2_moe,
    "Qwen3ForCausalLM": families.qwen3,
    "Qwen3MoeForCausalLM": families_moe.qwen3_moe,
    "SmolLM3ForCausalLM": families.smollm3,
    "StableLmForCausalLM": families_gpt.stablelm,
    "Starcoder2ForCausalLM": families_gpt.starcoder2,
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


def is_native(hf_config: Mapping[str, Any]) -> bool:
    """Whether `decoder_config` knows an architecture that the config names."""
    return any(name in _BUILDERS for name in hf_config.get("architectures") or ())


def supported_architectures() -> tuple[str, ...]:
    """Names that `decoder_config` accepts."""
    return tuple(_BUILDERS)


def about(architecture: str) -> str:
    """One line on a supported architecture: its models and what is special about them."""
    return (_BUILDERS[architecture].__doc__ or "").strip().splitlines()[0]


def _supported() -> str:
    return ", ".join(_BUILDERS)
