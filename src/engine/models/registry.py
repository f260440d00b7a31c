"""Which architectures the decoder runs, and how each one's `config.json` describes it.

To add a family: a builder here that states what differs from Llama, and its row in `_BUILDERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import UnsupportedModelError, nearest_name_hint
from engine.models.config_reader import ConfigReader
from engine.models.description import DecoderConfig
from engine.models.rope_config import read_rope

# transformers' name -> the name that kernels know.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
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


def _llama(config: ConfigReader) -> DecoderConfig:
    bias = config.flag("attention_bias", False)
    return _decoder(
        config,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config.flag("mlp_bias", False),
    )


def _mistral(config: ConfigReader) -> DecoderConfig:
    window = 4096  # the family's default; an explicit null switches it off
    if "sliding_window" in config.values:
        window = config.get("sliding_window") and config.size("sliding_window")
    layer_types = config.get("layer_types", [])
    if not isinstance(layer_types, list) or len(set(map(str, layer_types))) > 1:
        raise config.error("layer_types", "must be a list with the same entry for all layers")
    return _decoder(config, sliding_windows=(window,) * config.size("num_hidden_layers"))


def _qwen2(config: ConfigReader) -> DecoderConfig:
    return _decoder(config, qkv_bias=True, sliding_windows=_qwen_windows(config))


def _qwen3(config: ConfigReader) -> DecoderConfig:
    bias = config.flag("attention_bias", False)
    return _decoder(
        config,
        default_head_dim=128,
        has_qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
        sliding_windows=_qwen_windows(config),
    )


def _qwen_windows(config: ConfigReader) -> tuple[int | None, ...]:
    """Layers from `max_window_layers` on have a window, unless `layer_types` says which do."""
    num_layers = config.size("num_hidden_layers")
    window = None
    if config.flag("use_sliding_window", False):
        window = config.size("sliding_window", 4096)
    layer_types = config.get("layer_types")
    if layer_types is None:
        first = config.number("max_window_layers", 28, above=-1)
        return tuple(window if index >= first else None for index in range(num_layers))
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise config.error("layer_types", f"must be a list of {num_layers} entries")
    if not all(kind in ("full_attention", "sliding_attention") for kind in layer_types):
        raise config.error("layer_types", "may hold 'full_attention' and 'sliding_attention'")
    if "sliding_attention" in layer_types and window is None:
        raise config.error("layer_types", "asks for a window while use_sliding_window is off")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _decoder(
    config: ConfigReader,
    *,
    default_head_dim: int | None = None,
    sliding_windows: tuple[int | None, ...] | None = None,
    **switches: Any,
) -> DecoderConfig:
    """What all families spell alike, plus the family's own `DecoderConfig` fields."""
    if config.get("quantization_config") is not None:
        raise config.error("quantization_config", "is not supported; use unquantised weights")
    hidden_size = config.size("hidden_size")
    num_layers = config.size("num_hidden_layers")
    num_q_heads = config.size("num_attention_heads")
    num_kv_heads = config.size("num_key_value_heads", num_q_heads)
    if num_q_heads % num_kv_heads:
        raise config.error("num_key_value_heads", f"must divide num_attention_heads={num_q_heads}")
    if config.get("head_dim") is None and default_head_dim is None and hidden_size % num_q_heads:
        raise config.error("hidden_size", f"must be a multiple of the {num_q_heads} heads")
    head_dim = config.size("head_dim", default_head_dim or hidden_size // num_q_heads)
    activation = config.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise config.error("hidden_act", f"must be one of {', '.join(_ACTIVATIONS)}")
    return DecoderConfig(
        architecture=config.owner,
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.size("intermediate_size"),
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=config.size("max_position_embeddings"),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        activation=_ACTIVATIONS[activation],
        ropes=(read_rope(config, head_dim),) * num_layers,
        sliding_windows=sliding_windows or (None,) * num_layers,
        softmax_scale=head_dim**-0.5,
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        **switches,
    )


def _supported() -> str:
    return ", ".join(_BUILDERS)


_BUILDERS: dict[str, Callable[[ConfigReader], DecoderConfig]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
}
