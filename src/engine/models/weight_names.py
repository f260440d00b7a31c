"""How each family's checkpoints spell and lay out the weights, as data.

The decoder names its weights as Llama's checkpoints do ("model.layers.3.mlp.up_proj.weight"). A
`WeightNames` says under which name a family has them, and how to pick one out of a tensor that
holds several. Numbers in names are written `*`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from engine.models.description import DecoderConfig

Take = Callable[[torch.Tensor, DecoderConfig, int], torch.Tensor]
"""(stored tensor, model, number of the expert) -> the decoder's tensor."""


@dataclass(frozen=True)
class Stored:
    """Where a checkpoint has a weight.

    Attributes:
        name: Of the tensor; with the ending, as ".weight", if the key has it.
        take: A key of `TAKES`: how to pick the weight out of that tensor. "": it is the weight.
    """

    name: str
    take: str = ""


@dataclass(frozen=True)
class WeightNames:
    """One family's spelling.

    Attributes:
        prefix: Of all names but the output projection's; checkpoints of the bare model lack it.
        layers: What "layers" is called.
        stems: The decoder's name within the model ("norm") or a layer ("self_attn.o_proj"), with
            or without the ending -> the checkpoint's. Names that are not here are the same.
        top: Likewise for what has no prefix ("lm_head").
        unread: Regular expressions of tensors that may be there and are not needed.
    """

    prefix: str = "model."
    layers: str = "layers"
    stems: Mapping[str, str | Stored] = field(default_factory=dict)
    top: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)

    def stored(self, name: str) -> tuple[Stored, int]:
        """Where the decoder's weight `name` stands, and the number of its expert (0 without)."""
        stem, _, ending = name.rpartition(".")
        if not name.startswith("model."):
            return Stored(f"{self.top.get(stem, stem)}.{ending}"), 0
        inner = name.removeprefix("model.")
        match = re.fullmatch(r"layers\.(\d+)\.(.*)", inner)
        prefix = self.prefix
        if match is not None:
            prefix, inner = f"{prefix}{self.layers}.{match[1]}.", match[2]
        number = re.search(r"\.(\d+)\.", inner)
        pattern = inner if number is None else inner.replace(number[0], ".*.", 1)
        found = self.stems.get(pattern)
        tail = ""
        if found is None:
            stem, _, ending = pattern.rpartition(".")
            tail = f".{ending}"
            found = self.stems.get(stem, stem)
        stored = Stored(found) if isinstance(found, str) else found
        full = f"{prefix}{stored.name}{tail}"
        expert = 0
        if number is not None:
            full, expert = full.replace("*", number[1]), int(number[1])
        return Stored(full, stored.take), expert

    def is_unread(self, name: str) -> bool:
        """Whether a checkpoint may hold this tensor although nothing reads it."""
        return any(re.fullmatch(pattern, name) for pattern in self.unread)


def _part_of_stacked(index: int) -> Take:
    """Rows of q, k or v in a tensor that has all q rows, then all k, then all v."""

    def take(stored: torch.Tensor, config: DecoderConfig, _: int) -> torch.Tensor:
        q_size, kv_size = (n * config.head_dim for n in (config.num_q_heads, config.num_kv_heads))
        parts: tuple[torch.Tensor, ...] = stored.split([q_size, kv_size, kv_size])
        return parts[index]

    return take


def _part_of_groups(index: int) -> Take:
    """Rows of q, k or v in a tensor that has, for each KV head, its q heads, its k and its v."""

    def take(stored: torch.Tensor, config: DecoderConfig, _: int) -> torch.Tensor:
        group = config.num_q_heads // config.num_kv_heads
        shape = (config.num_kv_heads, group + 2, config.head_dim, *stored.shape[1:])
        parts: tuple[torch.Tensor, ...] = stored.reshape(shape).split([group, 1, 1], dim=1)
        return parts[index].flatten(0, 2)

    return take


def _half(index: int) -> Take:
    """The upper or lower half of the rows."""
    return lambda stored, config, _: stored.chunk(2)[index]


def _transposed(take: Take | None = None) -> Take:
    """The same of a matrix that is stored as [in, out]."""

    def transposed(stored: torch.Tensor, config: DecoderConfig, expert: int) -> torch.Tensor:
        turned = stored.T if stored.dim() == 2 else stored
        return turned if take is None else take(turned, config, expert)

    return transposed


def _of_expert(take: Take | None = None) -> Take:
    """The same of one expert of a tensor that has them all."""

    def of_expert(stored: torch.Tensor, config: DecoderConfig, expert: int) -> torch.Tensor:
        num_experts = next(layer.num_experts for layer in config.experts if layer is not None)
        if stored.shape[0] != num_experts:
            msg = f"{stored.shape[0]} experts instead of {num_experts}"
            raise IndexError(msg)
        return stored[expert] if take is None else take(stored[expert], config, expert)

    return of_expert


