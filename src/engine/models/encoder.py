"""`Encoder`: the one encoder whose attention looks both ways, driven by an `EncoderConfig`.

One step, for T tokens of B texts packed one after the other::

    hidden = norm(words[ids] + positions + token types)           [T, H]
    per layer, norms after (BERT):         hidden = norm(hidden + attention(hidden))
                                           hidden = norm(hidden + mlp(hidden))
               norms before (ModernBERT):  hidden += attention(norm(hidden))
                                           hidden += mlp(norm(hidden))

Products see no padding, whatever the lengths; attention is in `layers.packed_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F

from engine.errors import CheckpointError
from engine.kernels.packed_texts import PackedTexts
from engine.layers.layer_norm import LayerNorm
from engine.layers.linear import Linear
from engine.layers.packed_attention import PositionBias, packed_attention
from engine.layers.rope import build_cos_sin
from engine.models.encoder_config import EncoderConfig
from engine.models.weight_loading import WeightSource

_MAX_BUCKET_DISTANCE = 128


class EncoderLayer:
    """Attention and feed-forward half of one layer.

    Args:
        config: The model.
        index: Of this layer, from 0.
        device: Where the weights live.
        dtype: Of weights and activations.
        batch_invariant: As in `Linear`.
    """

    def __init__(
        self,
        config: EncoderConfig,
        index: int,
        device: torch.device,
        dtype: torch.dtype,
        batch_invariant: bool,
    ) -> None:
        self._config = config
        self._index = index
        hidden, width = config.hidden_size, config.intermediate_size

        def linear(names: Sequence[str], in_size: int, out_size: int, bias: bool) -> Linear:
            rows = out_size // len(names)
            parts = {name.format(index): rows for name in names}
            return Linear(
                in_size,
                parts,
                bias=bias,
                device=device,
                dtype=dtype,
                batch_invariant=batch_invariant,
            )

        names = config.names
        self.qkv = linear(names.qkv, hidden, 3 * hidden, config.attention_bias)
        self.output = linear((names.output,), hidden, hidden, config.attention_bias)
        up_size = 2 * width if config.is_gated else width
        self.up = linear((names.up,), hidden, up_size, config.mlp_bias)
        self.down = linear((names.down,), width, hidden, config.mlp_bias)
        has_attention_norm = not (config.is_pre_norm and index == 0)
        self.attention_norm = _norm(config, device, dtype) if has_attention_norm else None
        self.mlp_norm = _norm(config, device, dtype)
        self._window = config.windows[index] if config.windows else None

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight under the family's name."""
        for product in (self.qkv, self.output, self.up, self.down):
            yield from product.named_weights()
        norms = ((self._config.names.attention_norm, self.attention_norm),)
        for name, norm in (*norms, (self._config.names.mlp_norm, self.mlp_norm)):
            if norm is not None:
                yield from _prefixed(name.format(self._index), norm.named_weights())

    def finish_loading(self) -> None:
        """See `Linear.finish_loading`."""
        for product in (self.qkv, self.output, self.up, self.down):
            product.finish_loading()

    def __call__(
        self,
        hidden: torch.Tensor,
        texts: PackedTexts,
        cos_sin: tuple[torch.Tensor, torch.Tensor] | None,
        bias: PositionBias | None,
    ) -> torch.Tensor:
        """Hidden states after the layer, new [T, H].

        Args:
            hidden: [T, H]; may be overwritten.
            texts: Layout of the batch.
            cos_sin: Each [T, 1, D/2] float32, of the tokens' positions; None without rotation.
            bias: On the scores.
        """
        if self._config.is_pre_norm:
            x = hidden if self.attention_norm is None else self.attention_norm(hidden)
            hidden = hidden + self._attend(x, texts, cos_sin, bias)
            return hidden + self._feed_forward(self.mlp_norm(hidden))
        assert self.attention_norm is not None, "only norms before a half may be missing"
        hidden = self.attention_norm(hidden.add_(self._attend(hidden, texts, cos_sin, bias)))
        return self.mlp_norm(hidden.add_(self._feed_forward(hidden)))

    def _attend(
        self,
        x: torch.Tensor,
        texts: PackedTexts,
        cos_sin: tuple[torch.Tensor, torch.Tensor] | None,
        bias: PositionBias | None,
    ) -> torch.Tensor:
        heads = (x.shape[0], 3, self._config.num_heads, self._config.head_dim)
        q, k, v = self.qkv(x).view(heads).unbind(1)
        if cos_sin is not None:
            q, k = _rotate(q, *cos_sin), _rotate(k, *cos_sin)
        mixed = packed_attention(q, k, v, texts, window=self._window, bias=bias)
        return self.output(mixed)

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        if self._config.is_gated:
            gate, value = y.chunk(2, dim=-1)
            # Contiguous: torch's activations round a lone row otherwise than one of many columns.
            return self.down(activate(gate.contiguous(), self._config.activation) * value)
        return self.down(activate(y, self._config.activation))


