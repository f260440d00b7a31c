"""What the families' `config.json` files spell alike, for the builders in `families`."""

from __future__ import annotations

from typing import Any

from engine.models.config_reader import ConfigReader
from engine.models.description import DecoderConfig
from engine.models.rope_config import read_rope

# transformers' name -> the name that kernels know.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
PLAIN_ACTIVATIONS = {**ACTIVATIONS, "relu": "relu", "relu2": "relu2"}
"""Of feed-forwards without a gate."""


def llama_like(
    config: ConfigReader,
    *,
    default_head_dim: int | None = None,
    default_theta: float = 1e4,
    default_share: float | None = None,
    activation_key: str = "hidden_act",
    default_activation: str = "silu",
    default_tied: bool = False,
    default_eps: float = 1e-6,
    **switches: Any,
) -> DecoderConfig:
    """A description with Llama's spelling of sizes, and the family's own switches on top.

    Args:
        config: The config.
        default_head_dim: Where the config has none. Default: hidden size per query head.
        default_theta: Base of the rotation where the config has none.
        default_share: As in `read_rope`.
        activation_key: How the family spells "hidden_act".
        default_activation: Where the config has none.
        default_tied: Whether the output projection is the embedding where the config says nothing.
        default_eps: Epsilon of the norms where the config has none.
        **switches: `DecoderConfig` fields that the family sets itself.

    Raises:
        UnsupportedModelError: A key is missing, holds nonsense, or asks for something unsupported.
    """
    hidden_size = config.size("hidden_size")
    num_layers = config.size("num_hidden_layers")
    num_q_heads = config.size("num_attention_heads")
    num_kv_heads = switches.pop("num_kv_heads", None)
    if num_kv_heads is None:
        num_kv_heads = config.size("num_key_value_heads", num_q_heads)
    if num_q_heads % num_kv_heads:
        raise config.error("num_key_value_heads", f"must divide num_attention_heads={num_q_heads}")
    if config.get("head_dim") is None and default_head_dim is None and hidden_size % num_q_heads:
        raise config.error("hidden_size", f"must be a multiple of the {num_q_heads} heads")
    head_dim = config.size("head_dim", default_head_dim or hidden_size // num_q_heads)
    activation = config.get(activation_key, default_activation)
    is_gated = switches.get("mlp_kind", "gated") == "gated"
    activations = ACTIVATIONS if is_gated else PLAIN_ACTIVATIONS
    if activation not in activations:
        raise config.error(activation_key, f"must be one of {', '.join(activations)}")
    if "ropes" not in switches:
        rope = read_rope(config, head_dim, default_theta=default_theta, default_share=default_share)
        switches["ropes"] = (rope,) * num_layers
    fields: dict[str, Any] = {
        "sliding_windows": (None,) * num_layers,
        "chunk_sizes": (None,) * num_layers,
        "query_scales": (None,) * num_layers,
        "experts": (None,) * num_layers,
        "qk_norms": ("",) * num_layers,
        "intermediate_size": None,
        "softmax_scale": head_dim**-0.5,
        **switches,
    }
    if fields["intermediate_size"] is None:
        fields["intermediate_size"] = config.size("intermediate_size")
    return DecoderConfig(
        architecture=config.owner,
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=fields.pop("head_dim", head_dim),
        max_position_embeddings=config.size("max_position_embeddings"),
        norm_eps=config.number("rms_norm_eps", default_eps),
        activation=activations[activation],
        tie_word_embeddings=config.flag("tie_word_embeddings", default_tied),
        **fields,
    )


def sliding_layers(config: ConfigReader, default: list[bool]) -> list[bool]:
    """Which layers have a sliding window: `layer_types` where given, else the family's rule."""
    layer_types = config.get("layer_types")
    if layer_types is None:
        return default
    if not isinstance(layer_types, list) or len(layer_types) != len(default):
        raise config.error("layer_types", f"must be a list of {len(default)} entries")
    if not all(kind in ("full_attention", "sliding_attention") for kind in layer_types):
        raise config.error("layer_types", "may hold 'full_attention' and 'sliding_attention'")
    return [kind == "sliding_attention" for kind in layer_types]


def windows(is_sliding: list[bool], window: int | None) -> tuple[int | None, ...]:
    """The window of each layer."""
    return tuple(window if sliding else None for sliding in is_sliding)


def biases(config: ConfigReader) -> dict[str, Any]:
    """Llama's two switches for biases."""
    bias = config.flag("attention_bias", False)
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": config.flag("mlp_bias", False),
    }


def one_window(config: ConfigReader, default: int | None) -> tuple[int | None, ...]:
    """The same window for all layers; an explicit null or 0 switches the family's default off."""
    window = default
    if "sliding_window" in config.values:
        window = config.get("sliding_window") or None
        window = None if window is None else config.size("sliding_window")
    return (window,) * config.size("num_hidden_layers")


def window_of_sliding_layers(config: ConfigReader, default: int | None) -> int | None:
    """The window that the sliding layers have; an explicit null switches it off."""
    if "sliding_window" in config.values and config.get("sliding_window") is None:
        return None
    return config.size("sliding_window", default)
