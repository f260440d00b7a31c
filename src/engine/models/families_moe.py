"""Families whose tokens choose among experts."""

from __future__ import annotations

from typing import Any

from engine.kernels.moe_reference import Routing
from engine.layers.latent_attention import LatentConfig
from engine.layers.moe import ExpertsConfig
from engine.layers.query_scale import QueryScale
from engine.layers.rope import yarn_mscale
from engine.models.config_parts import (
    ACTIVATIONS,
    biases,
    llama_like,
    one_window,
    sliding_layers,
    window_of_sliding_layers,
    windows,
)
from engine.models.config_reader import ConfigReader
from engine.models.description import DecoderConfig
from engine.models.families import granite_factors
from engine.models.rope_config import read_rope


def mixtral(config: ConfigReader) -> DecoderConfig:
    """Mixtral: Mistral whose feed-forward is two of eight experts."""
    experts = _experts(
        config,
        num_experts="num_local_experts",
        default_num=8,
        default_chosen=2,
        intermediate_size=config.size("intermediate_size"),
    )
    return llama_like(
        config,
        default_theta=1e6,
        default_eps=1e-5,
        sliding_windows=one_window(config, None),
        experts=(experts,) * config.size("num_hidden_layers"),
        weight_names="mixtral",
    )


def qwen2_moe(config: ConfigReader) -> DecoderConfig:
    """Qwen 1.5 and 2 MoE: Qwen 2 with experts, beside a feed-forward that each token weighs."""
    num_layers = config.size("num_hidden_layers")
    experts = _experts(
        config,
        num_experts="num_experts",
        default_num=60,
        default_chosen=4,
        intermediate_size=config.size("moe_intermediate_size", 1408),
        normalises=config.flag("norm_topk_prob", False),
        shared_size=config.size("shared_expert_intermediate_size", 5632),
        gates_shared=True,
    )
    is_on = config.flag("use_sliding_window", False)
    first_full = config.number("max_window_layers", 28, above=-1)
    is_sliding = sliding_layers(
        config, [is_on and i % 2 == 0 and i < first_full for i in range(num_layers)]
    )
    if any(is_sliding) and not is_on:
        raise config.error("layer_types", "asks for a window while use_sliding_window is off")
    return llama_like(
        config,
        qkv_bias=config.flag("qkv_bias", True),
        sliding_windows=windows(is_sliding, config.size("sliding_window", 4096) if is_on else None),
        experts=_sparse_layers(config, experts),
    )


def qwen3_moe(config: ConfigReader) -> DecoderConfig:
    """Qwen 3 MoE: Qwen 3 with experts."""
    num_layers = config.size("num_hidden_layers")
    experts = _experts(
        config,
        # transformers writes one of the two names, depending on its version.
        num_experts="num_local_experts" if "num_local_experts" in config.values else "num_experts",
        default_num=128,
        default_chosen=8,
        intermediate_size=config.size("moe_intermediate_size", 768),
        normalises=config.flag("norm_topk_prob", False),
    )
    window = None
    if config.flag("use_sliding_window", False):
        window = window_of_sliding_layers(config, 4096)
    bias = config.flag("attention_bias", False)
    return llama_like(
        config,
        qk_norms=("head",) * num_layers,
        qkv_bias=bias,
        output_bias=bias,
        sliding_windows=(window,) * num_layers,
        experts=_sparse_layers(config, experts),
    )


def olmoe(config: ConfigReader) -> DecoderConfig:
    """OLMoE: Llama with experts, and norms over all heads of q and of k."""
    if config.get("clip_qkv") is not None:
        raise config.not_native("clip_qkv")
    num_layers = config.size("num_hidden_layers")
    experts = _experts(
        config,
        num_experts="num_experts",
        default_num=64,
        default_chosen=8,
        intermediate_size=config.size("intermediate_size"),
        normalises=config.flag("norm_topk_prob", False),
    )
    bias = config.flag("attention_bias", False)
    return llama_like(
        config,
        default_eps=1e-5,
        qk_norms=("projection",) * num_layers,
        qkv_bias=bias,
        output_bias=bias,
        experts=(experts,) * num_layers,
    )


def granite_moe(config: ConfigReader) -> DecoderConfig:
    """Granite 3 MoE: Granite with experts."""
    experts = _experts(
        config,
        num_experts="num_local_experts",
        default_num=8,
        default_chosen=2,
        intermediate_size=config.size("intermediate_size"),
    )
    bias = config.flag("attention_bias", False)
    return llama_like(
        config,
        qkv_bias=bias,
        output_bias=bias,
        **granite_factors(config),
        experts=(experts,) * config.size("num_hidden_layers"),
        weight_names="granitemoe",
    )


