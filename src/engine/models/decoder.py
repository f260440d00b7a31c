"""`Decoder`: the one decoder-only transformer, driven by a `DecoderConfig`.

One step, for a flat batch of T tokens from B sequences::

    hidden = embedding(input_ids)               [T, H]  the residual stream, updated in place
    per layer: hidden += attention(norm(hidden))        writes K and V, then reads all its blocks
               hidden += mlp(norm(hidden))
    norm(hidden)                                [T, H]  -> compute_logits for the rows needed

Every `hidden += y` is fused with the norm that follows it; for few tokens on a GPU both are fused
with the products around them, and the activation too (`_forward_few_rows`, and for a batch of a
small model `_forward_weighed`): a layer is then norm, qkv and rotation, attention, output, norm and
gate_up, down. The forward makes no host decision
from device data, so it can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from engine.errors import CheckpointError
from engine.kernels import dispatch, few_row_tiles, fused_tiles
from engine.kernels.metadata import AttentionMetadata
from engine.layers.attention import Attention
from engine.layers.embedding import Embedding
from engine.layers.linear import Linear, TiedLinear, can_pack
from engine.layers.mlp import GatedMLP
from engine.layers.norm import RMSNorm
from engine.layers.quantised_linear import StepRows
from engine.layers.rope import build_cos_sin
from engine.models.description import DecoderConfig
from engine.models.quantised_loading import QuantisedSource, load_quantised

if TYPE_CHECKING:
    from engine.kernels.persistent_step import PersistentStep

KVCache = tuple[torch.Tensor, torch.Tensor]


class WeightSource(Protocol):
    """What `Decoder.load` needs of a checkpoint."""

    def names(self) -> Mapping[str, Sequence[int]] | None:
        """Tensor name -> shape; None where every name exists in every shape (random weights)."""

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Fill `out`, a contiguous view in its final place, converting to its dtype and device."""


