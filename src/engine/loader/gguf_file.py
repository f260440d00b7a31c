"""Read a GGUF file: metadata as plain Python values, tensors dequantised into torch tensors.

The header is parsed by `engine.loader.gguf_header`; block decoding is the `gguf` package's. torch
is imported when a tensor is read: a process that only wants the tokenizer does without it.
"""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Final

import gguf.quants
import numpy as np
import numpy.typing as npt

from engine.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from engine.loader.gguf_header import GGUFTensorInfo, HeaderParser

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

_CHUNK_BYTES: Final = 1 << 20
"""fp32 bytes decoded at once; decoding has three to five temporaries of this size. Between 256 KiB
and 64 MiB the speed is the same."""

_PLAIN_DTYPES: Final[Mapping[str, str]] = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
}
"""GGUF type -> torch's name of it."""


class GGUFFile:
    """A GGUF file (version 2 or 3, little endian), memory-mapped and read only.

    The header is parsed at construction; tensor data is touched when it is read. Reading is safe
    from several threads at once.

    Attributes:
        path: The file.
        version: Of the format.
        metadata: Key -> plain value: int, float, bool, str, or a list of them.
        tensors: Name -> `GGUFTensorInfo`, in file order.

    Raises:
        ModelNotFoundError: There is no such file.
        CheckpointError: Not GGUF, truncated or inconsistent.
        UnsupportedModelError: A tensor's encoding is unknown.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._map = _map_file(self.path)
        try:
            header = HeaderParser(self.path, self._map)
            self.version = header.version()
            num_tensors, num_entries = header.counts()
            self.metadata: Mapping[str, Any] = MappingProxyType(header.metadata(num_entries))
            self.tensors: Mapping[str, GGUFTensorInfo] = MappingProxyType(
                header.tensors(num_tensors, self.metadata)
            )
        except BaseException:
            self.close()
            raise

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The encoded bytes of a tensor, as a read-only view of the mapped file.

        Returns:
            uint8 [*shape[:-1], bytes_per_row]. The file stays mapped while the view lives.

        Raises:
            CheckpointError: There is no such tensor.
        """
        info = self._info(name)
        flat = np.frombuffer(self._map, np.uint8, info.num_bytes, info.offset)
        return flat.reshape(*info.shape[:-1], info.bytes_per_row)

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor, dequantised.

        Args:
            name: As in the file.
            dtype: Of the result, default float32. Rounding is to nearest even, from the decoded
                fp32 value.

        Returns:
            A new contiguous CPU tensor of the tensor's shape.

        Raises:
            CheckpointError: There is no such tensor.
            UnsupportedModelError: Its encoding cannot be decoded.
        """
        import torch

        out = torch.empty(self._info(name).shape, dtype=dtype or torch.float32)
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: torch.Tensor, *, index: int | None = None) -> None:
        """Dequantise a tensor into `out`, a megabyte of fp32 at a time.

        Args:
            name: As in the file.
            out: Written in place; any floating dtype, device and strides. Its shape is the
                tensor's, or splits the tensor's leading dimension further: a caller that wants
                rows in another order passes a permuted view, whose row-major order is the
                file's.

            index: Read that matrix of a tensor with three dimensions alone.

        Raises:
            CheckpointError: There is no such tensor, or `out` has another number of elements or
                another row length.
            UnsupportedModelError: Its encoding cannot be decoded.
        """
        info = self._info(name)
        shape = info.shape if index is None else info.shape[1:]
        if out.numel() != math.prod(shape) or (len(shape) > 1 and out.shape[-1] != shape[-1]):
            msg = (
                f"{self.path}: tensor {name!r} has shape {shape} in the file, but "
                f"{tuple(out.shape)} is expected."
            )
            raise CheckpointError(msg)
        if len(info.shape) < 2:
            out.copy_(self._decode(info, self.raw(name)).view(out.shape))
            return
        raw = self.raw(name) if index is None else self.raw(name)[index]
        encoded = raw.reshape(-1, info.bytes_per_row)
        rows_per_slice = math.prod(out.shape[1:-1])
        slices_per_chunk = max(1, _CHUNK_BYTES // (4 * rows_per_slice * info.shape[-1]))
        for start in range(0, out.shape[0], slices_per_chunk):
            target = out[start : start + slices_per_chunk]
            first_row = start * rows_per_slice
            rows = encoded[first_row : first_row + target.shape[0] * rows_per_slice]
            decoded = self._decode(info, rows).to(out.dtype)
            target.copy_(decoded.view(target.shape))

    def forget_pages(self) -> None:
        """Give back the memory of what was read, where the system allows it; it can be read again.

        The pages stay in the system's file cache as long as that likes.
        """
        if hasattr(self._map, "madvise") and not self._map.closed:
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Unmap the file, or leave that to the last view from `raw` that is still alive."""
        try:
            self._map.close()
        except BufferError:
            return

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"GGUFFile({str(self.path)!r}, {len(self.tensors)} tensors)"

    def _info(self, name: str) -> GGUFTensorInfo:
        if self._map.closed:
            msg = f"{self.path} was closed; tensor {name!r} cannot be read any more."
            raise CheckpointError(msg)
        try:
            return self.tensors[name]
        except KeyError:
            msg = f"{self.path}: there is no tensor {name!r} among {len(self.tensors)}."
            raise CheckpointError(msg) from None

    def _decode(self, info: GGUFTensorInfo, encoded: npt.NDArray[np.uint8]) -> torch.Tensor:
        """A new CPU tensor of as many elements as `encoded` holds, fp32 or the stored dtype."""
        import torch

        plain = _PLAIN_DTYPES.get(info.ggml_type.name)
        if plain is not None:
            # torch warns about memory it must not write to, hence the copy.
            return torch.from_numpy(encoded.copy()).view(getattr(torch, plain))
        try:
            # Damaged scales decode to inf and nan; that must not become a warning or an error.
            with np.errstate(all="ignore"):
                return torch.from_numpy(gguf.quants.dequantize(encoded, info.ggml_type))
        except NotImplementedError as error:
            msg = (
                f"{self.path}: tensor {info.name!r} has the type {info.ggml_type.name}, which "
                "cannot be dequantised. Requantise the model, for example to Q8_0."
            )
            raise UnsupportedModelError(msg) from error


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                msg = f"{path} is empty, expected a GGUF file."
                raise CheckpointError(msg)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        msg = f"There is no file {path}."
        raise ModelNotFoundError(msg) from error
    except (OSError, ValueError) as error:
        msg = f"{path} cannot be read: {error}."
        raise CheckpointError(msg) from error
