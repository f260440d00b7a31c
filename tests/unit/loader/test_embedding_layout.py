"""The files of sentence-transformers, in its old and its new spelling, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_encoders import write_layout

from engine.errors import CheckpointError, UnsupportedModelError
from engine.loader.embedding_layout import read_embedding_layout, score_activation


def read(folder: Path) -> Any:
    return read_embedding_layout(folder, default_pooling="last")


def test_a_folder_without_any_of_them(tmp_path: Path) -> None:
    layout = read(tmp_path)
    assert layout == read_embedding_layout(None, default_pooling="last")
    assert layout.pooling == ("last",)
    assert not layout.normalizes
    assert layout.max_tokens is None


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
        ({"pooling_mode_lasttoken": True}, ("last",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, ("max", "mean")),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, ("mean_sqrt_len",)),
        ({"word_embedding_dimension": 4}, ("mean",)),
        ({"pooling_mode": "weightedmean"}, ("weighted_mean",)),
        ({"pooling_mode": ["cls", "mean"]}, ("cls", "mean")),
    ],
)
def test_pooling(tmp_path: Path, pooling: dict[str, Any], expected: tuple[str, ...]) -> None:
    write_layout(tmp_path, pooling=pooling)
    layout = read(tmp_path)
    assert layout.pooling == expected
    assert layout.normalizes


def test_prompts_and_sizes(tmp_path: Path) -> None:
    write_layout(tmp_path, prompts={"query": "q: "}, default_prompt_name="query", max_seq_length=9)
    layout = read(tmp_path)
    assert layout.prompts == {"query": "q: "}
    assert layout.default_prompt_name == "query"
    assert layout.max_tokens == 9


@pytest.mark.parametrize(("limit", "expected"), [(77, 77), (10**30, None)])
def test_the_tokenizers_limit_counts_where_no_other_is(
    tmp_path: Path, limit: int, expected: int | None
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": limit}))
    assert read(tmp_path).max_tokens == expected


def write_dense(folder: Path, **changes: Any) -> None:
    write_layout(folder, modules=("Transformer", "Pooling", "Dense", "Normalize"))
    (folder / "2_Dense").mkdir()
    config = {"in_features": 4, "out_features": 2, **changes}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(config))
    (folder / "2_Dense" / "model.safetensors").touch()


def test_dense_layers(tmp_path: Path) -> None:
    write_dense(tmp_path, activation_function="torch.nn.modules.linear.Identity", bias=False)
    [dense] = read(tmp_path).dense
    assert (dense.in_features, dense.out_features, dense.bias, dense.activation) == (
        4,
        2,
        False,
        "",
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"activation_function": "os.system"}, "activation 'os.system'"),
        ({"use_residual": True}, "use_residual=True"),
        ({"module_input_name": "token_embeddings"}, "token_embeddings"),
    ],
)
def test_dense_layers_that_are_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    write_dense(tmp_path, **changes)
    with pytest.raises(UnsupportedModelError, match=named):
        read(tmp_path)


def test_modules_that_are_refused(tmp_path: Path) -> None:
    write_layout(tmp_path, modules=("Transformer", "SpladePooling"))
    with pytest.raises(UnsupportedModelError, match="'SpladePooling' is not known"):
        read(tmp_path)
    write_layout(tmp_path, modules=("Transformer", "Normalize", "Pooling"))
    with pytest.raises(UnsupportedModelError, match="'Pooling' stands after Normalize"):
        read(tmp_path)
    write_layout(tmp_path, pooling={"pooling_mode": "median"})
    with pytest.raises(UnsupportedModelError, match="pooling_mode='median'"):
        read(tmp_path)
    write_layout(tmp_path, pooling={"include_prompt": False}, prompts={"query": "q: "})
    with pytest.raises(UnsupportedModelError, match="include_prompt=false"):
        read(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", "[1]"])
def test_damaged_modules(tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        read(tmp_path)


def test_activation_of_scores() -> None:
    identity = "torch.nn.modules.linear.Identity"
    assert score_activation({}) == "sigmoid"
    assert score_activation({"sbert_ce_default_activation_function": identity}) == ""
    assert score_activation({"sentence_transformers": {"activation_fn": identity}}) == ""
    with pytest.raises(UnsupportedModelError, match=r"os\.system"):
        score_activation({"sentence_transformers": {"activation_fn": "os.system"}})


def test_the_hub_gives_the_folders_of_modules_too() -> None:
    from huggingface_hub.utils import filter_repo_objects

    from engine.loader import hub

    files = [
        "config.json",
        "model.safetensors",
        "modules.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "onnx/config.json",
        "onnx/model.safetensors",
        "openvino/1_x/config.json",
        "consolidated.safetensors",
    ]
    patterns = [*hub._CONFIG_PATTERNS, *hub._WEIGHT_PATTERNS]
    kept = filter_repo_objects(
        files, allow_patterns=patterns, ignore_patterns=hub._IGNORED_PATTERNS
    )
    assert list(kept) == files[:6]
