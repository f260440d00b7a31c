"""Read a GGUF file: metadata as plain Python values, tensors dequantised into torch tensors.

The `gguf` package's own reader makes a NumPy array per metadata string, which takes seconds for a
tokenizer's vocabulary. This one walks the same bytes once. Format: the GGUF specification in
ggml-org/ggml, docs/gguf.md; block decoding is the `gguf` package's.

Everything in the header is checked against the size of the file before it is believed, so a
truncated or damaged file raises `CheckpointError` and never allocates for a number it made up.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import struct
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Final

import gguf.quants
import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from engine.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

SUPPORTED_VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32
MAX_DIMENSIONS: Final = 4
"""ggml's own limit (GGML_MAX_DIMS)."""
MAX_ARRAY_ITEMS: Final = 1 << 23
"""Items in one metadata array. The largest known are merge lists of half a million strings; a
damaged length can ask for as many items as the file has bytes, each a Python object."""
MAX_ARRAY_DEPTH: Final = 4

_CHUNK_BYTES: Final = 1 << 20
"""fp32 bytes decoded at once. Decoding needs three to five temporaries of this size; between 256 KiB
and 64 MiB the speed is the same."""

_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final[Mapping[int, tuple[str, struct.Struct]]] = {
    code: (name, struct.Struct(f"<{letter}"))
    for code, name, letter in (
        (0, "u1", "B"),
        (1, "i1", "b"),
        (2, "<u2", "H"),
        (3, "<i2", "h"),
        (4, "<u4", "I"),
        (5, "<i4", "i"),
        (6, "<f4", "f"),
        (7, "?", "?"),
        (10, "<u8", "Q"),
        (11, "<i8", "q"),
        (12, "<f8", "d"),
    )
}
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_PLAIN_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}


