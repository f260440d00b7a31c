"""One builder per family: what its `config.json` says that Llama's does not."""

from __future__ import annotations

from typing import Any

from engine.models.config_parts import llama_like, sliding_layers, windows
from engine.models.config_reader import ConfigReader
from engine.models.description import DecoderConfig
from engine.models.rope_config import read_rope, read_rope_by_layer_type


def llama(config: ConfigReader) -> DecoderConfig:
    """Llama 1 to 3.3, and the many checkpoints that use its name."""
    return llama_like(config, **_biases(config))


def mistral(config: ConfigReader) -> DecoderConfig:
    """Llama with one sliding window for all layers."""
    window = 4096  # the family's default; an explicit null switches it off
    if "sliding_window" in config.values:
        window = config.get("sliding_window") and config.size("sliding_window")
    layer_types = config.get("layer_types", [])
    if not isinstance(layer_types, list) or len(set(map(str, layer_types))) > 1:
        raise config.error("layer_types", "must be a list with the same entry for all layers")
    return llama_like(config, sliding_windows=(window,) * config.size("num_hidden_layers"))


def qwen2(config: ConfigReader) -> DecoderConfig:
    """Qwen 2 and 2.5: biases on q, k and v; windows on the upper layers."""
    return llama_like(config, qkv_bias=True, sliding_windows=_qwen_windows(config))


def qwen3(config: ConfigReader) -> DecoderConfig:
    """Qwen 3: norms on q and k heads, head_dim of its own."""
    bias = config.flag("attention_bias", False)
    return llama_like(
        config,
        default_head_dim=128,
        has_qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
        sliding_windows=_qwen_windows(config),
    )


def granite(config: ConfigReader) -> DecoderConfig:
    """Granite 3: Llama with four factors."""
    return llama_like(
        config,
        **_biases(config),
        embedding_scale=config.number("embedding_multiplier", 1.0),
        residual_scale=config.number("residual_multiplier", 1.0),
        softmax_scale=config.number("attention_multiplier", 1.0),
        logits_scale=1.0 / config.number("logits_scaling", 1.0),
    )


def smollm3(config: ConfigReader) -> DecoderConfig:
    """SmolLM 3: Llama whose every fourth layer has no positions."""
    num_layers = config.size("num_hidden_layers")
    has_rope = config.get("no_rope_layers")  # 1 for a layer with rotation, despite the name
    if has_rope is None:
        interval = config.size("no_rope_layer_interval", 4)
        has_rope = [(index + 1) % interval != 0 for index in range(num_layers)]
    if not isinstance(has_rope, list) or len(has_rope) < num_layers:
        raise config.error("no_rope_layers", f"must be a list of {num_layers} entries")
    window = None
    if config.flag("use_sliding_window", False) and config.get("sliding_window") is not None:
        window = config.size("sliding_window")
    is_sliding = sliding_layers(config, [not rotated for rotated in has_rope[:num_layers]])
    head_dim = config.size(
        "head_dim", config.size("hidden_size") // config.size("num_attention_heads")
    )
    rope = read_rope(config, head_dim, default_theta=2e6)
    return llama_like(
        config,
        **_biases(config),
        default_tied=True,
        ropes=tuple(rope if rotated else None for rotated in has_rope[:num_layers]),
        sliding_windows=windows(is_sliding, window),
    )


def gemma2(config: ConfigReader) -> DecoderConfig:
    """Gemma 2: norms around both halves, soft-caps, a window on every other layer."""
    num_layers = config.size("num_hidden_layers")
    is_sliding = sliding_layers(config, [index % 2 == 0 for index in range(num_layers)])
    return _gemma(
        config,
        is_sliding,
        # Absent means the family's default; an explicit null switches a cap off.
        attention_softcap=_softcap(config, "attn_logit_softcapping", 50.0),
        final_softcap=_softcap(config, "final_logit_softcapping", 30.0),
    )


def gemma3(config: ConfigReader) -> DecoderConfig:
    """Gemma 3 (text): Gemma 2 with norms on q and k heads, no caps, two rotations."""
    num_layers = config.size("num_hidden_layers")
    pattern = config.size("sliding_window_pattern", 6)
    is_sliding = sliding_layers(config, [(i + 1) % pattern != 0 for i in range(num_layers)])
    ropes = read_rope_by_layer_type(config, config.size("head_dim", 256))
    return _gemma(
        config,
        is_sliding,
        has_qk_norm=True,
        final_softcap=_softcap(config, "final_logit_softcapping", 0.0),
        ropes=tuple(
            ropes["sliding_attention" if sliding else "full_attention"] for sliding in is_sliding
        ),
    )


def _gemma(config: ConfigReader, is_sliding: list[bool], **switches: Any) -> DecoderConfig:
    if config.get("use_bidirectional_attention"):
        raise config.error("use_bidirectional_attention", "is not supported; attention is causal")
    bias = config.flag("attention_bias", False)
    return llama_like(
        config,
        default_head_dim=256,
        activation_key="hidden_activation",
        default_activation="gelu_pytorch_tanh",
        default_tied=True,
        qkv_bias=bias,
        output_bias=bias,
        norm_offset=1.0,
        has_post_norms=True,
        embedding_scale=config.size("hidden_size") ** 0.5,
        softmax_scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
        sliding_windows=windows(is_sliding, config.size("sliding_window", 4096)),
        **switches,
    )


def _softcap(config: ConfigReader, key: str, default: float) -> float:
    if key in config.values:
        return 0.0 if config.get(key) is None else config.number(key)
    return default


def _biases(config: ConfigReader) -> dict[str, Any]:
    bias = config.flag("attention_bias", False)
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": config.flag("mlp_bias", False),
    }


def _qwen_windows(config: ConfigReader) -> tuple[int | None, ...]:
    """Layers from `max_window_layers` on have a window, unless `layer_types` says which do."""
    num_layers = config.size("num_hidden_layers")
    first = config.number("max_window_layers", 28, above=-1)
    is_on = config.flag("use_sliding_window", False)
    is_sliding = sliding_layers(config, [is_on and i >= first for i in range(num_layers)])
    if any(is_sliding) and not is_on:
        raise config.error("layer_types", "asks for a window while use_sliding_window is off")
    return windows(is_sliding, config.size("sliding_window", 4096) if is_on else None)
