"""Damaged GGUF files: a typed error or a reading, never a crash, a hang or a huge allocation."""

from __future__ import annotations

import random
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from gguf.constants import GGMLQuantizationType
from loader_files import llama_config, random_model, write_gguf

from engine.errors import CheckpointError, EngineError
from engine.loader.checkpoint import GGUFCheckpoint
from engine.loader.gguf_config import gguf_config, gguf_eos_token_ids
from engine.loader.gguf_file import GGUFFile


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    metadata = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    model = random_model(llama_config())
    write_gguf(path, model, ggml_type=GGMLQuantizationType.Q4_1, metadata=metadata)
    return path.read_bytes()


@pytest.fixture(scope="module")
def header_size(intact: bytes, tmp_path_factory: pytest.TempPathFactory) -> int:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    path.write_bytes(intact)
    return min(info.offset for info in GGUFFile(path).tensors.values())


def load_all(path: Path) -> None:
    """Everything that loading does: header, config, stop tokens, every tensor."""
    with GGUFFile(path) as file:
        config = gguf_config(file)
        gguf_eos_token_ids(file)
        checkpoint = GGUFCheckpoint(file, config)
        for name, shape in checkpoint.names().items():
            checkpoint.read_into(name, torch.empty(shape, dtype=torch.bfloat16))


