"""The weights of a model, by Hugging Face name, copied tensor by tensor into place.

A model allocates its parameters once, merged and laid out as its kernels want them, and asks for
each stored tensor to be copied into a view of them. So the weights are in memory once: beside
them there are file pages, which the system may drop, and at most a megabyte being converted.
"""

from __future__ import annotations

import abc
import logging
import zlib
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import CheckpointError, UnsupportedModelError, nearest_name_hint
from engine.loader.folder import INDEX_FILE, SINGLE_FILE, read_weight_map
from engine.loader.gguf_blocks import BITS_OF_TYPE, GGUFMatrix
from engine.loader.gguf_config import GGUFKeys, gguf_architecture
from engine.loader.gguf_names import (
    StoredTensor,
    hf_tensors,
    interleaved_view,
    num_interleaved_heads,
)
from engine.loader.quantisation_config import read_quantisation

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from engine.loader.gguf_file import GGUFFile
    from engine.loader.resolve import ModelFiles
    from engine.loader.stored_rows import StoredRows

logger = logging.getLogger(__name__)

DUMMY_STD: Final = 0.02
"""Of random weights: transformers' usual `initializer_range`, small enough not to overflow."""
_FLOAT_TYPES: Final = frozenset({"F64", "F32", "F16", "BF16"})


class Checkpoint(abc.ABC):
    """Stored weights. Used by one thread at a time; a context manager that closes itself."""

    @abc.abstractmethod
    def names(self) -> Mapping[str, tuple[int, ...]] | None:
        """Hugging Face name -> shape of every tensor; None if any name of any shape is there."""

    @abc.abstractmethod
    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Copy a tensor into `out`, converted to its dtype and device.

        Args:
            name: Hugging Face name.
            out: Written in place, outside autograd. Floating dtype, any device; may be a view,
                such as some rows of a merged weight. Has the tensor's shape.

        Raises:
            CheckpointError: There is no such tensor, it has another shape, or its file was closed.
            UnsupportedModelError: It is stored in an encoding that is not loaded.
        """

    def quantised(self, name: str) -> StoredRows | None:
        """The matrix of that name in its codes, if it is stored so; else None."""
        return None

    def quantised_stack(self, name: str) -> Sequence[StoredRows] | None:
        """Each expert's matrix of a tensor that holds all of them in codes; else None."""
        return None

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of what was opened here. A second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def open_checkpoint(files: ModelFiles, *, load_format: str = "auto", seed: int = 0) -> Checkpoint:
    """The weights of a resolved model.

    Args:
        files: From `resolve_model`. Stays open: closing the checkpoint does not close `files.gguf`.
        load_format: "auto" reads the files, "dummy" gives seeded random weights.
        seed: Of the dummy weights.

    Raises:
        CheckpointError: A file is damaged, or the files contradict each other or the config.
        UnsupportedModelError: A GGUF file has tensors without a known meaning, or the weights are
            quantised in a way that is not known.
    """
    quantisation = read_quantisation(files.config)
    if load_format == "dummy":
        if quantisation is not None:
            logger.warning(
                "load_format='dummy' makes plain numbers, although config.json describes weights "
                "quantised with %s",
                quantisation.method,
            )
        return DummyCheckpoint(seed)
    if files.gguf is not None:
        return GGUFCheckpoint(files.gguf, files.config)
    source = SafetensorsCheckpoint(files.weight_files)
    if quantisation is None:
        return source
    from engine.loader.quantised_checkpoint import QuantisedCheckpoint

    return QuantisedCheckpoint(source, quantisation)