class DecoderLayer:
    """One layer: attention and feed-forward, each around the residual stream.

    Args:
        config: The model.
        index: Of this layer, from 0.
        device: Where the weights live.
        dtype: Of weights and activations.
        batch_invariant: As in `Linear`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        index: int,
        device: torch.device,
        dtype: torch.dtype,
        batch_invariant: bool,
    ) -> None:
        def norm() -> RMSNorm:
            return RMSNorm(
                config.hidden_size,
                eps=config.norm_eps,
                offset=config.norm_offset,
                device=device,
                dtype=dtype,
            )

        self.attention = Attention(
            config.hidden_size,
            num_q_heads=config.num_q_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            qkv_bias=config.qkv_bias,
            output_bias=config.output_bias,
            qk_norm_eps=config.norm_eps if config.has_qk_norm else None,
            norm_offset=config.norm_offset,
            softmax_scale=config.softmax_scale,
            sliding_window=config.sliding_windows[index],
            logit_softcap=config.attention_softcap,
            device=device,
            dtype=dtype,
            batch_invariant=batch_invariant,
        )
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            activation=config.activation,
            bias=config.mlp_bias,
            device=device,
            dtype=dtype,
            batch_invariant=batch_invariant,
        )
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.post_attention_norm = norm() if config.has_post_norms else None
        self.post_mlp_norm = norm() if config.has_post_norms else None
        self.residual_scale = config.residual_scale

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight under the checkpoint's name within the layer."""
        for name, weight in self.attention.named_weights():
            yield f"self_attn.{name}", weight
        for name, weight in self.mlp.named_weights():
            yield f"mlp.{name}", weight
        yield "input_layernorm.weight", self.attention_norm.weight
        if self.post_attention_norm is None or self.post_mlp_norm is None:
            yield "post_attention_layernorm.weight", self.mlp_norm.weight
        else:
            yield "post_attention_layernorm.weight", self.post_attention_norm.weight
            yield "pre_feedforward_layernorm.weight", self.mlp_norm.weight
            yield "post_feedforward_layernorm.weight", self.post_mlp_norm.weight

    def finish_loading(self) -> None:
        """See `Linear.finish_loading`."""
        self.attention.finish_loading()
        self.mlp.finish_loading()

    def __call__(
        self,
        x: torch.Tensor,
        hidden: torch.Tensor,
        cos_sin: torch.Tensor | None,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """What is still to be added to `hidden`: the feed-forward's output, new [T, H].

        Args:
            x: [T, H], `hidden` after this layer's first norm.
            hidden: [T, H], the residual stream; the attention's output is added in place.
            cos_sin: As in `Attention`.
            kv_cache: (k_cache, v_cache) of this layer, written in place.
            metadata: Layout of the batch.
        """
        y = self.attention(x, cos_sin, *kv_cache, metadata)
        y = self._before_residual(y, self.post_attention_norm)
        x, hidden = self.mlp_norm.add(y, hidden)
        return self._before_residual(self.mlp(x), self.post_mlp_norm)

    def fused(
        self,
        hidden: torch.Tensor,
        squares: torch.Tensor,
        cos_sin: torch.Tensor | None,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """The whole layer on `hidden`, in place; `squares` of the old and of the new `hidden`."""
        squares = self.attention.fused(
            hidden, squares, self.attention_norm, cos_sin, *kv_cache, metadata
        )
        return self.mlp.fused(hidden, squares, self.mlp_norm)

    def weighed(
        self,
        x: torch.Tensor,
        squares: torch.Tensor,
        hidden: torch.Tensor,
        next_norm: RMSNorm,
        cos_sin: torch.Tensor | None,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole layer on `hidden`, in place; x is hidden times the weight of its first norm.

        Returns:
            (hidden times the weight of `next_norm`, parts of its rows' sums of squares), new.
        """
        x, squares = self.attention.weighed(
            x, squares, hidden, self.attention_norm, self.mlp_norm, cos_sin, *kv_cache, metadata
        )
        return self.mlp.weighed(x, squares, hidden, self.mlp_norm, next_norm)

    def _before_residual(self, y: torch.Tensor, post_norm: RMSNorm | None) -> torch.Tensor:
        if post_norm is not None:
            y = post_norm(y)
        if self.residual_scale != 1.0:
            y *= self.residual_scale
        return y


class Decoder:
    """A decoder-only language model on one device; build, `load`, then `forward`.

    Weights are allocated, not filled, by the constructor. Nothing here keeps a gradient.

    Args:
        config: The model.
        device: Where weights, inputs and KV cache live.
        dtype: Of weights, activations, logits and KV cache.
        max_model_len: Positions of the rotary tables. Default: `config.max_position_embeddings`.
            Kinds of rotation that depend on a length take this one (see `layers.rope`).
        batch_invariant: On a GPU use products whose rows do not depend on their neighbours. On a
            CPU this always holds for float32 and bfloat16.
    """

    def __init__(
        self,
        config: DecoderConfig,
        device: torch.device,
        dtype: torch.dtype,
        *,
        max_model_len: int | None = None,
        batch_invariant: bool = False,
    ) -> None:
        self.config = config
        self.device = device
        self.dtype = dtype
        self.max_model_len = max_model_len or config.max_position_embeddings
        self.step_rows = StepRows()
        self.embedding = Embedding(
            config.vocab_size,
            config.hidden_size,
            scale=config.embedding_scale,
            device=device,
            dtype=dtype,
        )
        self.layers = [
            DecoderLayer(config, index, device, dtype, batch_invariant)
            for index in range(config.num_layers)
        ]
        self.norm = RMSNorm(
            config.hidden_size,
            eps=config.norm_eps,
            offset=config.norm_offset,
            device=device,
            dtype=dtype,
        )
        if config.tie_word_embeddings:
            self.lm_head: Linear = TiedLinear(
                self.embedding.weight, batch_invariant=batch_invariant
            )
        else:
            self.lm_head = Linear(
                config.hidden_size,
                {"lm_head": config.vocab_size},
                device=device,
                dtype=dtype,
                batch_invariant=batch_invariant,
            )
        self.cos_sin = {
            rope: build_cos_sin(rope, config.head_dim, self.max_model_len, device)
            for rope in set(config.ropes)
            if rope is not None
        }
        self._max_fused_tokens = self._max_weighed_tokens = 0
        if device.type == "cuda" and not batch_invariant and can_fuse(config, dtype):
            self._max_fused_tokens = few_row_tiles.MAX_FUSED_ROWS
            if dtype == torch.bfloat16:  # rows times a norm's weight may be too large for float16
                self._max_weighed_tokens = fused_tiles.most_rows_of_whole_layer(
                    config.hidden_size, device
                )
        self._persistent: tuple[tuple[int, ...], PersistentStep | None] | None = None
        next_norms = [*(layer.attention_norm for layer in self.layers[1:]), self.norm]
        self._layer_plan = [
            (layer, next_norm, None if rope is None else self.cos_sin[rope])
            for layer, next_norm, rope in zip(self.layers, next_norms, config.ropes, strict=True)
        ]

    @property
    def num_parameters(self) -> int:
        """Numbers in the checkpoint, tied ones once."""
        return self.config.num_parameters

    def kv_cache_shape(self, num_blocks: int, block_size: int) -> tuple[int, int, int, int]:
        """Shape of one layer's `k_cache`, and of its `v_cache`."""
        return (num_blocks, block_size, self.config.num_kv_heads, self.config.head_dim)

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor a checkpoint must have, under transformers' name, as a view to fill.

        Only before `load`: on a CPU, loaded weights are kept in another layout.
        """
        for _, weights in self._groups():
            yield from weights

    @torch.inference_mode()
    def load(self, checkpoint: WeightSource, quantised: QuantisedSource | None = None) -> None:
        """Fill every weight straight into its final place; call once.

        Args:
            checkpoint: Has every weight.
            quantised: The checkpoint again, where its quantised weights are to stay as they are
                (see `quantised_loading`); those of other kinds and shapes are expanded as without.

        Rotary buffers of old checkpoints and an `lm_head.weight` beside tied embeddings are left
        unread. Checkpoints of the bare model, without the `model.` prefix, are accepted.

        Raises:
            CheckpointError: Tensors are missing, unknown or of the wrong shape; nothing was read.
        """
        names = checkpoint.names()
        prefix = "model."
        if names is not None:
            if "embed_tokens.weight" in names:
                prefix = ""
            self._check_names(names, prefix)
        loaded = (
            set() if quantised is None else load_quantised(self, quantised, prefix, self.step_rows)
        )
        for group, weights in self._groups():
            for name, view in weights:
                if name.removeprefix("model.") in loaded:
                    continue
                checkpoint.read_into(_checkpoint_name(name, prefix), view)
            if isinstance(group, DecoderLayer | Linear):
                group.finish_loading()

    @torch.inference_mode()
    def forward(
        self,
        input_ids: torch.Tensor,
        kv_caches: Sequence[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Hidden states after the final norm, new [T, H].

        Args:
            input_ids: [T] int64 in [0, V); any valid id for padding.
            kv_caches: (k_cache, v_cache) of each layer, each `kv_cache_shape` of `dtype`; the new
                tokens' keys and values are written in place.
            metadata: Layout of the batch; positions below `max_model_len`.
        """
        dispatch.begin_step(metadata)
        self.step_rows.num_decodes = metadata.num_decodes
        if self._max_fused_tokens >= input_ids.shape[0]:
            step = self._persistent_step(kv_caches, metadata)
            if step is not None:
                return self.norm(step(input_ids, metadata))
            return self._forward_few_rows(input_ids, kv_caches, metadata)
        if self._max_weighed_tokens >= input_ids.shape[0]:
            return self._forward_weighed(input_ids, kv_caches, metadata)
        hidden = self.embedding(input_ids)  # [T, H], the residual stream from here on
        x = self.layers[0].attention_norm(hidden)
        for (layer, next_norm, cos_sin), kv_cache in zip(self._layer_plan, kv_caches, strict=True):
            y = layer(x, hidden, cos_sin, kv_cache, metadata)
            x, hidden = next_norm.add(y, hidden)
        return x

    def _persistent_step(
        self, kv_caches: Sequence[KVCache], metadata: AttentionMetadata
    ) -> PersistentStep | None:
        """What runs all layers of this step in one launch; None where nothing does.

        Made when the first step of its kind is met, which is never under capture.
        """
        # Imports triton: on GPUs only.
        from engine.models import persistent

        if not persistent.is_alone(metadata):
            return None
        addresses = tuple(cache.data_ptr() for pair in kv_caches for cache in pair)
        if self._persistent is None or self._persistent[0] != addresses:
            self._persistent = (addresses, persistent.persistent_step(self, kv_caches))
        return self._persistent[1]

    def _forward_few_rows(
        self,
        input_ids: torch.Tensor,
        kv_caches: Sequence[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """`forward` without kernels of their own for norms, residual sums and activations."""
        hidden, squares = self.embedding.with_squares(input_ids)
        for (layer, _, cos_sin), kv_cache in zip(self._layer_plan, kv_caches, strict=True):
            squares = layer.fused(hidden, squares, cos_sin, kv_cache, metadata)
        return self.norm(hidden)

    def _forward_weighed(
        self,
        input_ids: torch.Tensor,
        kv_caches: Sequence[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """`forward` with norms, rotation, activations and residual sums in the products' ends."""
        hidden, x, squares = self.embedding.weighed(input_ids, self.layers[0].attention_norm)
        for (layer, next_norm, cos_sin), kv_cache in zip(self._layer_plan, kv_caches, strict=True):
            x, squares = layer.weighed(x, squares, hidden, next_norm, cos_sin, kv_cache, metadata)
        return self.norm(hidden)

    @torch.inference_mode()
    def compute_logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Logits, [R, V] in the model's dtype, of R rows of `forward`'s result.

        The dtype is transformers' choice, too; a sampler widens what it needs. Quantised output
        projections give float32.

        Args:
            hidden: [R, H].
            out: [R, V], contiguous, to be written in place; None makes a new tensor.
        """
        logits = self.lm_head(hidden, out=out)
        if self.config.logits_scale != 1.0:
            logits *= self.config.logits_scale
        if self.config.final_softcap:
            cap = self.config.final_softcap
            logits = logits.div_(cap).tanh_().mul_(cap)
        return logits

    def _groups(
        self,
    ) -> Iterator[
        tuple[DecoderLayer | Linear | Embedding | RMSNorm, Iterator[tuple[str, torch.Tensor]]]
    ]:
        """Each part of the model with its weights under full names, in checkpoint order."""
        yield self.embedding, _prefixed("model.embed_tokens.", self.embedding.named_weights())
        for index, layer in enumerate(self.layers):
            yield layer, _prefixed(f"model.layers.{index}.", layer.named_weights())
        yield self.norm, _prefixed("model.norm.", self.norm.named_weights())
        yield self.lm_head, self.lm_head.named_weights()

    def _check_names(self, names: Mapping[str, Sequence[int]], prefix: str) -> None:
        expected = {
            _checkpoint_name(name, prefix): tuple(view.shape) for name, view in self.named_weights()
        }
        if missing := expected.keys() - names.keys():
            msg = f"The checkpoint lacks {_listing(missing)}, which {self.config.architecture} has."
            raise CheckpointError(msg)
        unknown = {name for name in names.keys() - expected.keys() if not self._is_spare(name)}
        if unknown:
            msg = (
                f"The checkpoint has {_listing(unknown)}, which {self.config.architecture} with "
                "this config does not use: config.json and weights do not belong together."
            )
            raise CheckpointError(msg)
        for name, shape in expected.items():
            if tuple(names[name]) != shape:
                msg = (
                    f"Tensor {name!r} has shape {tuple(names[name])} in the checkpoint; the "
                    f"config asks for {shape}."
                )
                raise CheckpointError(msg)

    def _is_spare(self, name: str) -> bool:
        """Whether a checkpoint may hold this tensor although nothing reads it."""
        if name == "lm_head.weight":
            return self.config.tie_word_embeddings
        return name.endswith("rotary_emb.inv_freq")


def can_fuse(config: DecoderConfig, dtype: torch.dtype) -> bool:
    """Whether norms, residual sums and activations may join the products around them (few rows).

    Not where something stands between a product and the residual stream. In float32, without
    tensor cores, nothing was measured.
    """
    has_plain_sums = not config.has_post_norms and config.residual_scale == 1.0
    return has_plain_sums and dtype.itemsize == 2


def weight_bytes(config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Memory that the loaded weights of a model take, known before anything is allocated."""
    probe = torch.empty(0, device=device, dtype=dtype)
    numbers = config.num_parameters
    if config.tie_word_embeddings and can_pack(probe):
        numbers += config.vocab_size * config.hidden_size  # the output projection's own layout
    return numbers * dtype.itemsize


def _prefixed(
    prefix: str, weights: Iterator[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    return ((prefix + name, weight) for name, weight in weights)


def _checkpoint_name(name: str, prefix: str) -> str:
    """`name` as the checkpoint spells it: with "model." or, for a bare model, without."""
    return prefix + name.removeprefix("model.") if name.startswith("model.") else name


def _listing(names: set[str], limit: int = 4) -> str:
    shown = ", ".join(map(repr, sorted(names)[:limit]))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