def gpt_oss(config: ConfigReader) -> DecoderConfig:
    """gpt-oss: sinks, a window on every other layer, experts with a clamped activation."""
    num_layers = config.size("num_hidden_layers")
    experts = _experts(
        config,
        num_experts="num_local_experts",
        default_num=128,
        default_chosen=4,
        intermediate_size=config.size("intermediate_size", 2880),
        activation="clamped_swiglu",
        swiglu_limit=config.number("swiglu_limit", 7.0),
        swiglu_alpha=config.number("swiglu_alpha", 1.702),
        router_bias=True,
        expert_bias=True,
    )
    values = dict(config.values)
    if not config.get("rope_parameters") and not config.get("rope_scaling"):
        values["rope_parameters"] = {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        }
    is_sliding = sliding_layers(config, [index % 2 == 0 for index in range(num_layers)])
    bias = config.flag("attention_bias", True)
    return llama_like(
        ConfigReader(values, config.owner),
        default_head_dim=64,
        default_theta=1.5e5,
        default_eps=1e-5,
        qkv_bias=bias,
        output_bias=bias,
        sliding_windows=windows(is_sliding, window_of_sliding_layers(config, 128)),
        has_sinks=True,
        experts=(experts,) * num_layers,
        weight_names="gpt_oss",
    )


def llama4(config: ConfigReader) -> DecoderConfig:
    """Llama 4 (text): experts, chunks on the layers that turn, growing queries on the others."""
    num_layers = config.size("num_hidden_layers")
    experts = _experts(
        config,
        num_experts="num_local_experts",
        default_num=16,
        default_chosen=1,
        intermediate_size=config.size("intermediate_size", 8192),
        scoring="sigmoid",
        normalises=False,
        scales_input=True,
        shared_size=config.size("intermediate_size", 8192),
    )
    interval = config.size("no_rope_layer_interval", 4)
    default_turning = [int((index + 1) % interval != 0) for index in range(num_layers)]
    turning = config.get("no_rope_layers") or default_turning
    if not isinstance(turning, list) or len(turning) < num_layers:
        raise config.error("no_rope_layers", f"must be a list of {num_layers} entries")
    turning = turning[:num_layers]
    step = config.size("interleave_moe_layer_step", 1)
    sparse = config.get("moe_layers", list(range(step - 1, num_layers, step)))
    if not isinstance(sparse, list):
        raise config.error("moe_layers", "must be a list of layer numbers")
    types = config.get("layer_types") or [
        "chunked_attention" if turns else "full_attention" for turns in turning
    ]
    if not isinstance(types, list) or len(types) != num_layers:
        raise config.error("layer_types", f"must be a list of {num_layers} entries")
    if not set(types) <= {"chunked_attention", "full_attention"}:
        raise config.error("layer_types", "may hold 'chunked_attention' and 'full_attention'")
    chunk_size = config.size("attention_chunk_size", 8192)
    if chunk_size % 64:
        raise config.error("attention_chunk_size", "must be a multiple of 64")
    head_dim = config.size("head_dim", 128)
    rope = read_rope(config, head_dim, default_theta=5e5)
    scale = None
    if config.flag("attn_temperature_tuning", True):
        scale = QueryScale(
            factor=config.number("attn_scale", 0.1),
            period=config.number("floor_scale", 8192.0),
            offset=1,
        )
    norm = "unweighted" if config.flag("use_qk_norm", True) else ""
    return llama_like(
        config,
        default_head_dim=128,
        default_eps=1e-5,
        **{**biases(config), "mlp_bias": False},
        intermediate_size=config.size("intermediate_size_mlp", 16384),
        experts=tuple(experts if index in sparse else None for index in range(num_layers)),
        qk_norms=tuple(norm if turns else "" for turns in turning),
        ropes=tuple(rope if turns else None for turns in turning),
        rotates_neighbours=True,
        chunk_sizes=tuple(chunk_size if kind == "chunked_attention" else None for kind in types),
        query_scales=tuple(None if turns else scale for turns in turning),
        weight_names="llama4",
    )


def deepseek_v2(config: ConfigReader) -> DecoderConfig:
    """DeepSeek V2 and V2-Lite: latent attention, experts beside shared ones."""
    method = config.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise config.error("topk_method", "must be 'greedy' or 'group_limited_greedy'")
    is_grouped = method == "group_limited_greedy"
    return _deepseek(
        config,
        num_experts="n_routed_experts",
        default_num=64,
        # transformers ignores norm_topk_prob here, as the released models have it off.
        normalises=False,
        scale=config.number("routed_scaling_factor", 1.0),
        num_groups=config.size("n_group") if is_grouped else 1,
        num_chosen_groups=config.size("topk_group") if is_grouped else 1,
        default_shared=2,
        default_dense=0,
        default_width=1407,
        qkv_bias=config.flag("attention_bias", False),
        mlp_bias=config.flag("mlp_bias", False),
    )


