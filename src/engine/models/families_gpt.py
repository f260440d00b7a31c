"""Families with layer norms, learned positions or plain feed-forwards: GPT-2's descendants."""

from __future__ import annotations

from typing import Any

from engine.models.config_parts import llama_like, one_window, sliding_layers, windows
from engine.models.config_reader import ConfigReader
from engine.models.description import DecoderConfig
from engine.models.rope_config import read_rope

_GPT2_SPELLING = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
    "hidden_act": "activation_function",
    "rms_norm_eps": "layer_norm_epsilon",
}


def gpt2(config: ConfigReader) -> DecoderConfig:
    """GPT-2: learned positions, layer norms, biases everywhere."""
    for key, wanted in (("scale_attn_by_inverse_layer_idx", False), ("scale_attn_weights", True)):
        if config.flag(key, wanted) is not wanted:
            raise config.not_native(key)
    return _gpt2_like(config, num_kv_heads=config.size("n_head"), weight_names="gpt2")


def gpt_bigcode(config: ConfigReader) -> DecoderConfig:
    """StarCoder 1 and SantaCoder: GPT-2 whose heads share one key and one value."""
    if config.flag("scale_attn_weights", True) is not True:
        raise config.not_native("scale_attn_weights")
    is_multi_query = config.flag("multi_query", True)
    return _gpt2_like(
        config,
        default_activation="gelu_pytorch_tanh",
        num_kv_heads=1 if is_multi_query else config.size("n_head"),
        # Without multi-query the parts stand in groups of one head, with it in one group.
        weight_names="gpt_bigcode",
    )


def _gpt2_like(
    config: ConfigReader, *, default_activation: str = "gelu_new", **switches: Any
) -> DecoderConfig:
    config = config.spelled(**_GPT2_SPELLING)
    return _gpt_like(
        config,
        default_activation=default_activation,
        default_tied=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        intermediate_size=config.size("intermediate_size", 4 * config.size("hidden_size")),
        num_learned_positions=config.size("max_position_embeddings"),
        ropes=(None,) * config.size("num_hidden_layers"),
        **switches,
    )


def _gpt_like(config: ConfigReader, **switches: Any) -> DecoderConfig:
    return llama_like(
        config,
        **{
            "default_eps": 1e-5,
            "norm_kind": "layer",
            "norm_bias": True,
            "mlp_kind": "plain",
            **switches,
        },
    )


def opt(config: ConfigReader) -> DecoderConfig:
    """OPT: learned positions from the third row on, relu."""
    for key, wanted in (("do_layer_norm_before", True), ("_remove_final_layer_norm", False)):
        if config.flag(key, wanted) is not wanted:
            raise config.not_native(key)
    config = config.spelled(intermediate_size="ffn_dim", hidden_act="activation_function")
    hidden_size = config.size("hidden_size")
    if config.size("word_embed_proj_dim", hidden_size) != hidden_size:
        raise config.error("word_embed_proj_dim", f"must be hidden_size={hidden_size}")
    if config.flag("layer_norm_elementwise_affine", True) is not True:
        raise config.not_native("layer_norm_elementwise_affine")
    bias = config.flag("enable_bias", True)
    return _gpt_like(
        config,
        default_activation="relu",
        default_tied=True,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        num_learned_positions=config.size("max_position_embeddings"),
        num_kv_heads=config.size("num_attention_heads"),
        ropes=(None,) * config.size("num_hidden_layers"),
        weight_names="opt",
    )


def gptj(config: ConfigReader) -> DecoderConfig:
    """GPT-J: both halves read one norm; neighbouring entries turn together."""
    config = config.spelled(**_GPT2_SPELLING)
    hidden_size, num_heads = config.size("hidden_size"), config.size("num_attention_heads")
    head_dim = hidden_size // num_heads
    rotary_dim = config.size("rotary_dim", 64)
    values = {
        "max_position_embeddings": config.size("max_position_embeddings"),
        "partial_rotary_factor": min(1.0, rotary_dim / head_dim),
    }
    rope = read_rope(ConfigReader(values, config.owner), head_dim, default_share=1.0)
    return _gpt_like(
        config,
        default_activation="gelu_new",
        norm_places="parallel_shared",
        mlp_bias=True,
        lm_head_bias=True,
        intermediate_size=config.size("intermediate_size", 4 * hidden_size),
        num_kv_heads=num_heads,
        rotates_neighbours=True,
        ropes=(rope,) * config.size("num_hidden_layers"),
        weight_names="gptj",
    )


def gpt_neox(config: ConfigReader) -> DecoderConfig:
    """GPT-NeoX and Pythia: both halves read the residual stream, a part of each head turns."""
    config = _with_share(config, "rotary_pct")
    config = config.spelled(rms_norm_eps="layer_norm_eps", rope_theta="rotary_emb_base")
    bias = config.flag("attention_bias", True)
    return _gpt_like(
        config,
        default_activation="gelu",
        default_share=0.25,
        norm_places="parallel" if config.flag("use_parallel_residual", True) else "before",
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=True,
        num_kv_heads=config.size("num_attention_heads"),
        weight_names="gpt_neox",
    )