def test_the_intact_file_loads(tmp_path: Path, intact: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(intact)
    load_all(tmp_path / "x.gguf")


def test_every_truncation_is_noticed(tmp_path: Path, intact: bytes, header_size: int) -> None:
    path = tmp_path / "x.gguf"
    lengths = [*range(1, header_size, 3), *range(header_size, len(intact), 997), len(intact) - 32]
    for length in lengths:
        path.write_bytes(intact[:length])
        with pytest.raises(CheckpointError, match=r"x\.gguf"):
            GGUFFile(path)


@pytest.mark.parametrize("seed", range(8))
def test_flipped_bytes_raise_engine_errors_only(
    tmp_path: Path, intact: bytes, header_size: int, seed: int
) -> None:
    generator = random.Random(seed)
    path = tmp_path / "x.gguf"
    num_errors = 0
    tracemalloc.start()
    for _ in range(100):
        data = bytearray(intact)
        for _ in range(generator.choice((1, 1, 2, 8))):
            data[generator.randrange(header_size)] = generator.randrange(256)
        path.write_bytes(data)
        try:
            load_all(path)
        except EngineError:
            num_errors += 1
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_errors > 20  # else the flips miss what is read
    assert peak_bytes < 16 << 20


@pytest.mark.parametrize("number", [0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
def test_every_64_bit_word_may_be_absurd(
    tmp_path: Path, intact: bytes, header_size: int, number: int
) -> None:
    path = tmp_path / "x.gguf"
    tracemalloc.start()
    for at in range(8, header_size - 8, 29):
        path.write_bytes(intact[:at] + struct.pack("<Q", number) + intact[at + 8 :])
        try:
            load_all(path)
        except EngineError:
            continue
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 16 << 20


def gguf_bytes(
    entries: bytes = b"", num_entries: int = 0, tensors: bytes = b"", num_tensors: int = 0
) -> bytes:
    counts = struct.pack("<QQ", num_tensors, num_entries)
    return b"GGUF" + struct.pack("<I", 3) + counts + entries + tensors + bytes(256)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, dims: tuple[int, ...], ggml_type: int = 0, offset: int = 0) -> bytes:
    return (
        text(name)
        + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        + struct.pack("<IQ", ggml_type, offset)
    )


STRINGS, ARRAY, UINT32 = 8, 9, 4
NESTED = struct.pack("<I", ARRAY) + b"".join(struct.pack("<IQ", ARRAY, 1) for _ in range(9))

CASES = {
    "not GGUF": (b"PK\x03\x04" + bytes(60), r"starts with b'PK\\x03\\x04', expected b'GGUF'"),
    "shorter than the magic": (b"GG", "starts with b'GG', expected b'GGUF'"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1, expected 2 or 3"),
    "version 77": (b"GGUF" + struct.pack("<IQQ", 77, 0, 0), "version 77, expected 2 or 3"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big endian"),
    "too many entries": (gguf_bytes(num_entries=2**60), "announces 1152921504606846976 metadata"),
    "too many tensors": (gguf_bytes(num_tensors=2**60), "announces 1152921504606846976 tensors"),
    "key not UTF-8": (
        gguf_bytes(text(b"\xff\xfe") + struct.pack("<II", UINT32, 1), 1),
        "metadata key that is not UTF-8",
    ),
    "string list not UTF-8": (
        gguf_bytes(
            text(b"a") + struct.pack("<IIQ", ARRAY, STRINGS, 2) + text(b"ok") + text(b"\xff"), 1
        ),
        "string in 'a' that is not UTF-8",
    ),
    "unknown value type": (gguf_bytes(text(b"a") + struct.pack("<I", 13), 1), "unknown type 13"),
    "key twice": (
        gguf_bytes((text(b"a") + struct.pack("<II", UINT32, 1)) * 2, 2),
        "metadata key 'a' twice",
    ),
    "huge string list": (
        gguf_bytes(text(b"a") + struct.pack("<IIQ", ARRAY, STRINGS, 2**62), 1),
        "4611686018427387904 items in 'a'",
    ),
    "string list beyond the end": (
        gguf_bytes(text(b"a") + struct.pack("<IIQ", ARRAY, STRINGS, 3) + text(b"ok") * 2
                   + struct.pack("<Q", 9999), 1),
        "within string 2 of 3 in 'a'",
    ),
    "number list beyond the end": (
        gguf_bytes(text(b"a") + struct.pack("<IIQ", ARRAY, UINT32, 4000), 1),
        "announces 4000 items in 'a'",
    ),
    "nested too deeply": (gguf_bytes(text(b"a") + NESTED, 1), "nested deeper than 4"),
    "odd alignment": (
        gguf_bytes(text(b"general.alignment") + struct.pack("<II", UINT32, 48), 1),
        "general.alignment 48, expected a power of two",
    ),
    "zero alignment": (
        gguf_bytes(text(b"general.alignment") + struct.pack("<II", UINT32, 0), 1),
        "general.alignment 0, expected a power of two",
    ),
    "no dimensions": (gguf_bytes(tensors=tensor(b"x", ()), num_tensors=1), "'x' of 0 dimensions"),
    "five dimensions": (
        gguf_bytes(tensors=tensor(b"x", (1,) * 5), num_tensors=1),
        "'x' of 5 dimensions, expected 1 to 4",
    ),
    "empty dimension": (
        gguf_bytes(tensors=tensor(b"x", (0, 2**63)), num_tensors=1),
        r"'x' of the empty shape \(9223372036854775808, 0\)",
    ),
    "overflowing shape": (
        gguf_bytes(tensors=tensor(b"x", (2**63, 2**63)), num_tensors=1),
        "tensor 'x' of 340282366920938463463374607431768211456 bytes",
    ),
    "rows not whole blocks": (
        gguf_bytes(tensors=tensor(b"x", (33, 2), 2), num_tensors=1),
        "rows of 33 items, expected a multiple of 32 for Q4_0",
    ),
    "unaligned tensor": (
        gguf_bytes(tensors=tensor(b"x", (4,), offset=5), num_tensors=1),
        "'x' at offset 5, expected a multiple of 32",
    ),
    "tensor beyond the end": (
        gguf_bytes(tensors=tensor(b"x", (4,), offset=4096), num_tensors=1),
        "tensor 'x' of 16 bytes is expected at",
    ),
    "tensor twice": (
        gguf_bytes(tensors=tensor(b"x", (4,)) + tensor(b"x", (4,), offset=32), num_tensors=2),
        "tensor 'x' twice",
    ),
    "overlapping tensors": (
        gguf_bytes(tensors=tensor(b"x", (16,)) + tensor(b"y", (4,), offset=32), num_tensors=2),
        "tensors 'x' and 'y' overlapping",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_error_says_what_is_wrong(tmp_path: Path, case: str) -> None:
    data, message = CASES[case]
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        GGUFFile(tmp_path / "x.gguf")
    assert str(tmp_path / "x.gguf") in str(caught.value)
