"""What a folder in the layout of sentence-transformers says beside the model itself.

    modules.json                       Transformer, Pooling, Dense …, Normalize: in this order
    1_Pooling/config.json              how tokens become one vector
    2_Dense/config.json, model.safetensors
    sentence_bert_config.json          longest text, lower case
    config_sentence_transformers.json  prompts for queries and documents

A folder without `modules.json` gets what sentence-transformers gives it: the mean over all tokens,
or the last token's state where the model reads only forwards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from engine.errors import CheckpointError, UnsupportedModelError
from engine.loader.folder import read_json

MODULES_FILE: Final = "modules.json"
_POOLING_FLAGS: Final = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
_POOLING_NAMES: Final = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
_ACTIVATIONS: Final = {
    "torch.nn.modules.linear.Identity": "",
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.SiLU": "silu",
}
_NO_LIMIT: Final = 10**9
"""`model_max_length` of tokenizers without a limit is 10^30."""


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """A product after pooling.

    Attributes:
        folder: Has its `model.safetensors` with `linear.weight` and, with `bias`, `linear.bias`.
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        bias: Whether there is one.
        activation: "tanh", "relu", "gelu", "silu", or "" for none.
    """

    folder: Path
    in_features: int
    out_features: int
    bias: bool
    activation: str


@dataclass(frozen=True, slots=True)
class EmbeddingLayout:
    """How texts become vectors, apart from the model.

    Attributes:
        pooling: Of "cls", "max", "mean", "mean_sqrt_len", "weighted_mean" and "last"; several are
            put side by side.
        dense: Products after pooling, in order.
        normalizes: Whether vectors end with length 1.
        max_tokens: Longest text the model was made for, special tokens included; None where
            nothing says so.
        lower_case: Whether texts are lower-cased first.
        prompts: Name -> what is put before a text.
        default_prompt_name: The prompt of a text for which none is chosen; None for none.
    """

    pooling: tuple[str, ...]
    dense: tuple[DenseLayer, ...] = ()
    normalizes: bool = False
    max_tokens: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None


def read_embedding_layout(folder: Path | None, *, default_pooling: str) -> EmbeddingLayout:
    """The layout of a model folder.

    Args:
        folder: None for a model that is one file.
        default_pooling: Where the folder names none.

    Raises:
        CheckpointError: A file of the layout is damaged.
        UnsupportedModelError: It asks for something that is not done here.
    """
    if folder is None:
        return EmbeddingLayout(pooling=(default_pooling,))
    sizes = _optional(folder / "sentence_bert_config.json")
    wording = _optional(folder / "config_sentence_transformers.json")
    prompts = {
        str(name): text for name, text in (wording.get("prompts") or {}).items() if text is not None
    }
    pooling: tuple[str, ...] = (default_pooling,)
    dense: tuple[DenseLayer, ...] = ()
    normalizes = False
    if (folder / MODULES_FILE).is_file():
        pooling, dense, normalizes = _read_modules(
            folder, pooling, has_prompts=any(prompts.values())
        )
    return EmbeddingLayout(
        pooling=pooling,
        dense=dense,
        normalizes=normalizes,
        max_tokens=_max_tokens(folder, sizes),
        lower_case=bool(sizes.get("do_lower_case", False)),
        prompts=prompts,
        default_prompt_name=wording.get("default_prompt_name"),
    )


def score_activation(config: Mapping[str, Any]) -> str:
    """What a cross-encoder's score goes through: "sigmoid", or "" for nothing.

    Raises:
        UnsupportedModelError: The config names another function.
    """
    nested = config.get("sentence_transformers")
    named = nested.get("activation_fn") if isinstance(nested, Mapping) else None
    named = named or config.get("sbert_ce_default_activation_function")
    if named is None or named == "torch.nn.modules.activation.Sigmoid":
        return "sigmoid"
    if named == "torch.nn.modules.linear.Identity":
        return ""
    msg = f"The config's activation {named!r} of scores is not supported; Sigmoid and Identity are."
    raise UnsupportedModelError(msg)


def _read_modules(
    folder: Path, default_pooling: tuple[str, ...], *, has_prompts: bool
) -> tuple[tuple[str, ...], tuple[DenseLayer, ...], bool]:
    pooling, dense, normalizes = default_pooling, [], False
    for module in _module_list(folder):
        kind = str(module.get("type", "")).rpartition(".")[2]
        path = folder / str(module.get("path", ""))
        if normalizes:
            raise _unsupported(folder, kind, "stands after Normalize")
        if kind == "Pooling":
            pooling = _read_pooling(path, has_prompts=has_prompts)
        elif kind == "Dense":
            dense.append(_read_dense(path))
        elif kind == "Normalize":
            normalizes = True
        elif kind not in ("Transformer", "Dropout"):
            raise _unsupported(folder, kind, "is not known")
    return pooling, tuple(dense), normalizes


def _module_list(folder: Path) -> list[Mapping[str, Any]]:
    path = folder / MODULES_FILE
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        msg = f"{path} cannot be read as JSON: {error}."
        raise CheckpointError(msg) from error
    if not isinstance(modules, list) or not all(isinstance(one, dict) for one in modules):
        msg = f"{path} must hold a list of modules."
        raise CheckpointError(msg)
    return modules


def _read_pooling(path: Path, *, has_prompts: bool) -> tuple[str, ...]:
    config = read_json(path / "config.json")
    if config.get("include_prompt", True) is False and has_prompts:
        msg = f"{path}: include_prompt=false (prompts left out of the pooling) is not supported."
        raise UnsupportedModelError(msg)
    named = config.get("pooling_mode")
    if named is None:
        return tuple(mode for key, mode in _POOLING_FLAGS.items() if config.get(key)) or ("mean",)
    modes = [named] if isinstance(named, str) else list(named)
    unknown = [mode for mode in modes if mode not in _POOLING_NAMES]
    if unknown or not modes:
        msg = f"{path}: pooling_mode={named!r} is not one of {', '.join(_POOLING_NAMES)}."
        raise UnsupportedModelError(msg)
    return tuple(_POOLING_NAMES[mode] for mode in modes)


def _read_dense(path: Path) -> DenseLayer:
    config = read_json(path / "config.json")
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    places = {config.get(key) for key in ("module_input_name", "module_output_name")}
    if activation not in _ACTIVATIONS or config.get("use_residual"):
        msg = (
            f"{path}: activation {activation!r} or use_residual={config.get('use_residual')!r} is "
            f"not supported; without residual, these are: {', '.join(_ACTIVATIONS)}."
        )
        raise UnsupportedModelError(msg)
    if places - {None, "sentence_embedding"}:
        msg = f"{path}: a Dense layer on something else than the sentence embedding: {places}."
        raise UnsupportedModelError(msg)
    if not (path / "model.safetensors").is_file():
        msg = f"{path} has no model.safetensors; convert the older pytorch_model.bin first."
        raise UnsupportedModelError(msg)
    return DenseLayer(
        path,
        int(config["in_features"]),
        int(config["out_features"]),
        bool(config.get("bias", True)),
        _ACTIVATIONS[activation],
    )


def _max_tokens(folder: Path, sizes: Mapping[str, Any]) -> int | None:
    limit = sizes.get("max_seq_length")
    if limit is None:
        limit = _optional(folder / "tokenizer_config.json").get("model_max_length")
    is_limit = isinstance(limit, int | float) and 0 < limit < _NO_LIMIT
    return int(limit) if is_limit and limit is not None else None


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _unsupported(folder: Path, kind: str, problem: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{folder / MODULES_FILE}: the module {kind!r} {problem}. Supported are Transformer, "
        "Pooling, Dense and, last, Normalize."
    )
