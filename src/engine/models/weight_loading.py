"""Fill a decoder's weights from a checkpoint: check all names and shapes, then read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, cast

import torch

from engine.errors import CheckpointError, ConfigError, UnsupportedModelError
from engine.layers.quantised_factory import StoredWeight
from engine.models.description import DecoderConfig
from engine.models.text_part import TextPart
from engine.models.weight_names import TAKES, WEIGHT_NAMES, Stored, Take, take_of_rows

if TYPE_CHECKING:
    from engine.models.decoder import Decoder
    from engine.models.quantiser import Quantiser


class WeightSource(Protocol):
    """What `Decoder.load` needs of a checkpoint."""

    def names(self) -> Mapping[str, Sequence[int]] | None:
        """Tensor name -> shape; None where every name exists in every shape (random weights)."""

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Fill `out`, a contiguous view in its final place, converting to its dtype and device."""


class StoredRows(StoredWeight, Protocol):
    """A quantised weight of a checkpoint, whose rows can be given another order."""

    def in_order(self, order: torch.Tensor) -> StoredRows:
        """The same weight with other rows: row i is this one's row `order[i]`, [N'] int64."""


class QuantisedSource(WeightSource, Protocol):
    """A checkpoint some of whose matrices are stored in codes."""

    def quantised(self, name: str) -> StoredRows | None:
        """The matrix of that name in its codes; None if it is stored otherwise."""

    def quantised_stack(self, name: str) -> Sequence[StoredRows] | None:
        """Each expert's matrix of a tensor that holds all of them in codes; None for others."""


