"""`DecoderLayer`: attention and feed-forward with their norms, around one residual stream."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.kernels.kv_cache import KVCache
from engine.kernels.metadata import AttentionMetadata
from engine.layers.attention import Attention
from engine.layers.mlp import GatedMLP
from engine.layers.norm import RMSNorm
from engine.layers.norm_kinds import NoNorm, Norm
from engine.models.description import DecoderConfig
from engine.models.layer_parts import PartOptions, make_attention, make_feed_forward, make_norm


class DecoderLayer:
    """One layer: attention and feed-forward, each around the residual stream.

    Args:
        config: The model.
        index: Of this layer, from 0.
        options: What its parts are made with.
    """

    def __init__(self, config: DecoderConfig, index: int, options: PartOptions) -> None:
        def norm(*places: str) -> Norm:
            if config.norm_places not in places:
                return NoNorm()
            return make_norm(config, options)

        self.attention = make_attention(config, index, options)
        self.mlp = make_feed_forward(config, index, options)
        self.attention_norm = norm("before", "around", "parallel", "parallel_shared")
        self.mlp_norm = norm("before", "around", "parallel")
        self.post_attention_norm = norm("around", "after")
        self.post_mlp_norm = norm("around", "after")
        self.residual_scale = config.residual_scale
        self.norm_places = config.norm_places
        self.is_parallel = config.is_parallel

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight under the checkpoint's name within the layer."""
        for name, weight in self.attention.named_weights():
            yield f"self_attn.{name}", weight
        for name, weight in self.mlp.named_weights():
            yield f"mlp.{name}", weight
        # Where there are norms after the halves, checkpoints call the first of them as others call
        # the one before the feed-forward.
        has_post_norms = self.norm_places in ("around", "after")
        for stem, norm in (
            ("input_layernorm", self.attention_norm),
            ("post_attention_layernorm", self.post_attention_norm),
            (
                "pre_feedforward_layernorm" if has_post_norms else "post_attention_layernorm",
                self.mlp_norm,
            ),
            ("post_feedforward_layernorm", self.post_mlp_norm),
        ):
            for kind, weight in norm.named_weights():
                yield f"{stem}.{kind}", weight

    def finish_loading(self) -> None:
        """See `Linear.finish_loading`."""
        self.attention.finish_loading()
        self.mlp.finish_loading()

    def __call__(
        self,
        x: torch.Tensor,
        hidden: torch.Tensor,
        next_norm: Norm,
        cos_sin: torch.Tensor | None,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """The whole layer on `hidden`, in place; returns `next_norm` of it, new [T, H].

        Args:
            x: [T, H], `hidden` after this layer's first norm.
            hidden: [T, H], the residual stream.
            next_norm: The next layer's first norm, or the last one.
            cos_sin: As in `Attention`.
            kv_cache: (k_cache, v_cache) of this layer, written in place.
            metadata: Layout of the batch.
        """
        attention, mlp, num_rows = self.attention, self.mlp, x.shape[0]
        adds = self.norm_places == "before" and self.residual_scale == 1.0
        if adds and isinstance(attention, Attention) and attention.o_proj.accumulates(num_rows):
            attention.accumulate(hidden, x, cos_sin, *kv_cache, metadata)
            x = self.mlp_norm(hidden)
        else:
            y = attention(x, cos_sin, *kv_cache, metadata)
            if self.is_parallel:
                y += mlp(self.mlp_norm(hidden) if self.norm_places == "parallel" else x)
                return next_norm.add(self._before_residual(y, self.post_mlp_norm), hidden)[0]
            y = self._before_residual(y, self.post_attention_norm)
            x, _ = self.mlp_norm.add(y, hidden)
        if adds and isinstance(mlp, GatedMLP) and mlp.down_proj.accumulates(num_rows):
            mlp.accumulate(hidden, x)
            return next_norm(hidden)
        return next_norm.add(self._before_residual(mlp(x), self.post_mlp_norm), hidden)[0]

    def fused(
        self,
        hidden: torch.Tensor,
        squares: torch.Tensor,
        cos_sin: torch.Tensor | None,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """The whole layer on `hidden`, in place; `squares` of the old and of the new `hidden`.

        Only for layers that `can_fuse` accepts.
        """
        assert isinstance(self.attention, Attention)
        assert isinstance(self.mlp, GatedMLP)
        assert isinstance(self.attention_norm, RMSNorm)
        assert isinstance(self.mlp_norm, RMSNorm)
        squares = self.attention.fused(
            hidden, squares, self.attention_norm, cos_sin, *kv_cache, metadata
        )
        return self.mlp.fused(hidden, squares, self.mlp_norm)

    def weighed(
        self,
        x: torch.Tensor,
        squares: torch.Tensor,
        hidden: torch.Tensor,
        next_norm: Norm,
        cos_sin: torch.Tensor | None,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole layer on `hidden`, in place; x is hidden times the weight of its first norm.

        Returns:
            (hidden times the weight of `next_norm`, parts of its rows' sums of squares), new.
        """
        assert isinstance(self.attention, Attention)
        assert isinstance(self.mlp, GatedMLP)
        assert isinstance(self.attention_norm, RMSNorm)
        assert isinstance(self.mlp_norm, RMSNorm)
        assert isinstance(next_norm, RMSNorm)
        x, squares = self.attention.weighed(
            x, squares, hidden, self.attention_norm, self.mlp_norm, cos_sin, *kv_cache, metadata
        )
        return self.mlp.weighed(x, squares, hidden, self.mlp_norm, next_norm)

    def _before_residual(self, y: torch.Tensor, post_norm: Norm) -> torch.Tensor:
        y = post_norm(y)
        if self.residual_scale != 1.0:
            y *= self.residual_scale
        return y


def prefixed(
    prefix: str, weights: Iterator[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """`weights` with `prefix` before each name."""
    return ((prefix + name, weight) for name, weight in weights)
