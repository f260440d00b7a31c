"""What each GGUF architecture is in Hugging Face's terms: names, layouts and config, as data.

Sources: key and tensor names from the GGUF specification (ggml-org/ggml, docs/gguf.md) and the
`gguf` package; what the files leave unsaid (Gemma's factors on the scores, SmolLM 3's layers
without positions, whether experts' weights are normalised) from llama.cpp's own code for the
architecture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from engine.loader.gguf_config import GGUFKeys

Entries = Callable[["GGUFKeys", dict[str, Any]], dict[str, Any]]
"""(metadata, config so far) -> what the family's config says beyond Llama's."""


def _nothing(keys: GGUFKeys, config: dict[str, Any]) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True)
class GGUFArchitecture:
    """What distinguishes one GGUF architecture from the next.

    Attributes:
        model_type: Hugging Face's name of the family.
        hf_architecture: Hugging Face's class name.
        states_biases: Whether its config says if attention and MLP have biases. Where not, they
            follow from the family.
        with_window: The architecture of a file that has a sliding window, None where that is not
            supported.
        with_experts: Likewise of a file that has experts.
        layer_names: GGUF's name of a layer's module -> Hugging Face's, where it is not the usual
            one; `*` stands for the number of an expert of a tensor that holds them all.
        reads: Metadata that would be refused elsewhere.
        entries: What else its config says.
        is_interleaved: Whether q and k are stored with the two halves of a head interleaved.
        norm_offset: What is subtracted from stored norms (Gemma's are stored as 1 + weight).
        turns_partly: Whether a part of a head may turn.
    """

    model_type: str
    hf_architecture: str
    states_biases: bool = True
    with_window: GGUFArchitecture | None = None
    with_experts: GGUFArchitecture | None = None
    layer_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    reads: frozenset[str] = frozenset()
    entries: Entries = _nothing
    is_interleaved: bool = False
    norm_offset: float = 0.0
    turns_partly: bool = False


def _experts(num_experts: str, **more: Any) -> Entries:
    def entries(keys: GGUFKeys, config: dict[str, Any]) -> dict[str, Any]:
        return {
            num_experts: keys.count("expert_count"),
            "num_experts_per_tok": keys.count("expert_used_count"),
            **more,
        }

    return entries


def _qwen_experts(*, normalises: bool, has_shared: bool) -> Entries:
    def entries(keys: GGUFKeys, config: dict[str, Any]) -> dict[str, Any]:
        found = _experts("num_experts")(keys, config)
        found["moe_intermediate_size"] = keys.count("expert_feed_forward_length")
        found["norm_topk_prob"] = normalises
        if has_shared:
            found["shared_expert_intermediate_size"] = keys.count(
                "expert_shared_feed_forward_length"
            )
        return found

    return entries


def _gemma(num_layers_of_27b: int) -> Entries:
    def entries(keys: GGUFKeys, config: dict[str, Any]) -> dict[str, Any]:
        # The scores of the largest model are scaled by the hidden size per head.
        per_head = config["hidden_size"] // config["num_attention_heads"]
        is_27b = config["num_hidden_layers"] == num_layers_of_27b
        return {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": per_head if is_27b else config["head_dim"],
            "sliding_window": keys.count("attention.sliding_window"),
            **{
                name: keys.number(name) if keys.get(name) else None
                for name in ("attn_logit_softcapping", "final_logit_softcapping")
            },
        }

    return entries


def _gemma3(keys: GGUFKeys, config: dict[str, Any]) -> dict[str, Any]:
    sliding = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    entries = _gemma(62)(keys, config)
    entries["rope_parameters"] = {
        "full_attention": config["rope_parameters"],
        "sliding_attention": sliding,
    }
    return entries


def _granite(keys: GGUFKeys, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "attention_multiplier": keys.number("attention.scale"),
        "residual_multiplier": keys.number("residual_scale", 1.0),
        "embedding_multiplier": keys.number("embedding_scale", 1.0),
        "logits_scaling": keys.number("logit_scale", 1.0),
    }


def _phi3(keys: GGUFKeys, config: dict[str, Any]) -> dict[str, Any]:
    window = keys.get("attention.sliding_window")
    return {"sliding_window": keys.count("attention.sliding_window") if window else None}


def _experts_of(stem: str, gate: str, up: str, down: str) -> dict[str, str]:
    return {
        "ffn_gate_exps": f"{stem}.experts.*.{gate}",
        "ffn_up_exps": f"{stem}.experts.*.{up}",
        "ffn_down_exps": f"{stem}.experts.*.{down}",
        "ffn_gate_inp": f"{stem}.gate",
    }


_QWEN_EXPERTS = _experts_of("mlp", "gate_proj", "up_proj", "down_proj")
_SHARED_EXPERT = {
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_NORMS_AFTER = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERT_KEYS = frozenset({"expert_count"})
_CAPS = frozenset({"attn_logit_softcapping", "final_logit_softcapping"})
_WINDOW = frozenset({"attention.sliding_window"})

ARCHITECTURES: Final[Mapping[str, GGUFArchitecture]] = {
    # Mistral's and Mixtral's models are stored as `llama`.
    "llama": GGUFArchitecture(
        "llama",
        "LlamaForCausalLM",
        is_interleaved=True,
        with_window=GGUFArchitecture(
            "mistral", "MistralForCausalLM", states_biases=False, is_interleaved=True
        ),
        with_experts=GGUFArchitecture(
            "mixtral",
            "MixtralForCausalLM",
            states_biases=False,
            is_interleaved=True,
            layer_names=_experts_of("block_sparse_moe", "w1", "w3", "w2"),
            reads=_EXPERT_KEYS,
            entries=_experts("num_local_experts", sliding_window=None),
        ),
    ),
    "qwen2": GGUFArchitecture("qwen2", "Qwen2ForCausalLM", states_biases=False),
    "qwen3": GGUFArchitecture("qwen3", "Qwen3ForCausalLM"),
    "qwen2moe": GGUFArchitecture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        states_biases=False,
        layer_names={**_QWEN_EXPERTS, **_SHARED_EXPERT},
        reads=_EXPERT_KEYS,
        entries=_qwen_experts(normalises=False, has_shared=True),
    ),
    "qwen3moe": GGUFArchitecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        layer_names=_QWEN_EXPERTS,
        reads=_EXPERT_KEYS,
        entries=_qwen_experts(normalises=True, has_shared=False),
    ),
    "gemma2": GGUFArchitecture(
        "gemma2",
        "Gemma2ForCausalLM",
        layer_names={**_NORMS_AFTER, "ffn_norm": "pre_feedforward_layernorm"},
        reads=_CAPS | _WINDOW,
        entries=_gemma(46),
        norm_offset=1.0,
    ),
    "gemma3": GGUFArchitecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        layer_names={**_NORMS_AFTER, "ffn_norm": "pre_feedforward_layernorm"},
        reads=_CAPS | _WINDOW,
        entries=_gemma3,
        norm_offset=1.0,
    ),
    "granite": GGUFArchitecture(
        "granite",
        "GraniteForCausalLM",
        is_interleaved=True,
        reads=frozenset({"attention.scale", "residual_scale", "embedding_scale", "logit_scale"}),
        entries=_granite,
    ),
    "olmo2": GGUFArchitecture("olmo2", "Olmo2ForCausalLM", layer_names=_NORMS_AFTER),
    "phi3": GGUFArchitecture(
        "phi3",
        "Phi3ForCausalLM",
        states_biases=False,
        layer_names={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        reads=_WINDOW,
        entries=_phi3,
        turns_partly=True,
    ),
    "smollm3": GGUFArchitecture("smollm3", "SmolLM3ForCausalLM", is_interleaved=True),
}