def _every_other(first: int) -> Take:
    """Every other row."""
    return lambda stored, config, _: stored[first::2]


def _rows_from(first: int) -> Take:
    """All rows but the first ones."""
    return lambda stored, config, _: stored[first:]


TAKES: Mapping[str, Take] = {
    "transposed": _transposed(),
    "q of stacked": _part_of_stacked(0),
    "k of stacked": _part_of_stacked(1),
    "v of stacked": _part_of_stacked(2),
    "q of stacked, transposed": _transposed(_part_of_stacked(0)),
    "k of stacked, transposed": _transposed(_part_of_stacked(1)),
    "v of stacked, transposed": _transposed(_part_of_stacked(2)),
    "q of groups": _part_of_groups(0),
    "k of groups": _part_of_groups(1),
    "v of groups": _part_of_groups(2),
    "upper half": _half(0),
    "lower half": _half(1),
    "of expert": _of_expert(),
    "of expert, upper half": _of_expert(_half(0)),
    "of expert, lower half": _of_expert(_half(1)),
    "of expert, transposed": _of_expert(_transposed()),
    "of expert, transposed, upper half": _of_expert(_transposed(_half(0))),
    "of expert, transposed, lower half": _of_expert(_transposed(_half(1))),
    "of expert, transposed, even rows": _of_expert(_transposed(_every_other(0))),
    "of expert, transposed, odd rows": _of_expert(_transposed(_every_other(1))),
    "without two rows": _rows_from(2),
}


def take_of_rows(name: str) -> Take | None:
    """What `TAKES[name]` does to the rows of one expert's matrix as its layer has it.

    Quantised weights stand as [out, in] whatever the family does, and experts are apart already.
    None for matrices that plain checkpoints have as [in, out] outside of experts.
    """
    rows = name.removeprefix("of expert").removeprefix(", transposed").removeprefix(", ")
    if "transposed" in rows:
        return None
    return _ROW_TAKES.get(rows) or TAKES[rows]


_ROW_TAKES: Mapping[str, Take] = {
    "": lambda rows, config, _: rows,
    "even rows": _every_other(0),
    "odd rows": _every_other(1),
}


def _merged_qkv(name: str, layout: str) -> dict[str, str | Stored]:
    return {f"self_attn.{part}_proj": Stored(name, layout.replace("qkv", part)) for part in "qkv"}


_PHI3 = {
    **_merged_qkv("self_attn.qkv_proj", "qkv of stacked"),
    "mlp.gate_proj": Stored("mlp.gate_up_proj", "upper half"),
    "mlp.up_proj": Stored("mlp.gate_up_proj", "lower half"),
}
_GPT2_PLACES = {
    "embed_tokens": "wte",
    "embed_positions": "wpe",
    "norm": "ln_f",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
}
_MIXTRAL = {
    "mlp.gate": "block_sparse_moe.gate",
    "mlp.experts.*.gate_proj": "block_sparse_moe.experts.*.w1",
    "mlp.experts.*.up_proj": "block_sparse_moe.experts.*.w3",
    "mlp.experts.*.down_proj": "block_sparse_moe.experts.*.w2",
}

