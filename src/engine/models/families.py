"""One builder per family: what its `config.json` says that Llama's does not."""

from __future__ import annotations

from typing import Any

from engine.layers.query_scale import QueryScale
from engine.models.config_parts import (
    biases,
    llama_like,
    one_window,
    sliding_layers,
    window_of_sliding_layers,
    windows,
)
from engine.models.config_reader import ConfigReader
from engine.models.description import DecoderConfig
from engine.models.rope_config import read_rope, read_rope_by_layer_type


def llama(config: ConfigReader) -> DecoderConfig:
    """Llama 1 to 3.3, and the many checkpoints that use its name."""
    return llama_like(config, **biases(config))


def mistral(config: ConfigReader) -> DecoderConfig:
    """Mistral: Llama with one sliding window for all layers."""
    layer_types = config.get("layer_types", [])
    if not isinstance(layer_types, list) or len(set(map(str, layer_types))) > 1:
        raise config.error("layer_types", "must be a list with the same entry for all layers")
    return llama_like(config, sliding_windows=one_window(config, 4096))


def ministral(config: ConfigReader) -> DecoderConfig:
    """Ministral: Llama whose layers have a sliding window or none, as `layer_types` says."""
    window = window_of_sliding_layers(config, 4096)
    is_sliding = sliding_layers(config, [True] * config.size("num_hidden_layers"))
    return llama_like(config, sliding_windows=windows(is_sliding, window))


def ministral3(config: ConfigReader) -> DecoderConfig:
    """Ministral 3: Llama whose queries grow with their position."""
    num_layers = config.size("num_hidden_layers")
    values = dict(config.values)
    if not config.get("rope_parameters") and not config.get("rope_scaling"):
        values["rope_parameters"] = {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
    config = ConfigReader(values, config.owner)
    rope = ConfigReader(values.get("rope_scaling") or values["rope_parameters"], config.owner)
    scale = QueryScale(
        factor=rope.number("llama_4_scaling_beta"),
        period=rope.size("original_max_position_embeddings"),
        offset=0,
    )
    return llama_like(
        config,
        default_head_dim=128,
        default_eps=1e-5,
        sliding_windows=one_window(config, None),
        query_scales=(scale,) * num_layers,
    )


def phi3(config: ConfigReader) -> DecoderConfig:
    """Phi 3 and 4: Llama with merged projections, partial rotation, and one window."""
    return llama_like(
        config,
        default_share=1.0,
        default_eps=1e-5,
        sliding_windows=one_window(config, None),
        weight_names="phi3",
    )


def olmo2(config: ConfigReader) -> DecoderConfig:
    """OLMo 2: norms after the halves, and over all heads of q and of k."""
    return _olmo(config)


def olmo3(config: ConfigReader) -> DecoderConfig:
    """OLMo 3: OLMo 2 with a window on three layers of four, which have a rotation of their own."""
    num_layers = config.size("num_hidden_layers")
    is_sliding = sliding_layers(config, [(index + 1) % 4 != 0 for index in range(num_layers)])
    head_dim = config.size(
        "head_dim", config.size("hidden_size") // config.size("num_attention_heads")
    )
    ropes = read_rope_by_layer_type(
        config, head_dim, sliding_key="rope_theta", default_thetas=(5e5, 5e5)
    )
    return _olmo(
        config,
        sliding_windows=windows(is_sliding, window_of_sliding_layers(config, 4096)),
        ropes=tuple(
            ropes["sliding_attention" if sliding else "full_attention"] for sliding in is_sliding
        ),
    )


def _olmo(config: ConfigReader, **switches: Any) -> DecoderConfig:
    bias = config.flag("attention_bias", False)
    return llama_like(
        config,
        default_eps=1e-5,
        norm_places="after",
        qk_norms=("projection",) * config.size("num_hidden_layers"),
        qkv_bias=bias,
        output_bias=bias,
        **switches,
    )


def glm4(config: ConfigReader) -> DecoderConfig:
    """GLM 4 (0414): norms around both halves, half of each head turns."""
    return llama_like(
        config,
        default_head_dim=128,
        default_share=0.5,
        default_eps=1.5625e-7,
        norm_places="around",
        rotates_neighbours=True,
        qkv_bias=config.flag("attention_bias", True),
        weight_names="glm4",
    )


def qwen2(config: ConfigReader) -> DecoderConfig:
    """Qwen 2 and 2.5: biases on q, k and v; windows on the upper layers."""
    return llama_like(config, qkv_bias=True, sliding_windows=qwen_windows(config))


def qwen3(config: ConfigReader) -> DecoderConfig:
    """Qwen 3: norms on q and k heads, head_dim of its own."""
    bias = config.flag("attention_bias", False)
    return llama_like(
        config,
        default_head_dim=128,
        qk_norms=("head",) * config.size("num_hidden_layers"),
        qkv_bias=bias,
        output_bias=bias,
        sliding_windows=qwen_windows(config),
    )


def granite(config: ConfigReader) -> DecoderConfig:
    """Granite 3: Llama with four factors."""
    return llama_like(
        config,
        **biases(config),
        **granite_factors(config),
    )


def granite_factors(config: ConfigReader) -> dict[str, Any]:
    """What Granite multiplies embeddings, halves, scores and logits with."""
    return {
        "embedding_scale": config.number("embedding_multiplier", 1.0),
        "residual_scale": config.number("residual_multiplier", 1.0),
        "softmax_scale": config.number("attention_multiplier", 1.0),
        "logits_scale": 1.0 / config.number("logits_scaling", 1.0),
    }


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
        **biases(config),
        default_tied=True,
        ropes=tuple(rope if rotated else None for rotated in has_rope[:num_layers]),
        sliding_windows=windows(is_sliding, window),
    )


def gemma(config: ConfigReader) -> DecoderConfig:
    """Gemma 1: Llama with scaled embeddings and norms that multiply by `1 + weight`."""
    if config.get("use_bidirectional_attention"):
        raise config.error("use_bidirectional_attention", "is not supported; attention is causal")
    bias = config.flag("attention_bias", False)
    values = dict(config.values)
    # The first releases say "gelu" and mean the approximation.
    if config.get("hidden_activation") is None and config.get("hidden_act") == "gelu":
        values["hidden_act"] = "gelu_pytorch_tanh"
    return llama_like(
        ConfigReader(values, config.owner),
        default_head_dim=256,
        default_activation="gelu_pytorch_tanh",
        default_tied=True,
        qkv_bias=bias,
        output_bias=bias,
        norm_offset=1.0,
        embedding_scale=config.size("hidden_size") ** 0.5,
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
        qk_norms=("head",) * num_layers,
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
        norm_places="around",
        embedding_scale=config.size("hidden_size") ** 0.5,
        softmax_scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
        sliding_windows=windows(is_sliding, config.size("sliding_window", 4096)),
        **switches,
    )


def _softcap(config: ConfigReader, key: str, default: float) -> float:
    if key in config.values:
        return 0.0 if config.get(key) is None else config.number(key)
    return default


def qwen_windows(config: ConfigReader) -> tuple[int | None, ...]:
    """Layers from `max_window_layers` on have a window, unless `layer_types` says which do."""
    num_layers = config.size("num_hidden_layers")
    first = config.number("max_window_layers", 28, above=-1)
    is_on = config.flag("use_sliding_window", False)
    is_sliding = sliding_layers(config, [is_on and i >= first for i in range(num_layers)])
    if any(is_sliding) and not is_on:
        raise config.error("layer_types", "asks for a window while use_sliding_window is off")
    return windows(is_sliding, config.size("sliding_window", 4096) if is_on else None)
