"""Put the weights that a checkpoint has in blocks into a `Decoder` without expanding them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch

from engine.layers.mlp import GatedMLP
from engine.layers.quantised_linear import QuantisedEmbedding, QuantisedLinear, StepRows
from engine.layers.quantised_weights import (
    EightBitWeight,
    ExpansionRoom,
    FourBitWeight,
    has_eight_bit_product,
    has_four_bit_product,
)
from engine.models.description import DecoderConfig

if TYPE_CHECKING:
    from engine.layers.linear import Linear
    from engine.models.decoder import Decoder


class QuantisedRows(Protocol):
    """Rows of a quantised matrix: `codes * scales + minima`, one scale for 32 columns."""

    @property
    def codes(self) -> torch.Tensor:
        """[N, K] uint8 in 0…15, or int8."""

    @property
    def scales(self) -> torch.Tensor:
        """[N, K / 32] float32."""

    @property
    def minima(self) -> torch.Tensor:
        """[N, K / 32] float32; zeros for 8 bits."""

    def expand(self) -> torch.Tensor:
        """The numbers, new [N, K] float32."""


class QuantisedMatrix(Protocol):
    """A quantised matrix in its file."""

    @property
    def bits(self) -> int:
        """Of a code: 4 or 8."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""

    def read(self) -> QuantisedRows:
        """All rows."""

    def chunks(self) -> Iterator[QuantisedRows]:
        """All rows, a part at a time."""

    def take(self, rows: torch.Tensor) -> QuantisedRows:
        """Some rows, by number [R] int64."""


class QuantisedSource(Protocol):
    """A checkpoint with quantised matrices."""

    def quantised(self, name: str) -> QuantisedMatrix | None:
        """The matrix of that name if it is quantised in blocks of 32, else None."""

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """As in `WeightSource`."""


def takes_quantised(config: object) -> bool:
    """Whether a model has a place for quantised weights, given its config.

    Not yet for experts, nor for weights that a family merges in its own way: they are expanded.
    """
    if not isinstance(config, DecoderConfig):
        return False
    return config.weight_names == "llama" and not any(config.experts)


def can_run_quantised() -> bool:
    """Whether this machine has the products for quantised weights."""
    return has_four_bit_product() and has_eight_bit_product()


def load_quantised(
    decoder: Decoder, source: QuantisedSource, prefix: str, rows: StepRows
) -> set[str]:
    """Replace every layer of `decoder` whose weights `source` has in blocks; call before loading.

    Several merged weights must all have codes of one size, and the shape must suit the product;
    what does not stays for `Decoder.load` to expand.

    Args:
        decoder: Nothing loaded yet.
        source: The checkpoint.
        prefix: Of its names: "model." or "".
        rows: Where the decoder's forward says which rows decode.

    Returns:
        Names of the weights that need no loading any more, without the checkpoint's prefix.
    """
    loaded: set[str] = set()
    room = ExpansionRoom()
    for owner, attribute, stem in _linears(decoder):
        linear: Linear = getattr(owner, attribute)
        names = [stem + name for name in linear.parts]
        stored = [source.quantised(f"{prefix}{name}.weight") for name in names]
        weight = _merged_weight(stored, decoder.dtype, room)
        if weight is None:
            continue
        if linear.bias is not None:
            for name, view in linear.named_weights():
                if name.endswith(".bias"):
                    source.read_into(f"{prefix}{stem}{name}", view)
        setattr(owner, attribute, QuantisedLinear(weight, linear.bias, rows))
        kinds = ("weight",) if linear.bias is None else ("weight", "bias")
        loaded.update(f"{name}.{kind}" for name in names for kind in kinds)
    loaded |= _load_ends(decoder, source, prefix, room)
    return loaded


def _linears(decoder: Decoder) -> Iterator[tuple[object, str, str]]:
    """(owner, attribute, names' stem) of each layer's products."""
    for index, layer in enumerate(decoder.layers):
        stem = f"layers.{index}."
        yield layer.attention, "qkv_proj", f"{stem}self_attn."
        yield layer.attention, "o_proj", f"{stem}self_attn."
        if isinstance(layer.mlp, GatedMLP):
            yield layer.mlp, "gate_up_proj", f"{stem}mlp."
            yield layer.mlp, "down_proj", f"{stem}mlp."


def _load_ends(
    decoder: Decoder, source: QuantisedSource, prefix: str, room: ExpansionRoom
) -> set[str]:
    """Embedding and output projection. A tied pair is replaced together or not at all."""
    is_tied = decoder.config.tie_word_embeddings
    embedding = source.quantised(f"{prefix}embed_tokens.weight")
    output = embedding if is_tied else source.quantised("lm_head.weight")
    loaded = set()
    # The logits stay in float32, whatever the model's dtype: rounded they would tie.
    weight = _merged_weight([output], torch.float32, room)
    if weight is not None:
        decoder.lm_head = QuantisedLinear(weight, None, None)
        loaded.add("lm_head.weight")
    if embedding is not None and (weight is not None or not is_tied):
        stored = embedding
        decoder.embedding = QuantisedEmbedding(
            lambda ids: stored.take(ids).expand(), decoder.embedding.scale, decoder.dtype
        )
        loaded.add("embed_tokens.weight")
    return loaded


def _merged_weight(
    parts: list[QuantisedMatrix | None], out_dtype: torch.dtype, room: ExpansionRoom
) -> FourBitWeight | EightBitWeight | None:
    """One weight of the parts below each other, None where the products do not take them."""
    found = [part for part in parts if part is not None]
    if len(found) < len(parts) or len({part.bits for part in found}) != 1:
        return None
    bits = found[0].bits
    num_rows = sum(part.shape[0] for part in found)
    if bits == 4 and not FourBitWeight.accepts(num_rows, found[0].shape[1]):
        return None
    if bits == 8:
        chunks = ((rows.codes, rows.scales) for part in found for rows in part.chunks())
        return EightBitWeight(num_rows, found[0].shape[1], chunks, out_dtype)
    blocks = [part.read() for part in found]
    codes = torch.cat([block.codes for block in blocks])
    scales = torch.cat([block.scales for block in blocks])
    return FourBitWeight(codes, scales, torch.cat([block.minima for block in blocks]), room)