class FamilyCheckpoint:
    """A checkpoint under the decoder's own names, whatever its family calls and merges them.

    Args:
        source: The checkpoint.
        config: The model.
        quantiser: Makes codes of its plain weights; None leaves them as they are.
    """

    def __init__(
        self, source: WeightSource, config: DecoderConfig, quantiser: Quantiser | None = None
    ) -> None:
        if config.is_text_part:
            source = TextPart(source)
        self._source = source
        self._config = config
        self._quantiser = quantiser
        self._names = WEIGHT_NAMES[config.weight_names]
        self._shapes = source.names()
        self.prefix = self._names.prefix
        if self._shapes is not None:
            embedding = self._names.stored("model.embed_tokens.weight")[0].name
            if embedding.removeprefix(self.prefix) in self._shapes:
                self.prefix = ""
        # Of a tensor that several weights are picked from.
        self._last: tuple[str, torch.Tensor] | None = None

    def check(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Compare all names and shapes with what the decoder has.

        Raises:
            CheckpointError: Tensors are missing, unknown or of the wrong shape.
        """
        if self._shapes is None:
            return
        places = [(name, view, *self._place(name)) for name, view in weights]
        architecture = self._config.architecture
        expected = {stored.name for _, _, stored, _ in places}
        if missing := expected - self._shapes.keys():
            msg = f"The checkpoint lacks {_listing(missing)}, which {architecture} has."
            raise CheckpointError(msg)
        spare = {"lm_head.weight", "embed_out.weight"} if self._config.tie_word_embeddings else ()
        unknown = {
            name
            for name in self._shapes.keys() - expected
            if name not in spare and not self._names.is_unread(name)
        }
        if unknown:
            msg = (
                f"The checkpoint has {_listing(unknown)}, which {architecture} with "
                "this config does not use: config.json and weights do not belong together."
            )
            raise CheckpointError(msg)
        for name, view, stored, expert in places:
            self._check_shape(name, view, stored, expert)

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Fill `out` with the decoder's weight `name`."""
        if self._shapes is None:
            self._source.read_into(name, out)
            return
        stored, expert = self._place(name)
        take = self._take(name, stored)
        if take is None:
            self._source.read_into(stored.name, out)
            return
        if self._last is None or self._last[0] != stored.name:
            self._last = None
            whole = torch.empty(tuple(self._shapes[stored.name]), dtype=out.dtype)
            self._source.read_into(stored.name, whole)
            self._last = (stored.name, whole)
        out.copy_(take(self._last[1], self._config, expert))

    def quantised(self, name: str) -> StoredWeight | None:
        """The decoder's matrix `name` as it is stored in codes; None where it is not.

        With a quantiser, as if it were stored so.

        Raises:
            UnsupportedModelError: The family stores this weight transposed, its codes do not fit.
            ConfigError: The weight has codes already, and there is a quantiser.
        """
        if self._quantiser is not None:
            return self._rounded(self._quantiser, name)
        source = cast("QuantisedSource", self._source)
        stored, expert = self._place(name)
        weight = source.quantised(stored.name)
        if weight is None:
            stack = source.quantised_stack(stored.name)
            weight = None if stack is None else stack[expert]
        if weight is None:
            return None
        take = take_of_rows(stored.take)
        if take is None:
            msg = (
                f"{self._config.architecture} stores {stored.name!r} with rows and columns "
                "exchanged, where quantised weights are not supported. Use plain weights."
            )
            raise UnsupportedModelError(msg)
        rows = torch.arange(weight.shape[0])
        rope_rows = _rope_rows(name, self._config)
        chosen = take(rows, self._config, expert)
        if rope_rows is not None:
            chosen = rope_rows(chosen)
        return weight if torch.equal(chosen, rows) else weight.in_order(chosen)

    def _rounded(self, quantiser: Quantiser, name: str) -> StoredWeight | None:
        source, (stored, _) = cast("QuantisedSource", self._source), self._place(name)
        if self._shapes is not None and (
            source.quantised(stored.name) is not None
            or source.quantised_stack(stored.name) is not None
        ):
            msg = (
                f"quantization={quantiser.name!r} rounds plain weights, and {stored.name!r} of "
                "this checkpoint is quantised already. Leave quantization out."
            )
            raise ConfigError(msg)
        return quantiser.stored(self, name)

    def _place(self, name: str) -> tuple[Stored, int]:
        stored, expert = self._names.stored(name)
        if not self.prefix and name.startswith("model."):
            stored = Stored(stored.name.removeprefix(self._names.prefix), stored.take)
        return stored, expert

    def _take(self, name: str, stored: Stored) -> Take | None:
        """How to get the decoder's tensor from the stored one; None where they are the same."""
        take = TAKES[stored.take] if stored.take else None
        rope_rows = _rope_rows(name, self._config)
        if rope_rows is None:
            return take

        def reordered(whole: torch.Tensor, config: DecoderConfig, expert: int) -> torch.Tensor:
            part = whole if take is None else take(whole, config, expert)
            return rope_rows(part)

        return reordered

    def _check_shape(self, name: str, view: torch.Tensor, stored: Stored, expert: int) -> None:
        assert self._shapes is not None
        shape, wanted = tuple(self._shapes[stored.name]), tuple(view.shape)
        take = self._take(name, stored)
        if take is None:
            if shape != wanted:
                msg = (
                    f"Tensor {stored.name!r} has shape {shape} in the checkpoint; the "
                    f"config asks for {wanted}."
                )
                raise CheckpointError(msg)
            return
        try:
            found = tuple(take(torch.empty(shape, device="meta"), self._config, expert).shape)
        except (RuntimeError, IndexError):
            found = None
        if found != wanted:
            msg = (
                f"Tensor {stored.name!r} has shape {shape} in the checkpoint, from which the "
                f"config's {name} of shape {wanted} cannot be taken."
            )
            raise CheckpointError(msg)


class _RopeRows:
    """Reorders rows so that what turns comes first in a head, as halves instead of neighbours."""

    def __init__(self, before: int, rope_dim: int, after: int, *, has_neighbours: bool) -> None:
        self._sizes = [before, rope_dim, after]
        self._has_neighbours = has_neighbours

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        heads = rows.reshape(-1, sum(self._sizes), *rows.shape[1:])
        before, turning, after = heads.split(self._sizes, dim=1)
        if self._has_neighbours:
            turning = turning.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        return torch.cat((turning, before, after), dim=1).flatten(0, 1)


def _rope_rows(name: str, config: DecoderConfig) -> _RopeRows | None:
    """What loading does to the rows of a projection of queries or keys; None for nothing."""
    stem, _, _ = name.rpartition(".")
    latent, has_neighbours = config.latent, config.rotates_neighbours
    if latent is not None:
        if stem.endswith(("self_attn.q_proj", "self_attn.q_b_proj")):
            return _RopeRows(latent.nope_dim, latent.rope_dim, 0, has_neighbours=has_neighbours)
        if stem.endswith("self_attn.kv_a_proj_with_mqa"):
            return _RopeRows(latent.kv_rank, latent.rope_dim, 0, has_neighbours=has_neighbours)
        return None
    parts = ("q_proj", "k_proj", "q_norm", "k_norm")
    if not has_neighbours or not stem.endswith(tuple(f"self_attn.{part}" for part in parts)):
        return None
    rope = next(rope for rope in config.ropes if rope is not None)
    rope_dim = rope.rotary_dim(config.head_dim)
    return _RopeRows(0, rope_dim, config.head_dim - rope_dim, has_neighbours=True)


def load_weights(
    decoder: Decoder, checkpoint: WeightSource, quantiser: Quantiser | None = None
) -> FamilyCheckpoint:
    """The checked checkpoint of a decoder; nothing is read yet.

    Args:
        decoder: Or one on the "meta" device like it: only shapes are looked at.
        checkpoint: The files.
        quantiser: Makes codes of plain weights.

    Raises:
        CheckpointError: Tensors are missing, unknown or of the wrong shape.
    """
    family = FamilyCheckpoint(checkpoint, decoder.config, quantiser)
    family.check(decoder.named_weights())
    return family


def _listing(names: set[str], limit: int = 4) -> str:
    shown = ", ".join(map(repr, sorted(names)[:limit]))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
