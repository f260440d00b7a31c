"""The header of a GGUF file: metadata as plain Python values, and where each tensor lies.

The `gguf` package's own reader makes a NumPy array per metadata string, which takes seconds for a
tokenizer's vocabulary. This one walks the same bytes once. Format: the GGUF specification in
ggml-org/ggml, docs/gguf.md.

Everything is checked against the size of the file before it is believed, so a truncated or damaged
file raises `CheckpointError` and never allocates for a number it made up.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from engine.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    import mmap
    from collections.abc import Mapping
    from pathlib import Path

SUPPORTED_VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32
MAX_DIMENSIONS: Final = 4
"""ggml's own limit (GGML_MAX_DIMS)."""
MAX_ARRAY_ITEMS: Final = 1 << 23
"""Items in one metadata array. The largest known are merge lists of half a million strings; a
damaged length can ask for as many items as the file has bytes, each a Python object."""
MAX_ARRAY_DEPTH: Final = 4

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


class HeaderParser:
    """Walks a GGUF header once. Methods are called in the order in which they stand here."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._pos = 0

    def version(self) -> int:
        """Version of the format, after the magic and the byte order have been checked."""
        magic = self._data[:4]
        if magic != b"GGUF":
            self._fail(f"starts with {magic!r}, expected b'GGUF'; not a GGUF file")
        self._pos = 4
        version: int = self._scalar(_U32, "the format version")
        if version not in SUPPORTED_VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            if swapped in SUPPORTED_VERSIONS:
                self._fail("is big endian; convert it to little endian first")
            expected = " or ".join(map(str, SUPPORTED_VERSIONS))
            self._fail(f"has GGUF version {version}, expected {expected}; convert the model again")
        return version

    def counts(self) -> tuple[int, int]:
        """Numbers of tensors and of metadata entries."""
        num_tensors: int = self._scalar(_U64, "the tensor count")
        num_entries: int = self._scalar(_U64, "the metadata count")
        # An entry takes at least 13 bytes (key length, type, one byte), a tensor 24.
        self._check_count(num_entries, 13, "metadata entries")
        self._check_count(num_tensors, 24, "tensors")
        return num_tensors, num_entries

    def metadata(self, num_entries: int) -> dict[str, Any]:
        """Key -> int, float, bool, str or list of them."""
        entries: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self._string("a metadata key")
            if key in entries:
                self._fail(f"has the metadata key {key!r} twice")
            entries[key] = self._value(self._scalar(_U32, f"the type of {key!r}"), key)
        return entries

    def tensors(self, num_tensors: int, metadata: Mapping[str, Any]) -> dict[str, GGUFTensorInfo]:
        """Name -> where the tensor lies; each within the file and none over another."""
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            self._fail(f"has general.alignment {alignment!r}, expected a power of two")
        infos = [self._tensor_info() for _ in range(num_tensors)]
        data_start = -(-self._pos // alignment) * alignment
        tensors: dict[str, GGUFTensorInfo] = {}
        for relative in infos:
            info = dataclasses.replace(relative, offset=data_start + relative.offset)
            if info.name in tensors:
                self._fail(f"has the tensor {info.name!r} twice")
            if relative.offset % alignment:
                self._fail(
                    f"has tensor {info.name!r} at offset {relative.offset}, expected a multiple "
                    f"of {alignment}"
                )
            if info.offset + info.num_bytes > self._size:
                self._fail(
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
                self._fail(f"has tensors {previous!r} and {info.name!r} overlapping")
            end, previous = info.offset + info.num_bytes, info.name

    def _tensor_info(self) -> GGUFTensorInfo:
        """The next tensor, its offset still relative to the start of the tensor data."""
        name = self._string("a tensor name")
        num_dims: int = self._scalar(_U32, f"the dimensions of {name!r}")
        if not 1 <= num_dims <= MAX_DIMENSIONS:
            self._fail(
                f"has tensor {name!r} of {num_dims} dimensions, expected 1 to {MAX_DIMENSIONS}"
            )
        dims = [self._scalar(_U64, f"the shape of {name!r}") for _ in range(num_dims)]
        shape = tuple(reversed(dims))
        if 0 in shape:
            self._fail(f"has tensor {name!r} of the empty shape {shape}")
        type_code: int = self._scalar(_U32, f"the type of {name!r}")
        offset: int = self._scalar(_U64, f"the offset of {name!r}")
        try:
            ggml_type = GGMLQuantizationType(type_code)
            block_items, block_bytes = GGML_QUANT_SIZES[ggml_type]
        except (ValueError, KeyError):
            msg = f"{self._path}: tensor {name!r} has the unknown type {type_code}."
            raise UnsupportedModelError(msg) from None
        if shape[-1] % block_items:
            self._fail(
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
                self._fail(f"has {key!r} nested deeper than {MAX_ARRAY_DEPTH} arrays")
            return self._array(key, depth)
        return self._scalar(self._scalar_type(type_code, key)[1], f"the value of {key!r}")

    def _array(self, key: str, depth: int) -> list[Any]:
        item_code: int = self._scalar(_U32, f"the item type of {key!r}")
        count: int = self._scalar(_U64, f"the length of {key!r}")
        if count > MAX_ARRAY_ITEMS:
            self._fail(f"has {count} items in {key!r}, more than {MAX_ARRAY_ITEMS}")
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
            self._fail(f"has a string in {key!r} that is not UTF-8", error)
        if pos > size:
            self._fail(
                f"ends within string {len(strings)} of {count} in {key!r}; the file is truncated "
                "or damaged"
            )
        self._pos = pos
        return strings

    def _string(self, what: str) -> str:
        length: int = self._scalar(_U64, f"the length of {what}")
        end = self._pos + length
        if end > self._size:
            self._fail(
                f"ends at byte {self._size}, but {what} of {length} bytes is expected at "
                f"{self._pos}; the file is truncated or damaged"
            )
        raw = self._data[self._pos : end]
        self._pos = end
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self._fail(f"has {what} that is not UTF-8: {raw[:40]!r}", error)

    def _scalar(self, item: struct.Struct, what: str) -> Any:
        end = self._pos + item.size
        if end > self._size:
            self._fail(
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
            self._fail(f"has {key!r} of the unknown type {code}, expected 0 to 12")

    def _check_count(self, count: int, min_bytes: int, what: str) -> None:
        if count * min_bytes > self._size - self._pos:
            self._fail(
                f"announces {count} {what}, which {self._size - self._pos} remaining bytes cannot "
                "hold; the file is truncated or damaged"
            )

    def _fail(self, finding: str, cause: Exception | None = None) -> NoReturn:
        msg = f"{self._path} {finding}."
        raise CheckpointError(msg) from cause