class Encoder:
    """An encoder on one device; build, `load`, then `forward`.

    Args:
        config: The model.
        device: Where weights and inputs live.
        dtype: Of weights and hidden states.
        batch_invariant: On a GPU use products whose rows do not depend on their neighbours.
    """

    def __init__(
        self,
        config: EncoderConfig,
        device: torch.device,
        dtype: torch.dtype,
        *,
        batch_invariant: bool = False,
    ) -> None:
        self.config = config
        self.device = device
        self.dtype = dtype

        def table(rows: int, width: int = config.hidden_size) -> torch.Tensor | None:
            return torch.empty(rows, width, device=device, dtype=dtype) if rows else None

        self._words = torch.empty(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self._positions = table(config.num_position_rows)
        self._token_types = table(config.num_token_types)
        self._bias_table = table(config.num_position_buckets, config.num_heads)
        self._embedding_norm = _norm(config, device, dtype)
        self._layers = [
            EncoderLayer(config, index, device, dtype, batch_invariant)
            for index in range(config.num_layers)
        ]
        self._final_norm = _norm(config, device, dtype) if config.has_final_norm else None
        self._cos_sin = {
            rope: build_cos_sin(rope, config.head_dim, config.max_positions, device)
            for rope in set(config.ropes)
        }

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor a checkpoint must have, under the family's name, as a view to fill."""
        names = self.config.names
        for name, table in (
            (names.words, self._words),
            (names.positions, self._positions),
            (names.token_types, self._token_types),
            (names.position_bias, self._bias_table),
        ):
            if table is not None:
                yield f"{name}.weight", table
        yield from _prefixed(names.embedding_norm, self._embedding_norm.named_weights())
        for layer in self._layers:
            yield from layer.named_weights()
        if self._final_norm is not None:
            yield from _prefixed(names.final_norm, self._final_norm.named_weights())

    @torch.inference_mode()
    def load(self, checkpoint: WeightSource) -> None:
        """Fill every weight; call once. What a checkpoint has beside the encoder is left unread.

        Raises:
            CheckpointError: Tensors are missing or of the wrong shape, or there are more layers
                than the config says.
        """
        weights = dict(self.named_weights())
        prefix = self._check_names(checkpoint.names(), weights)
        for name, view in weights.items():
            checkpoint.read_into(prefix + name, view)
        for layer in self._layers:
            layer.finish_loading()

    def _check_names(
        self, names: Mapping[str, Sequence[int]] | None, weights: Mapping[str, torch.Tensor]
    ) -> str:
        """The prefix of the checkpoint's names, once all of them are there."""
        if names is None:
            return self.config.prefixes[0]
        words = f"{self.config.names.words}.weight"
        prefix = next((p for p in self.config.prefixes if p + words in names), None)
        if prefix is None:
            msg = f"The checkpoint lacks {words!r}, which {self.config.architecture} has."
            raise CheckpointError(msg)
        for name, view in weights.items():
            found = names.get(prefix + name)
            if found is None:
                msg = (
                    f"The checkpoint lacks {prefix + name!r}, which {self.config.architecture} has."
                )
                raise CheckpointError(msg)
            if tuple(found) != tuple(view.shape):
                msg = (
                    f"Tensor {prefix + name!r} has shape {tuple(found)} in the checkpoint; the "
                    f"config asks for {tuple(view.shape)}."
                )
                raise CheckpointError(msg)
        surplus = prefix + self.config.names.down.format(self.config.num_layers) + ".weight"
        if surplus in names:
            msg = (
                f"The checkpoint has {surplus!r}, but the config says {self.config.num_layers} "
                "layers: config.json and weights do not belong together."
            )
            raise CheckpointError(msg)
        return prefix

    @torch.inference_mode()
    def forward(
        self, input_ids: torch.Tensor, token_types: torch.Tensor, texts: PackedTexts
    ) -> torch.Tensor:
        """Hidden states of the last layer, new [T, H].

        Args:
            input_ids: [T] int64 in [0, V).
            token_types: [T] int64, 0 in the first text of a pair and 1 in the second.
            texts: Layout of the batch; lengths up to `max_positions`.
        """
        hidden = F.embedding(input_ids, self._words)
        if self._positions is not None:
            hidden += F.embedding(texts.positions + self.config.position_offset, self._positions)
        if self._token_types is not None:
            hidden += F.embedding(
                token_types.clamp(max=self.config.num_token_types - 1), self._token_types
            )
        hidden = self._embedding_norm(hidden)
        rotations = {
            rope: table[texts.positions].unsqueeze(2).unbind(1)
            for rope, table in self._cos_sin.items()
        }
        bias = None if self._bias_table is None else self._position_bias
        for index, layer in enumerate(self._layers):
            rope = self.config.ropes[index] if self.config.ropes else None
            cos_sin = None if rope is None else (rotations[rope][0], rotations[rope][1])
            hidden = layer(hidden, texts, cos_sin, bias)
        return hidden if self._final_norm is None else self._final_norm(hidden)

    def _position_bias(self, length: int) -> torch.Tensor:
        """[heads, length, length], by the distance from query to key (arXiv 1910.10683)."""
        assert self._bias_table is not None, "only asked for where the model has one"
        places = torch.arange(length, device=self.device)
        buckets = _distance_buckets(places - places[:, None], self.config.num_position_buckets)
        return F.embedding(buckets, self._bias_table).permute(2, 0, 1)


def _distance_buckets(distance: torch.Tensor, num_buckets: int) -> torch.Tensor:
    """T5's buckets, half of them for keys ahead: exact up to a quarter, then by logarithm.

    Args:
        distance: [L, L] int64, key position minus query position.
        num_buckets: Even.
    """
    half = num_buckets // 2
    exact = half // 2
    away = distance.abs()
    scale = (half - exact) / math.log(_MAX_BUCKET_DISTANCE / exact)
    far = exact + (torch.log(away.clamp(min=1).float() / exact) * scale).long()
    bucket = torch.where(away < exact, away, far.clamp(max=half - 1))
    return bucket + half * (distance > 0)


def activate(x: torch.Tensor, name: str) -> torch.Tensor:
    """An activation by the name that configs here use; "tanh" as well."""
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "relu":
        return F.relu(x)
    if name == "tanh":
        return torch.tanh(x)
    assert name == "silu", f"{name!r} passed the config's check"
    return F.silu(x)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + D/2) of x [T, heads, D]; computed in float32."""
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


def _norm(config: EncoderConfig, device: torch.device, dtype: torch.dtype) -> LayerNorm:
    return LayerNorm(
        config.hidden_size, eps=config.norm_eps, bias=config.norm_bias, device=device, dtype=dtype
    )


def _prefixed(
    prefix: str, weights: Iterator[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    return ((f"{prefix}.{name}", weight) for name, weight in weights)