class SafetensorsCheckpoint(Checkpoint):
    """Weights in one or several safetensors files, memory-mapped.

    Args:
        paths: The files. Where they are the shards of an index in their folder, the index decides
            which shard a tensor is read from.

    Raises:
        CheckpointError: A file is damaged, a tensor is missing, or is in two files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._handles: dict[str, Any] = {path.name: _open_safetensors(path) for path in paths}
        self._paths = {path.name: path for path in paths}
        self._files = self._tensor_files(paths[0].parent / INDEX_FILE)
        self._shapes: dict[str, tuple[int, ...]] = {
            name: tuple(self._handles[file].get_slice(name).get_shape())
            for name, file in self._files.items()
        }

    def names(self) -> Mapping[str, tuple[int, ...]]:
        """Hugging Face name -> shape of every tensor."""
        return self._shapes

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Copy a tensor into `out`; see `Checkpoint.read_into`."""
        file = self._files.get(name)
        if file is None:
            _no_tensor(name, self._shapes, self.folder)
        path = self._paths[file]
        check_shape(name, self._shapes[name], out, path)
        stored_type = self.stored_type(name)
        if stored_type not in _FLOAT_TYPES:
            msg = (
                f"{path}: tensor {name!r} is stored as {stored_type}, but config.json has no "
                "quantization_config that says what its numbers mean. Restore it, use the "
                "unquantised model, or a GGUF file."
            )
            raise UnsupportedModelError(msg)
        with torch.no_grad():
            out.copy_(self.tensor(name))

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return next(iter(self._paths.values())).parent

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor that is there, as it is stored: a view of its mapped file, which it keeps.

        Raises:
            CheckpointError: The file was closed.
        """
        tensor: torch.Tensor = self._handle(name).get_tensor(name)
        return tensor

    def stored_type(self, name: str) -> str:
        """How a tensor is stored, as the format spells it ("BF16", "I32", "F8_E4M3")."""
        return str(self._handle(name).get_slice(name).get_dtype())

    def stored_dtype(self) -> str | None:
        """The dtype of the first tensor of numbers, as torch spells it; None without one."""
        for name, file in self._files.items():
            stored = str(self._handles[file].get_slice(name).get_dtype())
            if stored in _FLOAT_TYPES:
                return {"BF16": "bfloat16", "F16": "float16"}.get(stored, "float32")
        return None

    def close(self) -> None:
        """Unmap the files."""
        self._handles.clear()

    def _handle(self, name: str) -> Any:
        file = self._files[name]
        handle = self._handles.get(file)
        if handle is None:
            msg = f"{self._paths[file]} was closed; tensor {name!r} cannot be read any more."
            raise CheckpointError(msg)
        return handle

    def _tensor_files(self, index: Path) -> dict[str, str]:
        """Tensor name -> name of the file it is read from."""
        found: dict[str, str] = {}
        if SINGLE_FILE not in self._paths and index.is_file():
            keys = {file: set(handle.keys()) for file, handle in self._handles.items()}
            for name, file in read_weight_map(index).items():
                if name not in keys.get(file, ()):
                    msg = f"{index} places tensor {name!r} in {file}, which does not have it."
                    raise CheckpointError(msg)
                found[name] = file
            return found
        for file, handle in self._handles.items():
            for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                if name in found:
                    msg = f"Tensor {name!r} is both in {found[name]} and in {self._paths[file]}."
                    raise CheckpointError(msg)
                found[name] = file
        return found


class GGUFCheckpoint(Checkpoint):
    """Weights of a GGUF file, dequantised, under Hugging Face's names and in its row order.

    Args:
        file: Stays its owner's: `close` leaves it open.
        config: Its `gguf_config`; the numbers of heads are read.

    Raises:
        UnsupportedModelError: A tensor has no known meaning.
    """

    def __init__(self, file: GGUFFile, config: Mapping[str, Any]) -> None:
        self._file = file
        keys = GGUFKeys(file)
        self._architecture = gguf_architecture(keys)
        self._num_q_heads: int = config["num_attention_heads"]
        self._num_kv_heads: int = config["num_key_value_heads"]
        shapes = {name: info.shape for name, info in file.tensors.items()}
        self._stored = hf_tensors(shapes, keys.architecture, self._architecture)
        self._shapes = {
            name: _shape_within(name, shapes[stored.name], stored)
            for name, stored in self._stored.items()
        }
        self._is_closed = False

    def names(self) -> Mapping[str, tuple[int, ...]]:
        """Hugging Face name -> shape of every tensor."""
        return self._shapes

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Dequantise a tensor into `out`; see `Checkpoint.read_into`."""
        stored = self._stored.get(name)
        if stored is None:
            _no_tensor(name, self._shapes, self._file.path)
        check_shape(name, self._shapes[name], out, self._file.path)
        if self._is_closed:
            msg = f"{self._file.path} was closed; tensor {name!r} cannot be read any more."
            raise CheckpointError(msg)
        num_heads = self._num_interleaved_heads(stored.name)
        with torch.no_grad():
            target = interleaved_view(out, num_heads) if num_heads else out
            self._file.read_into(stored.name, target, index=stored.expert)
            if self._architecture.norm_offset and name.endswith("norm.weight"):
                # Stored as 1 + weight.
                out -= self._architecture.norm_offset

    def quantised(self, name: str) -> GGUFMatrix | None:
        """A matrix in its blocks; None for tensors of plain numbers and of types without codes."""
        stored = self._stored.get(name)
        if stored is None or len(self._shapes[name]) != 2:
            return None
        type_name = self._file.tensors[stored.name].ggml_type.name
        if type_name not in BITS_OF_TYPE:
            return None
        raw = self._file.raw(stored.name)
        if stored.expert is not None:
            raw = raw[stored.expert]
        return GGUFMatrix(raw, type_name, self._num_interleaved_heads(stored.name))

    def close(self) -> None:
        """Read nothing more. The file stays open: tokenizer and embedding may still need it."""
        self._is_closed = True
        self._file.forget_pages()

    def _num_interleaved_heads(self, gguf_name: str) -> int:
        return num_interleaved_heads(
            gguf_name, self._architecture, self._num_q_heads, self._num_kv_heads
        )