def falcon(config: ConfigReader) -> DecoderConfig:
    """Falcon 7B to 180B: grouped or single keys, both halves side by side, few biases."""
    if config.flag("alibi", False):
        raise config.not_native("alibi")
    is_new = config.flag("new_decoder_architecture", False)
    config = config.spelled(
        num_key_value_heads="num_kv_heads",
        intermediate_size="ffn_hidden_size",
        hidden_act="activation",
        rms_norm_eps="layer_norm_epsilon",
    )
    num_heads, hidden_size = config.size("num_attention_heads"), config.size("hidden_size")
    num_kv_heads = config.size("num_key_value_heads", num_heads)
    if not is_new:
        num_kv_heads = 1 if config.flag("multi_query", True) else num_heads
    num_norms = config.size("num_ln_in_parallel_attn", 2 if is_new else 1)
    if not config.flag("parallel_attn", True):
        norm_places, names = "before", "falcon"
    elif num_norms == 2 and is_new:
        norm_places, names = "parallel", "falcon_two_norms"
    else:
        norm_places, names = "parallel_shared", "falcon"
    bias = config.flag("bias", False)
    return _gpt_like(
        config,
        default_activation="gelu",
        default_tied=True,
        norm_places=norm_places,
        num_kv_heads=num_kv_heads,
        intermediate_size=config.size("intermediate_size", 4 * hidden_size),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        weight_names=names,
    )


def phi(config: ConfigReader) -> DecoderConfig:
    """Phi 1 and 2: both halves read one norm, half of each head turns, biases everywhere."""
    if config.flag("qk_layernorm", False):
        raise config.not_native("qk_layernorm")
    return _gpt_like(
        config.spelled(rms_norm_eps="layer_norm_eps"),
        default_activation="gelu_new",
        default_share=0.5,
        norm_places="parallel_shared",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        lm_head_bias=True,
        weight_names="phi",
    )


def starcoder2(config: ConfigReader) -> DecoderConfig:
    """StarCoder 2: Llama with layer norms, biases and a plain feed-forward."""
    bias = config.flag("use_bias", True)
    return _gpt_like(
        config.spelled(rms_norm_eps="norm_epsilon"),
        default_activation="gelu_pytorch_tanh",
        default_tied=True,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        sliding_windows=one_window(config, None),
        weight_names="starcoder2",
    )


def stablelm(config: ConfigReader) -> DecoderConfig:
    """StableLM 2 and 3B: Llama with layer norms, of which a quarter of each head turns."""
    if config.flag("qk_layernorm", False):
        raise config.not_native("qk_layernorm")
    is_parallel = config.flag("use_parallel_residual", False)
    return _gpt_like(
        config.spelled(rms_norm_eps="layer_norm_eps"),
        default_activation="silu",
        default_share=0.25,
        mlp_kind="gated",
        norm_places="parallel_shared" if is_parallel else "before",
        qkv_bias=config.flag("use_qkv_bias", False),
    )


def cohere(config: ConfigReader) -> DecoderConfig:
    """Command R: both halves read one norm, which has no bias; neighbouring entries turn."""
    if config.flag("use_qk_norm", False):
        raise config.not_native("use_qk_norm")
    return _cohere_like(config, default_theta=5e5)


def cohere2(config: ConfigReader) -> DecoderConfig:
    """Command R7B and A: Command R with a window on most layers; the others have no positions."""
    num_layers = config.size("num_hidden_layers")
    pattern = config.size("sliding_window_pattern", 4)
    is_sliding = sliding_layers(config, [(i + 1) % pattern != 0 for i in range(num_layers)])
    hidden_size, num_heads = config.size("hidden_size"), config.size("num_attention_heads")
    rope = read_rope(config, hidden_size // num_heads)
    return _cohere_like(
        config,
        sliding_windows=windows(is_sliding, config.size("sliding_window", 4096)),
        ropes=tuple(rope if sliding else None for sliding in is_sliding),
    )


def _cohere_like(config: ConfigReader, **switches: Any) -> DecoderConfig:
    bias = config.flag("attention_bias", False)
    return _gpt_like(
        config.spelled(rms_norm_eps="layer_norm_eps"),
        default_activation="silu",
        default_tied=True,
        mlp_kind="gated",
        norm_bias=False,
        norm_places="parallel_shared",
        rotates_neighbours=True,
        qkv_bias=bias,
        output_bias=bias,
        logits_scale=config.number("logit_scale", 0.0625),
        **switches,
    )


def _with_share(config: ConfigReader, key: str) -> ConfigReader:
    """The config with its own name for the share of a head that turns made the usual one."""
    share = config.get(key)
    if share is None:
        return config
    return ConfigReader({"partial_rotary_factor": share, **config.values}, config.owner)
