"""Safetensors and dummy checkpoints; the files come from safetensors' own writer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from loader_files import llama_config, random_model, write_folder
from safetensors.torch import save_file

from engine.errors import CheckpointError, EngineError, UnsupportedModelError
from engine.loader.checkpoint import DUMMY_STD, open_checkpoint
from engine.loader.resolve import resolve_model

NORM = "model.norm.weight"


def some_tensors(
    dtype: torch.dtype = torch.float32, num_tensors: int = 7
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"model.layers.{number}.mlp.up_proj.weight": torch.randn(
            5 + number, 8, generator=generator
        ).to(dtype)
        for number in range(num_tensors)
    }


def read_all(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    with open_checkpoint(resolve_model(str(folder))) as checkpoint:
        tensors = {}
        for name, shape in (checkpoint.names() or {}).items():
            tensors[name] = torch.full(shape, torch.nan, dtype=dtype)
            checkpoint.read_into(name, tensors[name])
        return tensors


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_tensor_in_the_dtype_wanted(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype, num_shards: int
) -> None:
    tensors = some_tensors(stored)
    folder = write_folder(tmp_path / "m", tensors, num_shards=num_shards)
    found = read_all(folder, wanted)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.to(wanted))


def test_a_folder_saved_by_transformers(tmp_path: Path) -> None:
    model = random_model(llama_config(tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "m", max_shard_size="40KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    found = read_all(tmp_path / "m")
    state = model.state_dict()
    assert set(found) == set(state)
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_rows_of_a_merged_weight_can_be_filled(tmp_path: Path) -> None:
    tensors = some_tensors()
    first, second = list(tensors)[:2]
    merged = torch.nn.Parameter(torch.full((11, 8), torch.nan))
    with open_checkpoint(resolve_model(str(write_folder(tmp_path / "m", tensors)))) as checkpoint:
        checkpoint.read_into(first, merged[:5])
        checkpoint.read_into(second, merged[5:])
    assert torch.equal(merged.detach(), torch.cat([tensors[first], tensors[second]]))
    assert merged.grad_fn is None


def test_shards_without_an_index(tmp_path: Path) -> None:
    tensors = some_tensors()
    folder = write_folder(tmp_path / "m", tensors, num_shards=3)
    (folder / "model.safetensors.index.json").unlink()
    found = read_all(folder)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_single_file_comes_before_an_index(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", {"a": torch.zeros(2), "b": torch.zeros(2)}, num_shards=2)
    write_folder(tmp_path / "m", {"a": torch.ones(2), "b": torch.ones(2)})
    found = read_all(folder)
    assert torch.equal(found["a"], torch.ones(2))
    assert torch.equal(found["b"], torch.ones(2))


def test_the_index_decides_which_copy_counts(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", {"a": torch.ones(2), "b": torch.ones(2)}, num_shards=2)
    save_file(
        {"b": torch.ones(2), "a": torch.zeros(2)}, folder / "model-00002-of-00002.safetensors"
    )
    assert torch.equal(read_all(folder)["a"], torch.ones(2))
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"'a' is both in model-00001.*model-00002"):
        read_all(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", some_tensors(), num_shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    message = r"lacks 1 of 3 weight files: model-00002-of-00003\.safetensors"
    with pytest.raises(CheckpointError, match=message):
        resolve_model(str(folder))
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=message):
        resolve_model(str(folder))


def test_a_shard_that_vanishes_later_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", some_tensors(), num_shards=3)
    files = resolve_model(str(folder))
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors cannot be read"):
        open_checkpoint(files)


def test_an_index_with_a_tensor_too_many(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", some_tensors(), num_shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' in model-00001.*does not have"):
        open_checkpoint(resolve_model(str(folder)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "holds a JSON list, expected an object"),
        ("{}", "no 'weight_map' object"),
        ('{"weight_map": {}}', "no 'weight_map' object"),
        ('{"weight_map": {"a": 3}}', "places tensor 'a' in 3, expected a file name"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "expected a file name"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "expected a file name"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_a_bad_index_is_named(tmp_path: Path, content: str, message: str) -> None:
    folder = write_folder(tmp_path / "m", some_tensors(), num_shards=2)
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve_model(str(folder))
    assert "model.safetensors.index.json" in str(caught.value)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", some_tensors())
    files = resolve_model(str(folder))
    data = files.weight_files[0].read_bytes()
    for length in (*range(0, len(data), 41), len(data) - 1):
        files.weight_files[0].write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read as safe"):
            open_checkpoint(files)


def test_a_damaged_header_raises_engine_errors_only(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", some_tensors(num_tensors=2))
    path = folder / "model.safetensors"
    data = path.read_bytes()
    header_size = 8 + int.from_bytes(data[:8], "little")
    num_errors = 0
    for at in range(header_size):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x15]) + data[at + 1 :])
        try:
            read_all(folder)
        except EngineError:
            num_errors += 1
    assert num_errors > header_size // 2


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_tensors_without_a_config_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"w": torch.ones(4, 4).to(dtype), NORM: torch.ones(4)}
    with open_checkpoint(resolve_model(str(write_folder(tmp_path / "m", tensors)))) as checkpoint:
        checkpoint.read_into(NORM, torch.empty(4))
        with pytest.raises(UnsupportedModelError, match=r"'w' is stored as .* no quanti"):
            checkpoint.read_into("w", torch.empty(4, 4))


def test_wrong_names_shapes_and_times_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", some_tensors(), num_shards=2)
    checkpoint = open_checkpoint(resolve_model(str(folder)))
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=r"no tensor 'layers.0.*Did you mean 'model.layers"):
        checkpoint.read_into("layers.0.mlp.up_proj.weight", torch.empty(5, 8))
    with pytest.raises(CheckpointError, match=r"model-00001.*0\.mlp.*\(5, 8\).*\(8, 5\)"):
        checkpoint.read_into(name, torch.empty(8, 5))
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(CheckpointError, match="was closed"):
        checkpoint.read_into(name, torch.empty(5, 8))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_weights_are_in_memory_once(tmp_path: Path, stored: torch.dtype) -> None:
    shape = (2048, 1024)
    tensors = {f"w{number}": torch.ones(shape, dtype=stored) for number in range(16)}
    folder = write_folder(tmp_path / "m", tensors, num_shards=4)
    del tensors
    parameters = torch.ones((16, *shape), dtype=torch.bfloat16)
    with open_checkpoint(resolve_model(str(folder))) as checkpoint:
        before = anonymous_memory_bytes()
        peak = 0
        for number in range(16):
            checkpoint.read_into(f"w{number}", parameters[number])
            peak = max(peak, anonymous_memory_bytes() - before)
    assert peak < 12 << 20  # the parameters are 64 MiB, one tensor as fp32 is 8 MiB


def anonymous_memory_bytes() -> int:
    """Memory of this process that is no file: file pages are the system's to drop."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    pytest.skip("this kernel does not report RssAnon")


