"""`Decoder`: the one decoder-only transformer, driven by a `DecoderConfig`.

One step, for a flat batch of T tokens from B sequences::

    hidden = embedding(input_ids)               [T, H]  the residual stream, updated in place
    per layer: hidden += attention(norm(hidden))        writes K and V, then reads all its blocks
               hidden += mlp(norm(hidden))
    norm(hidden)                                [T, H]  -> compute_logits for the rows needed

Every `hidden += y` is fused with the norm that follows it, or on a GPU with the product that makes
y; for few tokens there both are fused
with the products around them, and the activation too (`_forward_few_rows`, and for a batch of a
small model `_forward_weighed`): a layer is then norm, qkv and rotation, attention, output, norm and
gate_up, down. The forward makes no host decision
from device data, so it can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from engine.kernels import dispatch, few_row_tiles, fused_tiles
from engine.kernels.kv_cache import KVCache
from engine.kernels.metadata import AttentionMetadata
from engine.layers.embedding import Embedding
from engine.layers.linear import Linear, TiedLinear, can_pack
from engine.layers.norm import RMSNorm
from engine.layers.norm_kinds import Norm
from engine.layers.quantised_factory import QuantisedFactory
from engine.layers.quantised_linear import StepRows
from engine.layers.rope import build_cos_sin
from engine.models.decoder_layer import DecoderLayer, prefixed
from engine.models.description import DecoderConfig
from engine.models.layer_parts import PartOptions, make_norm
from engine.models.quantised_loading import joins_codes, load_quantised
from engine.models.weight_loading import WeightSource, load_weights

if TYPE_CHECKING:
    from engine.kernels.persistent_step import PersistentStep
    from engine.models.quantiser import Quantiser


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
        options = PartOptions(device, dtype, batch_invariant, self.max_model_len)
        self.embedding = Embedding(
            config.vocab_size,
            config.hidden_size,
            scale=config.embedding_scale,
            device=device,
            dtype=dtype,
        )
        self.layers = [DecoderLayer(config, index, options) for index in range(config.num_layers)]
        self.norm = make_norm(config, options)
        self.position_embedding = None
        if config.num_learned_positions:
            self.position_embedding = Embedding(
                config.num_learned_positions, config.hidden_size, device=device, dtype=dtype
            )
        if config.tie_word_embeddings:
            self.lm_head: Linear = TiedLinear(
                self.embedding.weight, batch_invariant=batch_invariant
            )
        else:
            self.lm_head = Linear(
                config.hidden_size,
                {"lm_head": config.vocab_size},
                bias=config.lm_head_bias,
                device=device,
                dtype=dtype,
                batch_invariant=batch_invariant,
            )
        rope_head_dim = config.head_dim if config.latent is None else config.latent.rope_dim
        self.cos_sin = {
            rope: build_cos_sin(rope, rope_head_dim, self.max_model_len, device)
            for rope in set(config.ropes)
            if rope is not None
        }
        self._has_codes = False
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

        self._distinct_layers = config.distinct_layers

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[list[int]]:
        """Inside, `forward` runs one layer of each kind, which launches every kernel of a step.

        Yields:
            Which layers: `forward` then wants the caches of these. What it computes means nothing.
        """
        whole, layers = self._layer_plan, self._distinct_layers
        self._layer_plan = [whole[index] for index in layers]
        try:
            yield layers
        finally:
            self._layer_plan = whole

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
    def load(
        self,
        checkpoint: WeightSource,
        factory: QuantisedFactory | None = None,
        quantiser: Quantiser | None = None,
    ) -> None:
        """Fill every weight straight into its final place; call once.

        Args:
            checkpoint: Has every weight.
            factory: Makes layers of weights that the checkpoint has in codes, which are expanded
                without one (see `quantised_loading`).
            quantiser: Makes codes of the checkpoint's plain weights, for the factory.

        Rotary buffers of old checkpoints and an `lm_head.weight` beside tied embeddings are left
        unread. Checkpoints of the bare model, without the `model.` prefix, are accepted.

        Raises:
            CheckpointError: Tensors are missing, unknown or of the wrong shape; nothing was read.
            UnsupportedModelError: The family does not take weights in codes.
            ConfigError: There is a quantiser, and the weights are in codes already.
        """
        family = load_weights(shapes_of(self.config), checkpoint, quantiser)
        loaded: set[str] = set()
        if factory is not None:
            loaded = load_quantised(self, family, factory)
            # Those read the weights of plain layers, and so does a step of one launch.
            self._max_weighed_tokens = 0
            self._has_codes = True
            is_fused = self._max_fused_tokens > 0 and joins_codes(self)
            self._max_fused_tokens = 1 if is_fused else 0
            self._distinct_layers = list(range(self.config.num_layers))  # formats of their own
        for group, weights in self._groups():
            for name, view in weights:
                if name not in loaded:
                    family.read_into(name, view)
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
            kv_caches: (k_cache, v_cache) of each layer, each `kv_cache_shape`, of `dtype` or 8
                bits; the new tokens' keys and values are written in place.
            metadata: Layout of the batch; positions below `max_model_len`.
        """
        dispatch.begin_step(metadata)
        self.step_rows.num_decodes = metadata.num_decodes
        if self._max_fused_tokens >= input_ids.shape[0]:
            step = None if self._has_codes else self._persistent_step(kv_caches, metadata)
            if step is not None:
                return self.norm(step(input_ids, metadata))
            return self._forward_few_rows(input_ids, kv_caches, metadata)
        if self._max_weighed_tokens >= input_ids.shape[0]:
            return self._forward_weighed(input_ids, kv_caches, metadata)
        hidden = self.embedding(input_ids)  # [T, H], the residual stream from here on
        if self.position_embedding is not None:
            hidden += self.position_embedding(metadata.positions)
        x = self.layers[0].attention_norm(hidden)
        for (layer, next_norm, cos_sin), kv_cache in zip(self._layer_plan, kv_caches, strict=True):
            x = layer(x, hidden, next_norm, cos_sin, kv_cache, metadata)
        return x

    def _persistent_step(
        self, kv_caches: Sequence[KVCache], metadata: AttentionMetadata
    ) -> PersistentStep | None:
        """What runs all layers of this step in one launch; None where nothing does.

        Made when the first step of its kind is met, which is never under capture.
        """
        # Imports triton: on GPUs only.
        from engine.models import persistent

        plain = [
            (k_cache, v_cache)
            for k_cache, v_cache in kv_caches
            if isinstance(k_cache, torch.Tensor) and isinstance(v_cache, torch.Tensor)
        ]
        if not persistent.is_alone(metadata) or len(plain) < len(kv_caches):
            return None
        addresses = tuple(cache.data_ptr() for pair in plain for cache in pair)
        if self._persistent is None or self._persistent[0] != addresses:
            self._persistent = (addresses, persistent.persistent_step(self, plain))
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
        first_norm = self.layers[0].attention_norm
        assert isinstance(first_norm, RMSNorm)
        hidden, x, squares = self.embedding.weighed(input_ids, first_norm)
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
        tuple[DecoderLayer | Linear | Embedding | Norm, Iterator[tuple[str, torch.Tensor]]]
    ]:
        """Each part of the model with its weights under full names, in checkpoint order."""
        yield self.embedding, prefixed("model.embed_tokens.", self.embedding.named_weights())
        if self.position_embedding is not None:
            positions = self.position_embedding
            yield positions, prefixed("model.embed_positions.", positions.named_weights())
        for index, layer in enumerate(self.layers):
            yield layer, prefixed(f"model.layers.{index}.", layer.named_weights())
        yield self.norm, prefixed("model.norm.", self.norm.named_weights())
        yield self.lm_head, self.lm_head.named_weights()


