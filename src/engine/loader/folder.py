"""What lies in a Hugging Face model folder: JSON files, safetensors weights, end-of-text ids."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from engine.errors import CheckpointError, UnsupportedModelError

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
_SHARD_NAME: Final = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
# A second copy of the weights in another layout, and weights that are not a model.
_OTHER_WEIGHTS: Final = re.compile(r"(consolidated|adapter_model|optimizer|training_args).*")
_FOREIGN_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt"})


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: The file cannot be read, is not JSON, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        msg = f"{path} cannot be read as JSON: {error}."
        raise CheckpointError(msg) from error
    if not isinstance(value, dict):
        msg = f"{path} holds a JSON {type(value).__name__}, expected an object."
        raise CheckpointError(msg)
    return value


def find_weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files that make up a model, all of them there.

    Looked for in this order, which is transformers': `model.safetensors`, the shards of
    `model.safetensors.index.json`; then a full set of shards without an index, and a single
    safetensors file of any name.

    Raises:
        CheckpointError: There are none, or shards are missing.
        UnsupportedModelError: The weights are there, but not as safetensors.
    """
    if (folder / SINGLE_FILE).is_file():
        return (folder / SINGLE_FILE,)
    if (folder / INDEX_FILE).is_file():
        return _indexed_shards(folder)
    names = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    shards = [name for name in names if _SHARD_NAME.fullmatch(name)]
    if shards:
        return _unindexed_shards(folder, shards)
    others = [name for name in names if not _OTHER_WEIGHTS.fullmatch(name)]
    if len(others) == 1:
        return (folder / others[0],)
    if others:
        msg = (
            f"{folder} has {len(others)} safetensors files ({', '.join(others[:4])}), but neither "
            f"{SINGLE_FILE} nor {INDEX_FILE} says which are the model."
        )
        raise CheckpointError(msg)
    raise _no_weights(folder)


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, from a safetensors index.

    Raises:
        CheckpointError: The index is not of that form, or leads out of its folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        msg = f"{index} has no 'weight_map' object; the index is damaged."
        raise CheckpointError(msg)
    for tensor, filename in weight_map.items():
        if not isinstance(filename, str) or Path(filename).name != filename:
            msg = f"{index} places tensor {tensor!r} in {filename!r}, expected a file name."
            raise CheckpointError(msg)
    return weight_map


def eos_token_ids(*configs: dict[str, Any]) -> tuple[int, ...]:
    """All `eos_token_id`s of the configs, in order, each once.

    Raises:
        CheckpointError: One is neither an integer nor a list of integers.
    """
    token_ids: dict[int, None] = {}
    for config in configs:
        value = config.get("eos_token_id")
        if value is None and isinstance(config.get("text_config"), dict):
            value = config["text_config"].get("eos_token_id")
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is None:
                continue
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                msg = f"eos_token_id is {value!r}, expected an integer or a list of integers."
                raise CheckpointError(msg)
            token_ids[token_id] = None
    return tuple(token_ids)


def _indexed_shards(folder: Path) -> tuple[Path, ...]:
    filenames = sorted(set(read_weight_map(folder / INDEX_FILE).values()))
    missing = [filename for filename in filenames if not (folder / filename).is_file()]
    if missing:
        raise _missing_shards(folder, missing, len(filenames))
    return tuple(folder / filename for filename in filenames)


def _unindexed_shards(folder: Path, shards: list[str]) -> tuple[Path, ...]:
    matches = [match for name in shards if (match := _SHARD_NAME.fullmatch(name))]
    totals = {match[2] for match in matches}
    if len(totals) > 1:
        msg = f"{folder} has shards of {len(totals)} different checkpoints: {', '.join(shards)}."
        raise CheckpointError(msg)
    (total,) = totals
    present = {int(match[1]) for match in matches}
    missing = [
        f"model-{number:0{len(total)}}-of-{total}.safetensors"
        for number in range(1, int(total) + 1)
        if number not in present
    ]
    if missing:
        raise _missing_shards(folder, missing, int(total))
    return tuple(folder / name for name in shards)


def _missing_shards(folder: Path, missing: list[str], total: int) -> CheckpointError:
    shown = ", ".join(missing[:4]) + (" …" if len(missing) > 4 else "")
    return CheckpointError(
        f"{folder} lacks {len(missing)} of {total} weight files: {shown}. Download them again."
    )


def _no_weights(folder: Path) -> CheckpointError | UnsupportedModelError:
    foreign = sorted(path.name for path in folder.iterdir() if path.suffix in _FOREIGN_SUFFIXES)
    if foreign:
        return UnsupportedModelError(
            f"{folder} has weights as {foreign[0]}, which can run code when loaded, and no "
            "*.safetensors. Convert them once: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder)."
        )
    if (folder / "adapter_config.json").is_file():
        return UnsupportedModelError(
            f"{folder} is a LoRA adapter, not a model. Merge it into its base model first "
            "(peft: merge_and_unload, then save_pretrained)."
        )
    return CheckpointError(
        f"{folder} has no *.safetensors file. load_format='dummy' makes random weights instead."
    )
