"""`GGUFFile` against the `gguf` package's reader, writer and block decoders."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import gguf
import gguf.quants
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from loader_files import finish, llama_config, random_model, write_gguf

import engine.loader.gguf_file as gguf_file_module
from engine.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from engine.loader.gguf_file import GGUFFile

Q = GGMLQuantizationType
BLOCK_TYPES = sorted(gguf.quants._type_traits, key=int)


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, random_model(llama_config()), ggml_type=Q.Q4_1)


def test_metadata_of_every_type_reads_back(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "types.gguf", "llama")
    expected = {
        "a.u8": (writer.add_uint8, 255),
        "a.i8": (writer.add_int8, -128),
        "a.u16": (writer.add_uint16, 65535),
        "a.i16": (writer.add_int16, -32768),
        "a.u32": (writer.add_uint32, 2**32 - 1),
        "a.i32": (writer.add_int32, -(2**31)),
        "a.u64": (writer.add_uint64, 2**64 - 1),
        "a.i64": (writer.add_int64, -(2**63)),
        "a.f32": (writer.add_float32, 0.5),
        "a.f64": (writer.add_float64, 0.1),
        "a.true": (writer.add_bool, True),
        "a.false": (writer.add_bool, False),
        "a.text": (writer.add_string, "né\n🙂"),
        "a.ints": (writer.add_array, [1, -2, 3]),
        "a.floats": (writer.add_array, [0.5, -0.25]),
        "a.bools": (writer.add_array, [True, False]),
        "a.texts": (writer.add_array, ["Ġ t", "e", "🙂" * 100]),
        "a.nested": (writer.add_array, [[1, 2], [3]]),
    }
    for key, (add, value) in expected.items():
        add(key, value)
    finish(writer)
    metadata = GGUFFile(tmp_path / "types.gguf").metadata
    assert metadata == {"general.architecture": "llama"} | {
        key: value for key, (_, value) in expected.items()
    }
    assert type(metadata["a.true"]) is bool
    assert all(type(value) is bool for value in metadata["a.bools"])


@pytest.mark.demo_model
def test_demo_model_agrees_with_the_gguf_reader(demo_gguf: Path) -> None:
    ours = GGUFFile(demo_gguf)
    theirs = gguf.GGUFReader(demo_gguf)
    fields = {key: field.contents() for key, field in theirs.fields.items()}
    assert {key: value for key, value in fields.items() if not key.startswith("GGUF.")} == dict(
        ours.metadata
    )
    assert [tensor.name for tensor in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert (info.ggml_type, info.num_bytes) == (tensor.tensor_type, tensor.n_bytes)
        assert info.offset == tensor.data_offset
    for name in ("blk.29.ffn_down.weight", "output_norm.weight"):
        tensor = next(tensor for tensor in theirs.tensors if tensor.name == name)
        assert np.array_equal(ours.raw(name).reshape(-1), tensor.data.reshape(-1).view(np.uint8))


@pytest.mark.parametrize("ggml_type", BLOCK_TYPES, ids=lambda ggml_type: ggml_type.name)
def test_every_block_type_decodes_as_gguf_does(
    tmp_path: Path, ggml_type: Q, monkeypatch: pytest.MonkeyPatch
) -> None:
    block_items, block_bytes = GGML_QUANT_SIZES[ggml_type]
    num_rows, blocks_per_row = 37, 3
    generator = np.random.default_rng(int(ggml_type))
    raw = generator.integers(
        0, 256, (num_rows, blocks_per_row * block_bytes), dtype=np.uint8, endpoint=False
    )
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, ggml_type)
    path = tmp_path / "blocks.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("x.weight", raw, raw_dtype=ggml_type)
    finish(writer)
    # Small chunks, so that 37 rows are several of them with a rest.
    monkeypatch.setattr(gguf_file_module, "_CHUNK_BYTES", 4 * 5 * blocks_per_row * block_items)
    with GGUFFile(path) as file:
        assert file.tensors["x.weight"].shape == (num_rows, blocks_per_row * block_items)
        assert np.array_equal(file.read("x.weight").numpy(), expected, equal_nan=True)
        half = file.read("x.weight", torch.bfloat16)
        rounded = torch.from_numpy(expected).to(torch.bfloat16)
        torch.testing.assert_close(half, rounded, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_plain_types_keep_every_value(tmp_path: Path, dtype: type) -> None:
    values = np.random.default_rng(1).normal(size=(5, 3, 7)).astype(dtype)
    writer = gguf.GGUFWriter(tmp_path / "plain.gguf", "llama")
    writer.add_tensor("x", values)
    writer.add_tensor("y", values[0, 0])
    finish(writer)
    file = GGUFFile(tmp_path / "plain.gguf")
    assert np.array_equal(file.read("x", torch.float64).numpy(), values.astype(np.float64))
    assert np.array_equal(file.read("y", torch.float64).numpy(), values[0, 0].astype(np.float64))


def test_reads_into_strided_views(tiny_gguf: Path) -> None:
    file = GGUFFile(tiny_gguf)
    name = "blk.1.ffn_down.weight"
    expected = file.read(name)
    merged = torch.full((200, 100), torch.nan)
    file.read_into(name, merged[10 : 10 + 64, 2 : 2 + 96])
    assert torch.equal(merged[10:74, 2:98], expected)
    assert merged.isnan().sum() == merged.numel() - expected.numel()


def test_dequantising_needs_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    rows = np.random.default_rng(0).integers(0, 255, (4096, 4096 // 32 * 34), dtype=np.uint8)
    writer.add_tensor("x.weight", rows, raw_dtype=Q.Q8_0)
    finish(writer)
    out = torch.empty((4096, 4096), dtype=torch.bfloat16)
    with GGUFFile(path) as file:
        tracemalloc.start()
        file.read_into("x.weight", out)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak_bytes < 8 << 20  # 64 MiB as fp32


def test_integers_are_not_dequantised(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "ints.gguf", "llama")
    writer.add_tensor("some.table", np.arange(64, dtype=np.int32))
    finish(writer)
    with pytest.raises(UnsupportedModelError, match=r"'some\.table' has the type I32"):
        GGUFFile(tmp_path / "ints.gguf").read("some.table")


def test_unknown_tensor_type_is_named(tmp_path: Path, tiny_gguf: Path) -> None:
    data = bytearray(tiny_gguf.read_bytes())
    name = b"blk.0.ffn_up.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    data[at : at + 4] = (99).to_bytes(4, "little")
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(UnsupportedModelError, match=r"blk\.0\.ffn_up\.weight.*unknown type 99"):
        GGUFFile(tmp_path / "bad.gguf")


def test_absent_tensor_and_wrong_shape_are_named(tiny_gguf: Path) -> None:
    file = GGUFFile(tiny_gguf)
    with pytest.raises(CheckpointError, match="no tensor 'nothing'"):
        file.read("nothing")
    with pytest.raises(CheckpointError, match=r"\(96, 64\).*\(64, 96\)"):
        file.read_into("blk.0.ffn_up.weight", torch.empty(64, 96))


def test_a_closed_file_says_so_but_its_views_live(tiny_gguf: Path) -> None:
    with GGUFFile(tiny_gguf) as file:
        view = file.raw("output_norm.weight")
    assert view.size == 64 * 4
    assert not view.flags.writeable
    other = GGUFFile(tiny_gguf)
    other.close()
    with pytest.raises(CheckpointError, match="was closed"):
        other.read("output_norm.weight")


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"absent\.gguf"):
        GGUFFile(tmp_path / "absent.gguf")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(CheckpointError, match="is empty"):
        GGUFFile(tmp_path / "empty.gguf")
    with pytest.raises(CheckpointError, match="cannot be read"):
        GGUFFile(tmp_path)