WEIGHT_NAMES: Mapping[str, WeightNames] = {
    "llama": WeightNames(),
    "phi3": WeightNames(stems=_PHI3),
    "glm4": WeightNames(
        stems={
            "mlp.gate_proj": Stored("mlp.gate_up_proj", "upper half"),
            "mlp.up_proj": Stored("mlp.gate_up_proj", "lower half"),
            "post_attention_layernorm": "post_self_attn_layernorm",
            "pre_feedforward_layernorm": "post_attention_layernorm",
            "post_feedforward_layernorm": "post_mlp_layernorm",
        }
    ),
    "phi": WeightNames(
        stems={
            "norm": "final_layernorm",
            "self_attn.o_proj": "self_attn.dense",
            "mlp.up_proj": "mlp.fc1",
            "mlp.down_proj": "mlp.fc2",
        }
    ),
    "starcoder2": WeightNames(
        stems={"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"},
    ),
    "gpt2": WeightNames(
        prefix="transformer.",
        layers="h",
        stems={
            **_GPT2_PLACES,
            **_merged_qkv("attn.c_attn", "qkv of stacked, transposed"),
            "self_attn.o_proj": Stored("attn.c_proj", "transposed"),
            "mlp.up_proj": Stored("mlp.c_fc", "transposed"),
            "mlp.down_proj": Stored("mlp.c_proj", "transposed"),
        },
        unread=(r".*\.attn\.(bias|masked_bias)",),
    ),
    "gpt_bigcode": WeightNames(
        prefix="transformer.",
        layers="h",
        stems={
            **_GPT2_PLACES,
            **_merged_qkv("attn.c_attn", "qkv of groups"),
            "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
        },
        unread=(r".*\.attn\.(bias|masked_bias)",),
    ),
    "gptj": WeightNames(
        prefix="transformer.",
        layers="h",
        stems={
            "embed_tokens": "wte",
            "norm": "ln_f",
            "input_layernorm": "ln_1",
            **{f"self_attn.{part}_proj": f"attn.{part}_proj" for part in "qkv"},
            "self_attn.o_proj": "attn.out_proj",
            "mlp.up_proj": "mlp.fc_in",
            "mlp.down_proj": "mlp.fc_out",
        },
        unread=(r".*\.attn\.(bias|masked_bias)",),
    ),
    "gpt_neox": WeightNames(
        prefix="gpt_neox.",
        stems={
            "embed_tokens": "embed_in",
            "norm": "final_layer_norm",
            **_merged_qkv("attention.query_key_value", "qkv of groups"),
            "self_attn.o_proj": "attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
        top={"lm_head": "embed_out"},
        unread=(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    ),
    "falcon": WeightNames(
        prefix="transformer.",
        layers="h",
        stems={
            "embed_tokens": "word_embeddings",
            "norm": "ln_f",
            **_merged_qkv("self_attention.query_key_value", "qkv of groups"),
            "self_attn.o_proj": "self_attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
        unread=(r".*\.self_attention\.rotary_emb\.inv_freq",),
    ),
    "falcon_two_norms": WeightNames(
        prefix="transformer.",
        layers="h",
        stems={
            "embed_tokens": "word_embeddings",
            "norm": "ln_f",
            "input_layernorm": "ln_attn",
            "post_attention_layernorm": "ln_mlp",
            **_merged_qkv("self_attention.query_key_value", "qkv of groups"),
            "self_attn.o_proj": "self_attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
        unread=(r".*\.self_attention\.rotary_emb\.inv_freq",),
    ),
    "opt": WeightNames(
        prefix="model.decoder.",
        stems={
            "embed_positions": Stored("embed_positions", "without two rows"),
            "norm": "final_layer_norm",
            "input_layernorm": "self_attn_layer_norm",
            "post_attention_layernorm": "final_layer_norm",
            "self_attn.o_proj": "self_attn.out_proj",
            "mlp.up_proj": "fc1",
            "mlp.down_proj": "fc2",
        },
    ),
    "mixtral": WeightNames(stems=_MIXTRAL),
    "granitemoe": WeightNames(
        stems={
            "mlp.gate": "block_sparse_moe.router.layer",
            "mlp.experts.*.gate_proj": Stored(
                "block_sparse_moe.input_linear", "of expert, upper half"
            ),
            "mlp.experts.*.up_proj": Stored(
                "block_sparse_moe.input_linear", "of expert, lower half"
            ),
            "mlp.experts.*.down_proj": Stored("block_sparse_moe.output_linear", "of expert"),
        }
    ),
    "gpt_oss": WeightNames(
        stems={
            "mlp.gate": "mlp.router",
            **{
                f"mlp.experts.*.{ours}.{kind}": Stored(
                    f"mlp.experts.{theirs}{'_bias' if kind == 'bias' else ''}",
                    f"of expert, transposed{rows}",
                )
                for kind in ("weight", "bias")
                for ours, theirs, rows in (
                    ("gate_proj", "gate_up_proj", ", even rows"),
                    ("up_proj", "gate_up_proj", ", odd rows"),
                    ("down_proj", "down_proj", ""),
                )
            },
        }
    ),
    "llama4": WeightNames(
        stems={
            **{f"mlp.{part}_proj": f"feed_forward.{part}_proj" for part in ("gate", "up", "down")},
            **{
                f"mlp.shared_expert.{part}_proj": f"feed_forward.shared_expert.{part}_proj"
                for part in ("gate", "up", "down")
            },
            "mlp.gate": "feed_forward.router",
            "mlp.experts.*.gate_proj.weight": Stored(
                "feed_forward.experts.gate_up_proj", "of expert, transposed, upper half"
            ),
            "mlp.experts.*.up_proj.weight": Stored(
                "feed_forward.experts.gate_up_proj", "of expert, transposed, lower half"
            ),
            "mlp.experts.*.down_proj.weight": Stored(
                "feed_forward.experts.down_proj", "of expert, transposed"
            ),
        }
    ),
    "deepseek": WeightNames(
        stems={
            f"mlp.shared_expert.{part}_proj": f"mlp.shared_experts.{part}_proj"
            for part in ("gate", "up", "down")
        },
        # Layers past the last one predict further tokens in training.
        unread=(r".*rotary_emb\.inv_freq",),
    ),
}
