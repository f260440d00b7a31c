"""`QuantisedPlan`: which weights of a decoder will stand in codes, and the memory of all."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.layers.linear import Linear, can_pack
from engine.layers.moe import MixtureOfExperts

if TYPE_CHECKING:
    from engine.layers.quantised_factory import QuantisedFactory, StoredWeight
    from engine.models.decoder import Decoder
    from engine.models.weight_loading import FamilyCheckpoint


@dataclass(frozen=True, slots=True)
class LinearPlace:
    """A layer of the decoder that will stand in codes.

    Attributes:
        owner: Has the layer in
        attribute: this attribute.
        names: Full names of its weights, top to bottom, without the ending.
        stored: These weights.
    """

    owner: object
    attribute: str
    names: list[str]
    stored: list[StoredWeight]


@dataclass(frozen=True, slots=True)
class ExpertsPlace:
    """The experts of a layer.

    Attributes:
        layer: Has them.
        names: Full names of all their weights, without the ending.
        gate_up: Of each expert, what stands below each other.
        down: Of each expert.
    """

    layer: MixtureOfExperts
    names: list[str]
    gate_up: list[list[StoredWeight]]
    down: list[StoredWeight]


class QuantisedPlan:
    """What of a checkpoint's codes becomes which layer of a decoder; nothing is read or changed.

    Several merged weights must all be in codes, and the factory must take them; what is not so
    will be expanded.

    Args:
        decoder: Nothing loaded yet; may be on the "meta" device.
        family: Its checkpoint, checked.
        factory: Of the device that will have the weights.

    Attributes:
        linears: Layers of products, but for the output projection.
        experts: Mixtures of experts.
        output: The output projection; None where it will not be quantised.
        embedding: The embedding, likewise. With tied embeddings only together with `output`.
        expanded: Name of each weight in codes that will be expanded -> its numbers.
    """

    def __init__(
        self, decoder: Decoder, family: FamilyCheckpoint, factory: QuantisedFactory
    ) -> None:
        self._decoder, self._family, self._factory = decoder, family, factory
        self._num_bytes = 0
        self._taken: set[str] = set()
        self.expanded: dict[str, int] = {}
        self.linears: list[LinearPlace] = []
        self.experts: list[ExpertsPlace] = []
        for index, layer in enumerate(decoder.layers):
            stem = f"model.layers.{index}."
            self._add_linears(layer.attention, f"{stem}self_attn.")
            if isinstance(layer.mlp, MixtureOfExperts):
                self._add_linears(layer.mlp.shared, f"{stem}mlp.shared_expert.")
                self._add_experts(layer.mlp, f"{stem}mlp.experts.")
            else:
                self._add_linears(layer.mlp, f"{stem}mlp.")
        self._plan_ends()

    @property
    def names(self) -> set[str]:
        """Full names of the weights that will be in codes."""
        return {f"{name}.weight" for name in self._taken}

    def num_bytes(self, dtype: torch.dtype, device: torch.device) -> int:
        """Memory of all weights once they are loaded, those in plain numbers in `dtype`."""
        taken = self.names
        plain = sum(
            weight.numel() for name, weight in self._decoder.named_weights() if name not in taken
        )
        config = self._decoder.config
        if config.tie_word_embeddings and self.output is None:
            # The output projection has a copy of the embedding in its own layout.
            probe = torch.empty(0, device=device, dtype=dtype)
            plain += config.vocab_size * config.hidden_size if can_pack(probe) else 0
        return self._num_bytes + plain * dtype.itemsize

    def _add_linears(self, owner: object, stem: str) -> None:
        for attribute, linear in vars(owner).items() if owner is not None else ():
            if type(linear) is not Linear:
                continue
            names = [stem + name for name in linear.parts]
            found = [self._family.quantised(f"{name}.weight") for name in names]
            stored: list[StoredWeight] = [weight for weight in found if weight is not None]
            num_bytes = None
            if len(stored) == len(names):
                num_bytes = self._factory.num_bytes(stored, is_output=False)
            if num_bytes is None:
                self._expand(zip(names, found, strict=True))
                continue
            self._take(names, num_bytes)
            self.linears.append(LinearPlace(owner, attribute, names, stored))

    def _add_experts(self, layer: MixtureOfExperts, stem: str) -> None:
        place = ExpertsPlace(layer, [], [], [])
        num_bytes = 0
        is_taken = True
        found: list[tuple[str, StoredWeight | None]] = []
        for expert in range(layer.config.num_experts):
            parts: list[tuple[str, StoredWeight | None]] = [
                (name, self._family.quantised(f"{name}.weight"))
                for name in (f"{stem}{expert}.{part}_proj" for part in ("gate", "up", "down"))
            ]
            found += parts
            stored: list[StoredWeight] = [weight for _, weight in parts if weight is not None]
            sizes: list[int | None] = [None]
            if len(stored) == len(parts):
                sizes = [self._factory.expert_bytes(part) for part in (stored[:2], stored[2:])]
                place.gate_up.append(stored[:2])
                place.down.append(stored[2])
            if None in sizes:
                is_taken = False
            num_bytes += sum(size for size in sizes if size is not None)
        names = [name for name, _ in found]
        if not is_taken:
            self._expand(found)
            return
        self._take(names, num_bytes)
        place.names.extend(names)
        self.experts.append(place)

    def _plan_ends(self) -> None:
        """Embedding and output projection."""
        is_tied = self._decoder.config.tie_word_embeddings
        names = "model.embed_tokens", "lm_head"
        embedding = self._family.quantised(f"{names[0]}.weight")
        output = embedding if is_tied else self._family.quantised(f"{names[1]}.weight")
        self.output: StoredWeight | None = None
        self.embedding: StoredWeight | None = None
        if output is not None:
            num_bytes = self._factory.num_bytes([output], is_output=True)
            if num_bytes is None:
                self._expand([(names[1], output)])
            else:
                self._take([names[1]], num_bytes)
                self.output = output
        if embedding is not None and not (is_tied and self.output is None):
            num_bytes = self._factory.embedding_bytes(embedding)
            if num_bytes is not None:
                self._take([names[0]], num_bytes)
                self.embedding = embedding
                return
        self._expand([(names[0], embedding)])

    def _take(self, names: list[str], num_bytes: int) -> None:
        self._num_bytes += num_bytes
        self._taken.update(names)

    def _expand(self, found: Iterable[tuple[str, StoredWeight | None]]) -> None:
        for name, stored in found:
            if stored is not None:
                self.expanded[name] = math.prod(stored.shape)