def can_fuse(config: DecoderConfig, dtype: torch.dtype) -> bool:
    """Whether norms, residual sums and activations may join the products around them (few rows).

    Not where something stands between a product and the residual stream. In float32, without
    tensor cores, nothing was measured.
    """
    is_plain = (
        config.norm_kind == "rms"
        and config.norm_places == "before"
        and config.mlp_kind == "gated"
        and config.latent is None
        and not config.num_learned_positions
        and not any(config.experts)
        and config.residual_scale == 1.0
    )
    return is_plain and dtype.itemsize == 2


def shapes_of(config: DecoderConfig) -> Decoder:
    """A decoder that has shapes and no memory."""
    return Decoder(config, torch.device("meta"), torch.float32, max_model_len=1)


def num_parameters(config: DecoderConfig) -> int:
    """Numbers in the checkpoint, tied ones once, known before anything is allocated."""
    return sum(weight.numel() for _, weight in shapes_of(config).named_weights())


def weight_bytes(config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Memory that the loaded weights of a model take, known before anything is allocated."""
    probe = torch.empty(0, device=device, dtype=dtype)
    numbers = num_parameters(config)
    if config.tie_word_embeddings and can_pack(probe):
        numbers += config.vocab_size * config.hidden_size  # the output projection's own layout
    return numbers * dtype.itemsize