def deepseek_v3(config: ConfigReader) -> DecoderConfig:
    """DeepSeek V3 and R1: V2 with sigmoid scores, and a bias for the choice."""
    return _deepseek(
        config,
        num_experts="n_routed_experts",
        default_num=256,
        default_chosen=8,
        scoring="sigmoid",
        normalises=config.flag("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor", 2.5),
        num_groups=config.size("n_group", 8),
        num_chosen_groups=config.size("topk_group", 4),
        group_score="top2",
        has_choice_bias=True,
        default_shared=1,
        default_dense=3,
        default_width=2048,
        rotates_neighbours=config.flag("rope_interleave", True),
        qkv_bias=config.flag("attention_bias", False),
    )


def _deepseek(
    config: ConfigReader,
    *,
    default_shared: int,
    default_dense: int,
    default_width: int,
    rotates_neighbours: bool = True,
    qkv_bias: bool,
    mlp_bias: bool = False,
    **routing: Any,
) -> DecoderConfig:
    num_layers, num_heads = config.size("num_hidden_layers"), config.size("num_attention_heads")
    width = config.size("moe_intermediate_size", default_width)
    experts = _experts(
        config,
        intermediate_size=width,
        shared_size=width * config.size("n_shared_experts", default_shared),
        shared_bias=mlp_bias,
        router_in_float32=True,
        **routing,
    )
    latent = LatentConfig(
        query_rank=config.size("q_lora_rank", 1536)
        if config.values.get("q_lora_rank", 1536) is not None
        else None,
        kv_rank=config.size("kv_lora_rank", 512),
        rope_dim=config.size("qk_rope_head_dim", 64),
        nope_dim=config.size("qk_nope_head_dim", 128),
        value_dim=config.size("v_head_dim", 128),
        norm_eps=1e-6,
    )
    if latent.value_dim > latent.head_dim:
        raise config.error("v_head_dim", f"must be at most the keys' {latent.head_dim}")
    rope = read_rope(config, latent.rope_dim)
    softmax_scale = latent.head_dim**-0.5
    stretch = rope.parameters.get("mscale_all_dim", 0)
    if rope.kind != "default" and stretch:
        softmax_scale *= yarn_mscale(rope.parameters["factor"], stretch) ** 2
    num_dense = config.get("first_k_dense_replace", default_dense)
    if isinstance(num_dense, bool) or not isinstance(num_dense, int) or num_dense < 0:
        raise config.error("first_k_dense_replace", "must be an integer >= 0")
    return llama_like(
        config,
        head_dim=latent.head_dim,
        num_kv_heads=num_heads,
        latent=latent,
        softmax_scale=softmax_scale,
        ropes=(rope,) * num_layers,
        rotates_neighbours=rotates_neighbours,
        qkv_bias=qkv_bias,
        mlp_bias=mlp_bias,
        experts=tuple(None if index < num_dense else experts for index in range(num_layers)),
        weight_names="deepseek",
    )


def _experts(
    config: ConfigReader,
    *,
    num_experts: str,
    default_num: int,
    default_chosen: int | None = None,
    intermediate_size: int,
    activation: str | None = None,
    scoring: str = "softmax",
    normalises: bool = True,
    scale: float = 1.0,
    num_groups: int = 1,
    num_chosen_groups: int = 1,
    group_score: str = "max",
    **switches: Any,
) -> ExpertsConfig:
    """One layer's experts, with checked numbers."""
    num = config.size(num_experts, default_num)
    num_chosen = config.size("num_experts_per_tok", default_chosen)
    if num_chosen > num:
        raise config.error("num_experts_per_tok", f"must be at most {num_experts}={num}")
    if num % num_groups or not num_chosen_groups <= num_groups:
        raise config.error("n_group", f"must divide {num} experts and be at least topk_group")
    if activation is None:
        name = config.get("hidden_act", "silu")
        if name not in ACTIVATIONS:
            raise config.error("hidden_act", f"must be one of {', '.join(ACTIVATIONS)}")
        activation = ACTIVATIONS[name]
        switches["shared_activation"] = activation
    return ExpertsConfig(
        num_experts=num,
        intermediate_size=intermediate_size,
        activation=activation,
        routing=Routing(
            num_chosen=num_chosen,
            scoring=scoring,
            normalises=normalises,
            scale=scale,
            num_groups=num_groups,
            num_chosen_groups=num_chosen_groups,
            group_score=group_score,
        ),
        **switches,
    )


def _sparse_layers(
    config: ConfigReader, experts: ExpertsConfig
) -> tuple[ExpertsConfig | None, ...]:
    """Qwen's rule for which layers have experts."""
    dense = config.get("mlp_only_layers", [])
    if not isinstance(dense, list):
        raise config.error("mlp_only_layers", "must be a list of layer numbers")
    step = config.size("decoder_sparse_step", 1)
    return tuple(
        experts if index not in dense and (index + 1) % step == 0 else None
        for index in range(config.size("num_hidden_layers"))
    )