@dataclasses.dataclass(frozen=True, slots=True)
class GGUFTensorInfo:
    """Where a tensor lies in its file and how it is encoded.

    Attributes:
        name: As written in the file, such as `blk.0.attn_q.weight`.
        shape: In torch order: the last dimension is the contiguous one, which is quantised.
        ggml_type: Encoding; `.name` is such as "Q4_1".
        offset: Of the first byte, from the start of the file.
        num_bytes: Encoded size.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    offset: int
    num_bytes: int

    @property
    def bytes_per_row(self) -> int:
        """Encoded size of one run of the last dimension."""
        return self.num_bytes // math.prod(self.shape[:-1])


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
            header = _HeaderParser(self.path, self._map)
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

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor, dequantised.

        Args:
            name: As in the file.
            dtype: Of the result. Rounding is to nearest even, from the decoded fp32 value.

        Returns:
            A new contiguous CPU tensor of the tensor's shape.

        Raises:
            CheckpointError: There is no such tensor.
            UnsupportedModelError: Its encoding cannot be decoded.
        """
        out = torch.empty(self._info(name).shape, dtype=dtype)
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Dequantise a tensor into `out`, a megabyte of fp32 at a time.

        Args:
            name: As in the file.
            out: Written in place; any floating dtype, device and strides. Its shape is the
                tensor's, or splits the tensor's leading dimension further: a caller that wants
                rows in another order passes a permuted view, whose row-major order is the
                file's.

        Raises:
            CheckpointError: There is no such tensor, or `out` has another number of elements or
                another row length.
            UnsupportedModelError: Its encoding cannot be decoded.
        """
        info = self._info(name)
        if out.numel() != math.prod(info.shape) or (
            len(info.shape) > 1 and out.shape[-1] != info.shape[-1]
        ):
            msg = (
                f"{self.path}: tensor {name!r} has shape {info.shape} in the file, but "
                f"{tuple(out.shape)} is expected."
            )
            raise CheckpointError(msg)
        if len(info.shape) < 2:
            out.copy_(self._decode(info, self.raw(name)).view(out.shape))
            return
        encoded = self.raw(name).reshape(-1, info.bytes_per_row)
        rows_per_slice = math.prod(out.shape[1:-1])
        slices_per_chunk = max(1, _CHUNK_BYTES // (4 * rows_per_slice * info.shape[-1]))
        for start in range(0, out.shape[0], slices_per_chunk):
            target = out[start : start + slices_per_chunk]
            first_row = start * rows_per_slice
            rows = encoded[first_row : first_row + target.shape[0] * rows_per_slice]
            decoded = self._decode(info, rows).to(out.dtype)
            target.copy_(decoded.view(target.shape))

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
        plain = _PLAIN_DTYPES.get(info.ggml_type.name)
        if plain is not None:
            # torch warns about memory it must not write to, hence the copy.
            return torch.from_numpy(encoded.copy()).view(plain)
        try:
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


class _HeaderParser:
    """Walks a GGUF header once. Methods are called in the order in which they stand here."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._pos = 0

    def version(self) -> int:
        magic = self._data[:4]
        if magic != b"GGUF":
            raise self._error(f"starts with {magic!r}, expected b'GGUF'; not a GGUF file")
        self._pos = 4
        version: int = self._scalar(_U32, "the format version")
        if version in SUPPORTED_VERSIONS:
            return version
        expected = f"expected {' or '.join(map(str, SUPPORTED_VERSIONS))}"
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in SUPPORTED_VERSIONS:
            raise self._error("is big endian; convert it to little endian first")
        raise self._error(f"has GGUF version {version}, {expected}; convert the model again")

    def counts(self) -> tuple[int, int]:
        """Numbers of tensors and of metadata entries."""
        num_tensors: int = self._scalar(_U64, "the tensor count")
        num_entries: int = self._scalar(_U64, "the metadata count")
        # An entry takes at least 13 bytes (key length, type, one byte), a tensor 24.
        self._check_count(num_entries, 13, "metadata entries")
        self._check_count(num_tensors, 24, "tensors")
        return num_tensors, num_entries

    def metadata(self, num_entries: int) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self._string("a metadata key")
            if key in entries:
                raise self._error(f"has the metadata key {key!r} twice")
            entries[key] = self._value(self._scalar(_U32, f"the type of {key!r}"), key)
        return entries

    def tensors(self, num_tensors: int, metadata: Mapping[str, Any]) -> dict[str, GGUFTensorInfo]:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._error(f"has general.alignment {alignment!r}, expected a power of two")
        infos = [self._tensor_info() for _ in range(num_tensors)]
        data_start = -(-self._pos // alignment) * alignment
        tensors: dict[str, GGUFTensorInfo] = {}
        for relative in infos:
            info = dataclasses.replace(relative, offset=data_start + relative.offset)
            if info.name in tensors:
                raise self._error(f"has the tensor {info.name!r} twice")
            if relative.offset % alignment:
                raise self._error(
                    f"has tensor {info.name!r} at offset {relative.offset}, expected a multiple "
                    f"of {alignment}"
                )
            if info.offset + info.num_bytes > self._size:
                raise self._error(
                    f"ends at byte {self._size}, but tensor {info.name!r} of {info.num_bytes} "
                    f"bytes is expected at {info.offset}; the file is truncated or damaged"
                )
            tensors[info.name] = info
        self._check_overlaps(tensors)
        return tensors

    def _check_overlaps(self, tensors: Mapping[str, GGUFTensorInfo]) -> None:
        end, previous = 0, ""
        for info in sorted(tensors.values(), key=lambda info: info.offset):
            if info.offset < end:
                raise self._error(f"has tensors {previous!r} and {info.name!r} overlapping")
            end, previous = info.offset + info.num_bytes, info.name

    def _tensor_info(self) -> GGUFTensorInfo:
        """The next tensor, its offset still relative to the start of the tensor data."""
        name = self._string("a tensor name")
        num_dims: int = self._scalar(_U32, f"the dimensions of {name!r}")
        if not 1 <= num_dims <= MAX_DIMENSIONS:
            raise self._error(
                f"has tensor {name!r} of {num_dims} dimensions, expected 1 to {MAX_DIMENSIONS}"
            )
        dims = [self._scalar(_U64, f"the shape of {name!r}") for _ in range(num_dims)]
        shape = tuple(reversed(dims))
        if 0 in shape:
            raise self._error(f"has tensor {name!r} of the empty shape {shape}")
        type_code: int = self._scalar(_U32, f"the type of {name!r}")
        offset: int = self._scalar(_U64, f"the offset of {name!r}")
        try:
            ggml_type = GGMLQuantizationType(type_code)
            block_items, block_bytes = GGML_QUANT_SIZES[ggml_type]
        except (ValueError, KeyError):
            msg = f"{self._path}: tensor {name!r} has the unknown type {type_code}."
            raise UnsupportedModelError(msg) from None
        if shape[-1] % block_items:
            raise self._error(
                f"has tensor {name!r} with rows of {shape[-1]} items, expected a multiple of "
                f"{block_items} for {ggml_type.name}"
            )
        return GGUFTensorInfo(
            name, shape, ggml_type, offset, math.prod(shape) // block_items * block_bytes
        )

    def _value(self, type_code: int, key: str, depth: int = 0) -> Any:
        if type_code == _STRING:
            return self._string(f"the value of {key!r}")
        if type_code == _ARRAY:
            if depth == MAX_ARRAY_DEPTH:
                raise self._error(f"has {key!r} nested deeper than {MAX_ARRAY_DEPTH} arrays")
            return self._array(key, depth)
        return self._scalar(self._scalar_type(type_code, key)[1], f"the value of {key!r}")

    def _array(self, key: str, depth: int) -> list[Any]:
        item_code: int = self._scalar(_U32, f"the item type of {key!r}")
        count: int = self._scalar(_U64, f"the length of {key!r}")
        if count > MAX_ARRAY_ITEMS:
            raise self._error(f"has {count} items in {key!r}, more than {MAX_ARRAY_ITEMS}")
        if item_code == _STRING:
            self._check_count(count, 8, f"strings in {key!r}")
            return self._strings(count, key)
        if item_code == _ARRAY:
            self._check_count(count, 12, f"arrays in {key!r}")
            return [self._value(_ARRAY, key, depth + 1) for _ in range(count)]
        dtype, item = self._scalar_type(item_code, key)
        self._check_count(count, item.size, f"items in {key!r}")
        values = np.frombuffer(self._data, np.dtype(dtype), count, self._pos).tolist()
        self._pos += count * item.size
        return list(values)

    def _strings(self, count: int, key: str) -> list[str]:
        # The hot loop of a load: a vocabulary and its merges are 100,000 to 800,000 strings.
        data, size, pos, unpack = self._data, self._size, self._pos, _U64.unpack_from
        strings = []
        try:
            for _ in range(count):
                start = pos + 8
                pos = start + unpack(data, pos)[0]
                if pos > size:
                    break
                strings.append(data[start:pos].decode())
        except struct.error:
            pos = size + 1
        except UnicodeDecodeError as error:
            raise self._error(f"has a string in {key!r} that is not UTF-8") from error
        if pos > size:
            raise self._error(
                f"ends within string {len(strings)} of {count} in {key!r}; the file is truncated "
                "or damaged"
            )
        self._pos = pos
        return strings

    def _string(self, what: str) -> str:
        length: int = self._scalar(_U64, f"the length of {what}")
        end = self._pos + length
        if end > self._size:
            raise self._error(
                f"ends at byte {self._size}, but {what} of {length} bytes is expected at "
                f"{self._pos}; the file is truncated or damaged"
            )
        raw = self._data[self._pos : end]
        self._pos = end
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self._error(f"has {what} that is not UTF-8: {raw[:40]!r}") from error

    def _scalar(self, item: struct.Struct, what: str) -> Any:
        end = self._pos + item.size
        if end > self._size:
            raise self._error(
                f"ends at byte {self._size}, but {what} is expected at {self._pos}; the file is "
                "truncated or damaged"
            )
        (value,) = item.unpack_from(self._data, self._pos)
        self._pos = end
        return value

    def _scalar_type(self, code: int, key: str) -> tuple[str, struct.Struct]:
        try:
            return _SCALARS[code]
        except KeyError:
            raise self._error(f"has {key!r} of the unknown type {code}, expected 0 to 12") from None

    def _check_count(self, count: int, min_bytes: int, what: str) -> None:
        if count * min_bytes > self._size - self._pos:
            raise self._error(
                f"announces {count} {what}, which {self._size - self._pos} remaining bytes cannot "
                "hold; the file is truncated or damaged"
            )

    def _error(self, finding: str) -> CheckpointError:
        return CheckpointError(f"{self._path} {finding}.")
