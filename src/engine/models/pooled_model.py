"""`PooledModel`: from tokens to one vector a text, by an encoder or a decoder and what follows it.

    backbone(ids)  [T, H] ─► pooling [B, H · modes] ─► dense products ─► vectors [B, width] float32
                          └► head (a model that scores)               ─► logits  [B, 1] float32

Sums over tokens are float32. A mean is a sum over one text's rows in their order, so it does not
depend on the batch. Normalising and cutting vectors is the caller's, who may ask for either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from engine.errors import CheckpointError
from engine.kernels.packed_texts import PackedTexts
from engine.layers.layer_norm import LayerNorm
from engine.layers.linear import Linear
from engine.models.encoder import activate
from engine.models.encoder_config import HeadConfig
from engine.models.weight_loading import WeightSource

POOLING_MODES = ("cls", "last", "mean", "max", "mean_sqrt_len", "weighted_mean")


class Backbone(Protocol):
    """An `Encoder`, or a decoder behind `DecoderBackbone`."""

    def forward(
        self, input_ids: torch.Tensor, token_types: torch.Tensor, texts: PackedTexts
    ) -> torch.Tensor:
        """Hidden states, new [T, H]."""


class ScoreHead:
    """The head of a model that scores; see `HeadConfig`.

    Args:
        config: The head.
        hidden_size: H.
        device: Where the weights live.
        dtype: Of weights and x.
    """

    def __init__(
        self, config: HeadConfig, hidden_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config = config

        def linear(name: str, rows: int, bias: bool) -> Linear:
            return Linear(hidden_size, {name: rows}, bias=bias, device=device, dtype=dtype)

        self._dense = linear(config.dense, hidden_size, config.dense_bias) if config.dense else None
        self._norm = None
        if config.norm:
            self._norm = LayerNorm(
                hidden_size, eps=config.norm_eps, bias=config.norm_bias, device=device, dtype=dtype
            )
        self._out = linear(config.out, 1, config.out_bias)

    @torch.inference_mode()
    def load(self, checkpoint: WeightSource) -> None:
        """Fill every weight.

        Raises:
            CheckpointError: One is missing or has another shape.
        """
        products = [one for one in (self._dense, self._out) if one is not None]
        weights = {name: view for one in products for name, view in one.named_weights()}
        if self._norm is not None:
            weights |= {
                f"{self.config.norm}.{name}": view for name, view in self._norm.named_weights()
            }
        names = checkpoint.names()
        for name, view in weights.items():
            if names is not None and name not in names:
                msg = f"The checkpoint lacks {name!r} of the head that scores."
                raise CheckpointError(msg)
            checkpoint.read_into(name, view)
        for one in products:
            one.finish_loading()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 1] from pooled states x [B, H]."""
        if self._dense is not None:
            x = activate(self._dense(x), self.config.activation)
        if self._norm is not None:
            x = self._norm(x)
        return self._out(x)


class DenseStep:
    """`activation(x @ weight.T + bias)` after pooling; float32, as the vectors are.

    Args:
        weight: [out, in] float32.
        bias: [out] float32, or None.
        activation: A name that `activate` knows, or "" for none.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> None:
        self._weight = weight
        self._bias = bias
        self._activation = activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[B, out] from x [B, in]."""
        y = F.linear(x, self._weight, self._bias)
        return activate(y, self._activation) if self._activation else y


class PooledModel:
    """A loaded model that gives one vector a text.

    Args:
        backbone: Gives the hidden states.
        pooling: Of `POOLING_MODES`, put side by side.
        dense: Applied to the pooled vectors one after the other.
        head: Scores the pooled state instead.
    """

    def __init__(
        self,
        backbone: Backbone,
        pooling: Sequence[str],
        dense: Sequence[DenseStep] = (),
        head: ScoreHead | None = None,
    ) -> None:
        self.backbone = backbone
        self._pooling = tuple(pooling)
        self._dense = tuple(dense)
        self._head = head

    @torch.inference_mode()
    def forward(
        self, input_ids: torch.Tensor, token_types: torch.Tensor, texts: PackedTexts
    ) -> torch.Tensor:
        """Vectors, new [B, width] float32; arguments as in `Encoder.forward`."""
        hidden = self.backbone.forward(input_ids, token_types, texts)
        pooled = [pool(hidden, texts, mode) for mode in self._pooling]
        if self._head is not None:
            return self._head(pooled[0].to(hidden.dtype)).float()
        vectors = pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=-1)
        for step in self._dense:
            vectors = step(vectors)
        return vectors


def pool(hidden: torch.Tensor, texts: PackedTexts, mode: str) -> torch.Tensor:
    """One row a text, new [B, H] float32, of hidden [T, H]."""
    starts = texts.starts.long()
    if mode == "cls":
        return hidden[starts[:-1]].float()
    if mode == "last":
        return hidden[starts[1:] - 1].float()
    lens = starts.diff()
    rows = hidden.float()
    if mode == "max":
        return torch.segment_reduce(rows, "max", lengths=lens, unsafe=True)
    if mode == "weighted_mean":
        weights = (texts.positions + 1).float()[:, None]
        total = torch.segment_reduce(rows * weights, "sum", lengths=lens, unsafe=True)
        return total / (lens * (lens + 1) / 2)[:, None]
    total = torch.segment_reduce(rows, "sum", lengths=lens, unsafe=True)
    if mode == "mean_sqrt_len":
        return total / lens.float().sqrt()[:, None]
    assert mode == "mean", f"{mode!r} passed the config's check"
    return total / lens[:, None]


class HeadlessWeights:
    """A checkpoint without some of its names, for a model that would refuse them.

    Args:
        checkpoint: The whole.
        hidden: Names to leave out.
    """

    def __init__(self, checkpoint: WeightSource, hidden: Sequence[str]) -> None:
        self._checkpoint = checkpoint
        self._hidden = frozenset(hidden)

    def names(self) -> Mapping[str, Sequence[int]] | None:
        """See `WeightSource`."""
        names = self._checkpoint.names()
        if names is None:
            return None
        return {name: shape for name, shape in names.items() if name not in self._hidden}

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """See `WeightSource`."""
        self._checkpoint.read_into(name, out)
