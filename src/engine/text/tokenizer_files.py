"""A tokenizer from a Hugging Face folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from engine.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from engine.text.tokenizer_parts import TokenizerParts

_NAMED_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
_FOREIGN_FILES = (
    "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json",
    "tokenizer.tiktoken",
)  # fmt: skip


def parts_from_folder(path: str | os.PathLike[str]) -> TokenizerParts:
    """The tokenizer in folder `path`, or in the `tokenizer.json` that `path` names.

    Raises:
        ModelNotFoundError: There is no such folder or file.
        UnsupportedModelError: The folder holds a tokenizer in another format only.
        CheckpointError: A file cannot be read, or two of them contradict each other.
    """
    tokenizer_file = _tokenizer_file(Path(path))
    folder = tokenizer_file.parent
    text = _read_text(tokenizer_file)
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # The library raises bare Exception.
        msg = f"{tokenizer_file} is not a tokenizer that `tokenizers` can read: {error}"
        raise CheckpointError(msg) from error
    config = _read_json(folder / "tokenizer_config.json")
    named = _special_token_map(config, _read_json(folder / "special_tokens_map.json"))
    _add_declared_tokens(backend, config, named.values(), tokenizer_file)
    eos_id = backend.token_to_id(named["eos_token"]) if "eos_token" in named else None
    return TokenizerParts(
        backend,
        _bpe_merges(text),
        named,
        _chat_templates(folder, config),
        frozenset() if eos_id is None else frozenset((eos_id,)),
    )


def _tokenizer_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        msg = f"There is no tokenizer folder or file {str(path)!r}."
        raise ModelNotFoundError(msg)
    file = path / "tokenizer.json"
    if file.is_file():
        return file
    foreign = [name for name in _FOREIGN_FILES if (path / name).is_file()]
    if not foreign:
        msg = f"{path} holds no tokenizer.json. Name a folder that does as `tokenizer`."
        raise ModelNotFoundError(msg)
    msg = (
        f"{path} holds its tokenizer as {', '.join(foreign)}, but no tokenizer.json. Convert it "
        "once: `transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`; "
        "SentencePiece files need the package sentencepiece for that."
    )
    raise UnsupportedModelError(msg)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{file} cannot be read: {error}"
        raise CheckpointError(msg) from error


def _read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        msg = f"{file} is not JSON: {error}"
        raise CheckpointError(msg) from error
    if not isinstance(value, dict):
        msg = f"{file} holds a JSON {type(value).__name__} where an object belongs."
        raise CheckpointError(msg)
    return value


def _token_text(entry: object) -> str | None:
    """Special tokens are written as text or as an object with `content`."""
    if isinstance(entry, Mapping):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _special_token_map(config: Mapping[str, Any], older: Mapping[str, Any]) -> dict[str, str]:
    named = {}
    for name in _NAMED_TOKENS:
        text = _token_text(config[name] if name in config else older.get(name))
        if text is not None:
            named[name] = text
    extra = config.get("extra_special_tokens")
    if isinstance(extra, Mapping):  # For instance {"image_token": "<image>"}.
        named.update({name: text for name, entry in extra.items() if (text := _token_text(entry))})
    return named


def _add_declared_tokens(
    backend: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    named_tokens: Iterable[str],
    tokenizer_file: Path,
) -> None:
    """Add what `tokenizer_config.json` declares and `tokenizer.json` lacks, as transformers does.

    A declared id that the token cannot get is an error: the model was trained with that id.
    """
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    declared = config.get("added_tokens_decoder", {})
    for key in sorted(declared, key=int):
        fields = dict(declared[key])
        content = fields.pop("content")
        fields.pop("__type", None)
        if content in known:
            continue
        token = AddedToken(content, **fields)
        add = backend.add_special_tokens if token.special else backend.add_tokens
        add([token])
        known.add(content)
        if (got := backend.token_to_id(content)) != int(key):
            msg = (
                f"tokenizer_config.json next to {tokenizer_file} gives {content!r} id {key}, but "
                f"after the tokens of {tokenizer_file.name} it would get {got}."
            )
            raise CheckpointError(msg)
    for content in named_tokens:
        # A token without an id of its own would grow the vocabulary beyond the model's.
        if content not in known and backend.token_to_id(content) is not None:
            backend.add_special_tokens([AddedToken(content, special=True, normalized=False)])
            known.add(content)


def _bpe_merges(text: str) -> list[tuple[str, str]] | None:
    model = json.loads(text)["model"]
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        return None
    # Older files write "a b"; the pair form came when tokens with spaces did.
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Template files come first, then the entry in `tokenizer_config.json`."""
    templates: dict[str, str] = {}
    if (file := folder / "chat_template.jinja").is_file():
        templates["default"] = _read_text(file)
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = _read_text(file)
    if templates:
        return templates
    entry = config.get("chat_template")
    if isinstance(entry, str):
        return {"default": entry}
    if isinstance(entry, list):
        return {item["name"]: item["template"] for item in entry}
    return {}
