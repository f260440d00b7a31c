"""The parts of a decoder layer that a `DecoderConfig` asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from engine.layers.attention import Attention
from engine.layers.latent_attention import LatentAttention
from engine.layers.mlp import GatedMLP
from engine.layers.moe import MixtureOfExperts
from engine.layers.norm import RMSNorm
from engine.layers.norm_kinds import LayerNorm, Norm
from engine.layers.plain_mlp import PlainMLP
from engine.models.description import DecoderConfig

FeedForward = GatedMLP | PlainMLP | MixtureOfExperts


@dataclass(frozen=True)
class PartOptions:
    """What all parts of one decoder are made with; see `Decoder`."""

    device: torch.device
    dtype: torch.dtype
    batch_invariant: bool
    max_model_len: int

    @property
    def of_linear(self) -> dict[str, Any]:
        """Arguments of `Linear`, and of everything that holds some."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "batch_invariant": self.batch_invariant,
        }


def make_norm(config: DecoderConfig, options: PartOptions) -> Norm:
    """A norm of the model's kind over the residual stream."""
    shared: dict[str, Any] = {
        "eps": config.norm_eps,
        "device": options.device,
        "dtype": options.dtype,
    }
    if config.norm_kind == "layer":
        return LayerNorm(config.hidden_size, has_bias=config.norm_bias, **shared)
    return RMSNorm(config.hidden_size, offset=config.norm_offset, **shared)


def make_attention(
    config: DecoderConfig, index: int, options: PartOptions
) -> Attention | LatentAttention:
    """Attention of one layer."""
    if config.latent is not None:
        return LatentAttention(
            config.hidden_size,
            config.num_q_heads,
            config.latent,
            bias=config.qkv_bias,
            softmax_scale=config.softmax_scale,
            **options.of_linear,
        )
    query_scale = config.query_scales[index]
    query_scales = None
    if query_scale is not None:
        query_scales = query_scale.table(options.max_model_len, options.device)
    return Attention(
        config.hidden_size,
        num_q_heads=config.num_q_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        qkv_bias=config.qkv_bias,
        output_bias=config.output_bias,
        qk_norm=config.qk_norms[index],
        norm_eps=config.norm_eps,
        norm_offset=config.norm_offset,
        softmax_scale=config.softmax_scale,
        sliding_window=config.sliding_windows[index],
        chunk_size=config.chunk_size_within(index, options.max_model_len),
        logit_softcap=config.attention_softcap,
        has_sinks=config.has_sinks,
        query_scales=query_scales,
        **options.of_linear,
    )


def make_feed_forward(config: DecoderConfig, index: int, options: PartOptions) -> FeedForward:
    """Feed-forward of one layer."""
    experts = config.experts[index]
    if experts is not None:
        return MixtureOfExperts(
            config.hidden_size,
            experts,
            **options.of_linear,
        )
    kind = GatedMLP if config.mlp_kind == "gated" else PlainMLP
    return kind(
        config.hidden_size,
        config.intermediate_size,
        activation=config.activation,
        bias=config.mlp_bias,
        **options.of_linear,
    )
