"""`QuantisedCheckpoint`: a Hugging Face checkpoint whose layers are stored in codes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import torch

from engine.errors import CheckpointError
from engine.loader.checkpoint import Checkpoint, SafetensorsCheckpoint, check_shape
from engine.loader.module_tensors import ModuleTensors
from engine.loader.stored_eights import StoredEight
from engine.loader.stored_integers import StoredAWQ, StoredGPTQ, StoredPacked
from engine.loader.stored_tables import QUANT_STATE, StoredNF4, packed_mxfp4, stacked_mxfp4

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from engine.loader.quantisation_config import QuantisationConfig
    from engine.loader.stored_rows import StoredRows
    from engine.loader.weight_scheme import WeightScheme

logger = logging.getLogger(__name__)

# Ending by which a layer in codes is recognised -> layouts that have it.
_MARKS: Final[Mapping[str, tuple[str, ...]]] = {
    ".qweight": ("gptq", "awq"),
    ".weight_packed": ("packed", "mxfp4-packed"),
    ".weight_scale": ("eight", "packed", "mxfp4-packed"),
    ".weight_scale_inv": ("eight",),
    ".SCB": ("bnb8",),
    ".weight.absmax": ("bnb4",),
    "_blocks": ("mxfp4",),
}
_OTHERS: Final = (
    ".qzeros", ".scales", ".g_idx", ".weight", ".weight_shape", ".weight_zero_point",
    ".weight_g_idx", ".input_scale", ".input_zero_point", ".activation_scale", ".weight_format",
    ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map",
    f"{QUANT_STATE}nf4", f"{QUANT_STATE}fp4", "_scales",
)  # fmt: skip
_KV_SCALES: Final = (".k_scale", ".v_scale", ".output_scale", ".kv_scale")
_PLAIN_TYPES: Final = ("F64", "F32", "F16", "BF16")


class QuantisedCheckpoint(Checkpoint):
    """The weights of a quantised checkpoint, under the names that they have without quantisation.

    All layers are checked when it is opened: that every tensor is there, and that shapes and dtypes
    are what the scheme asks for. Codes are read when a layer is.

    Args:
        source: The files; closed by `close`.
        config: What `quantization_config` says.

    Raises:
        CheckpointError: Tensors are missing, misshapen, or contradict the config.
    """

    def __init__(self, source: SafetensorsCheckpoint, config: QuantisationConfig) -> None:
        self._source = source
        self._config = config
        shapes = dict(source.names())
        self._stored: dict[str, StoredRows] = {}
        self._stacks: dict[str, Sequence[StoredRows]] = {}
        for module, mark in _marked(shapes).items():
            tensors = ModuleTensors(module, shapes, source.tensor, str(source.folder))
            scheme = self._scheme(module, mark)
            if scheme.layout == "mxfp4":
                self._stacks[module] = stacked_mxfp4(tensors)
            else:
                self._stored[f"{module}.weight"] = _stored_weight(tensors, scheme)
        if not self._stored and not self._stacks:
            msg = (
                f"{source.folder}: config.json says that the weights are quantised with "
                f"{config.method}, but no tensor holds codes. Remove quantization_config if they "
                "are plain numbers, or download the checkpoint again."
            )
            raise CheckpointError(msg)
        self._shapes = self._logical_shapes(shapes)
        self._check_plain()

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self._source.folder

    def names(self) -> Mapping[str, tuple[int, ...]]:
        """Name without quantisation -> shape of every weight."""
        return self._shapes

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Expand a weight into `out`, a megabyte at a time; see `Checkpoint.read_into`."""
        stored, stack = self._stored.get(name), self._stacks.get(name)
        if stored is None and stack is None:
            self._source.read_into(name, out)
            return
        check_shape(name, self._shapes[name], out, self._source.folder)
        with torch.no_grad():
            if stored is not None:
                stored.expand_into(out)
            for expert, one in enumerate(stack or ()):
                one.expand_into(out[expert].T)

    def quantised(self, name: str) -> StoredRows | None:
        """See `Checkpoint.quantised`."""
        return self._stored.get(name)

    def quantised_stack(self, name: str) -> Sequence[StoredRows] | None:
        """See `Checkpoint.quantised_stack`."""
        return self._stacks.get(name)

    def close(self) -> None:
        """Unmap the files, but for weights that are still held."""
        self._stored.clear()
        self._stacks.clear()
        self._source.close()

    def _scheme(self, module: str, mark: str) -> WeightScheme:
        scheme = self._config.scheme_of(module)
        if scheme is None:
            msg = (
                f"{self._source.folder}: {module} is stored in codes ({module + mark!r}), but "
                f"quantization_config ({self._config.method}) leaves this layer out. Take it off "
                "the list of ignored modules, or download the checkpoint again."
            )
            raise CheckpointError(msg)
        if scheme.layout not in _MARKS[mark]:
            msg = (
                f"{self._source.folder}: tensor {module + mark!r} belongs to the layouts "
                f"{' and '.join(_MARKS[mark])}, but quantization_config ({self._config.method}) "
                f"says {scheme.layout!r}. Config and weights do not belong together."
            )
            raise CheckpointError(msg)
        return scheme

    def _logical_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        modules = [name.removesuffix(".weight") for name in self._stored] + list(self._stacks)
        parts = {module + ending for module in modules for ending in (*_MARKS, *_OTHERS)}
        kv_scales = [name for name in shapes if name.endswith(_KV_SCALES)]
        if kv_scales:
            logger.warning(
                "%d scales for a KV cache in 8 bits (%s, …) are left unread: the engine finds its "
                "own",
                len(kv_scales),
                kv_scales[0],
            )
        unread = {*parts, *kv_scales, *self._empty_biases(modules, shapes)}
        plain = {name: shape for name, shape in shapes.items() if name not in unread}
        stored = {name: tuple(weight.shape) for name, weight in self._stored.items()}
        # As the model has them: the experts' matrices stand the other way round.
        stacks = {
            name: (len(stack), stack[0].shape[1], stack[0].shape[0])
            for name, stack in self._stacks.items()
        }
        return {**plain, **stored, **stacks}

    def _empty_biases(
        self, modules: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
    ) -> list[str]:
        """Biases of layers in codes, if there is none but of zeros.

        AutoGPTQ gave them to layers that have none.
        """
        biases = [f"{module}.bias" for module in modules if f"{module}.bias" in shapes]
        is_empty = not any(bool(self._source.tensor(name).any()) for name in biases)
        return biases if is_empty else []

    def _check_plain(self) -> None:
        """Refuse numbers of a byte that come without scales."""
        for name in self._shapes.keys() - self._stored.keys() - self._stacks.keys():
            stored_type = self._source.stored_type(name)
            if stored_type not in _PLAIN_TYPES:
                msg = (
                    f"{self._source.folder}: tensor {name!r} is stored as {stored_type}, but the "
                    f"scales that {self._config.method} has beside it are missing. Download the "
                    "checkpoint again."
                )
                raise CheckpointError(msg)


