"""Which models the persistent decode kernel runs, and what it needs of their layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from engine.kernels.metadata import AttentionMetadata
from engine.kernels.persistent_step import (
    PersistentShape,
    PersistentStep,
    PersistentTiles,
)
from engine.layers.attention import Attention
from engine.layers.linear import Linear
from engine.layers.mlp import GatedMLP
from engine.layers.norm import RMSNorm

if TYPE_CHECKING:
    from engine.models.decoder import Decoder
    from engine.models.decoder_layer import DecoderLayer


def is_alone(metadata: AttentionMetadata) -> bool:
    """Whether a step is one decoding sequence, or a row of padding, that shares nothing."""
    rows = (metadata.num_decodes, metadata.num_seqs, metadata.positions.shape[0])
    return rows == (1, 1, 1) and metadata.shared_prefixes is None


def persistent_step(
    decoder: Decoder,
    kv_caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    tiles: PersistentTiles | None = None,
) -> PersistentStep | None:
    """What runs steps of one token through all layers in one launch; None if nothing can.

    Args:
        decoder: With its weights loaded. They must stay where they are.
        kv_caches: Of each layer, likewise.
        tiles: As in `PersistentStep`.
    """
    config = decoder.config
    shape = PersistentShape(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_q_heads=config.num_q_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        activation=config.activation,
        norm_eps=config.norm_eps,
        norm_offset=config.norm_offset,
        softmax_scale=config.softmax_scale,
        logit_softcap=config.attention_softcap,
        has_qkv_bias=config.qkv_bias,
        has_output_bias=config.output_bias,
        has_mlp_bias=config.mlp_bias,
        has_head_norms=set(config.qk_norms) == {"head"},
    )
    tables = [None if rope is None else decoder.cos_sin[rope] for rope in config.ropes]
    turns_whole_heads = all(
        table is None or 2 * table.shape[-1] == config.head_dim for table in tables
    )
    if not (shape.is_supported and turns_whole_heads and _has_relaxed_loads(decoder.device)):
        return None
    has_known_norms = set(config.qk_norms) in ({""}, {"head"})
    if not has_known_norms or not all(_has_plain_weights(layer) for layer in decoder.layers):
        return None
    rows = [
        (_tensors(layer, table, *caches), window or 0)
        for layer, table, caches, window in zip(
            decoder.layers, tables, kv_caches, config.sliding_windows, strict=True
        )
    ]
    embedding = decoder.embedding
    return PersistentStep(shape, rows, embedding.weight, embedding.scale, tiles)


def _has_relaxed_loads(device: torch.device) -> bool:
    """Whether programs can wait for each other. On a CPU, in Triton's interpreter, none does."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def _has_plain_weights(layer: DecoderLayer) -> bool:
    """Whether the layer is made of the parts the kernel knows, in their plain form."""
    attention, mlp = layer.attention, layer.mlp
    if type(mlp) is not GatedMLP or type(attention) is not Attention:
        return False
    additions = (attention.sinks, attention.chunk_size, attention.query_scales)
    if any(addition is not None for addition in additions):
        return False
    linears = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
    return all(type(linear) is Linear and linear.packed is None for linear in linears)


def _tensors(
    layer: DecoderLayer,
    cos_sin: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> list[torch.Tensor | None]:
    """In the order of `persistent_decode`'s fields."""
    attention, mlp = layer.attention, layer.mlp
    assert isinstance(attention, Attention)
    assert isinstance(mlp, GatedMLP)
    assert isinstance(layer.attention_norm, RMSNorm)
    assert isinstance(layer.mlp_norm, RMSNorm)
    return [
        layer.attention_norm.weight,
        attention.qkv_proj.weight,
        attention.qkv_proj.bias,
        None if attention.q_norm is None else attention.q_norm.weight,
        None if attention.k_norm is None else attention.k_norm.weight,
        cos_sin,
        k_cache,
        v_cache,
        attention.o_proj.weight,
        attention.o_proj.bias,
        layer.mlp_norm.weight,
        mlp.gate_up_proj.weight,
        mlp.gate_up_proj.bias,
        mlp.down_proj.weight,
        mlp.down_proj.bias,
    ]