class DummyCheckpoint(Checkpoint):
    """Random weights for benchmarks: any name, any shape.

    Matrices and biases are normal with standard deviation 0.02, other vectors (norm weights) are
    one. A tensor depends on the seed and its name alone, not on the order of reading; it differs
    between devices and dtypes, since it is drawn where it will be used.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def names(self) -> None:
        """None: whatever is asked for is there."""
        return

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Fill `out`; never fails."""
        with torch.no_grad():
            if out.dim() == 1 and not name.endswith(".bias"):
                out.fill_(1.0)
                return
            generator = torch.Generator(out.device)
            # 32 bits: torch's CPU generator ignores the rest of a seed.
            generator.manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
            out.normal_(0.0, DUMMY_STD, generator=generator)

    def close(self) -> None:
        """Nothing is open."""


def _shape_within(name: str, shape: tuple[int, ...], stored: StoredTensor) -> tuple[int, ...]:
    """Shape of one of Hugging Face's tensors within a stored tensor of `shape`."""
    if stored.expert is not None:
        return shape[1:]
    # A matrix of one row, which files have as a vector.
    return (1, *shape) if name.endswith("shared_expert_gate.weight") and len(shape) == 1 else shape


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        msg = f"{path} cannot be read as safetensors; truncated or damaged? ({error})"
        raise CheckpointError(msg) from error


def check_shape(name: str, found: tuple[int, ...], out: torch.Tensor, path: Path) -> None:
    """Refuse to read a tensor into a place of another shape.

    Raises:
        CheckpointError: With both.
    """
    if tuple(out.shape) != found:
        msg = f"{path}: tensor {name!r} has shape {found}, expected {tuple(out.shape)}."
        raise CheckpointError(msg)


def _no_tensor(name: str, names: Mapping[str, Any], path: Path) -> NoReturn:
    hint = nearest_name_hint(name, names)
    msg = f"{path}: there is no tensor {name!r} among {len(names)}.{hint}"
    raise CheckpointError(msg)