def warn_of_expansion(checkpoint: Checkpoint, num_bytes: int) -> None:
    """Say that the codes of a checkpoint are about to be expanded; nothing for plain numbers.

    Args:
        checkpoint: Of any kind.
        num_bytes: Memory of all expanded weights.
    """
    if isinstance(checkpoint, QuantisedCheckpoint):
        logger.warning(
            "The weights of %s are in codes and will be expanded to plain numbers: %.2f GiB",
            checkpoint.folder,
            num_bytes / 2**30,
        )


def _marked(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Layer in codes -> the ending it is recognised by, the first of `_MARKS` that it has."""
    marked: dict[str, str] = {}
    for mark in _MARKS:
        for name in shapes:
            if name.endswith(mark):
                marked.setdefault(name.removesuffix(mark), mark)
    return marked


def _stored_weight(tensors: ModuleTensors, scheme: WeightScheme) -> StoredRows:
    if scheme.layout == "gptq":
        return StoredGPTQ(tensors, scheme)
    if scheme.layout == "awq":
        return StoredAWQ(tensors, scheme)
    if scheme.layout == "packed":
        return StoredPacked(tensors, scheme)
    if scheme.layout == "bnb4":
        return StoredNF4(tensors)
    if scheme.layout == "mxfp4-packed":
        return packed_mxfp4(tensors)
    return StoredEight(tensors, scheme)