def test_dummy_weights(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    files = resolve_model(str(folder), load_format="dummy")
    with open_checkpoint(files, load_format="dummy", seed=3) as checkpoint:
        assert checkpoint.names() is None
        merged = torch.full((300, 200), torch.nan, dtype=torch.bfloat16)
        checkpoint.read_into("q.weight", merged[:100])
        checkpoint.read_into("k.weight", merged[100:])
        norm = torch.empty(7)
        checkpoint.read_into(NORM, norm)
        bias = torch.empty(1000)
        checkpoint.read_into("q.bias", bias)
    assert torch.equal(norm, torch.ones(7))
    for drawn in (merged[:100].float(), merged[100:].float(), bias):
        assert drawn.std().item() == pytest.approx(DUMMY_STD, rel=0.1)
        assert abs(drawn.mean().item()) < 0.1 * DUMMY_STD
    assert not torch.equal(merged[:100], merged[100:200])


def test_dummy_weights_depend_on_seed_and_name_alone(tmp_path: Path) -> None:
    files = resolve_model(str(write_folder(tmp_path / "m")), load_format="dummy")

    def draw(seed: int, *names: str) -> dict[str, torch.Tensor]:
        checkpoint = open_checkpoint(files, load_format="dummy", seed=seed)
        drawn = {name: torch.empty(20, 30) for name in names}
        for name, out in drawn.items():
            checkpoint.read_into(name, out)
        return drawn

    first = draw(0, "a", "b")
    assert torch.equal(draw(0, "b", "a")["a"], first["a"])
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(draw(1, "a")["a"], first["a"])
    state = torch.get_rng_state()
    draw(0, "a")
    assert torch.equal(torch.get_rng_state(), state)
