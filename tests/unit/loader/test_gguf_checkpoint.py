"""GGUF weights and configs against transformers: its own GGUF loader, and models written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from loader_files import TOKENS, llama_config, random_model, write_gguf
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.errors import CheckpointError, UnsupportedModelError
from engine.loader.checkpoint import open_checkpoint
from engine.loader.gguf_architectures import ARCHITECTURES as ROWS
from engine.loader.gguf_file import GGUFFile
from engine.loader.gguf_names import StoredTensor, hf_tensors
from engine.loader.resolve import resolve_model

Q = GGMLQuantizationType
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # the others: tests/models/test_gguf_families.py


def config_of(architecture: str, **changes: Any) -> PreTrainedConfig:
    kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    options = llama_config(**changes).to_dict()
    for name in ("architectures", "model_type", "transformers_version"):
        options.pop(name, None)
    if architecture != "llama":
        options.pop("attention_bias")
    return kinds[architecture](**options)


def read_all(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    with open_checkpoint(resolve_model(str(path))) as checkpoint:
        tensors = {}
        for name, shape in (checkpoint.names() or {}).items():
            tensors[name] = torch.full(shape, torch.nan, dtype=dtype)
            checkpoint.read_into(name, tensors[name])
        return tensors


def assert_same_weights(ours: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    tied = "lm_head.weight" not in ours
    assert set(ours) == set(state) - ({"lm_head.weight"} if tied else set())
    for name, weight in ours.items():
        assert torch.equal(weight, state[name].to(weight.dtype)), name


def loaded_by_transformers(path: Path) -> dict[str, torch.Tensor]:
    """What `from_pretrained(..., gguf_file=...)` reads; that itself would need accelerate."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors: dict[str, torch.Tensor] = load_gguf_checkpoint(
        str(path), return_tensors=True, model_to_load=model
    )["tensors"]
    return tensors


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_written_out_read_back(tmp_path: Path, architecture: str, tied: bool) -> None:
    model = random_model(config_of(architecture, tie_word_embeddings=tied))
    path = write_gguf(tmp_path / "x.gguf", model, architecture)
    assert_same_weights(read_all(path), model.state_dict())


def test_biases_of_interleaved_heads_read_back(tmp_path: Path) -> None:
    model = random_model(llama_config(attention_bias=True, mlp_bias=True))
    path = write_gguf(tmp_path / "x.gguf", model)
    files = resolve_model(str(path))
    assert files.config["attention_bias"] is True
    assert files.config["mlp_bias"] is True
    assert_same_weights(read_all(path), model.state_dict())


@pytest.mark.parametrize(
    "ggml_type", [Q.F32, Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0],
    ids=lambda ggml_type: ggml_type.name,
)  # fmt: skip
def test_each_encoding_loads_as_in_transformers(tmp_path: Path, ggml_type: Q) -> None:
    path = write_gguf(tmp_path / "x.gguf", random_model(llama_config()), ggml_type=ggml_type)
    assert_same_weights(read_all(path), loaded_by_transformers(path))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_config_is_that_of_the_model_written(tmp_path: Path, architecture: str, tied: bool) -> None:
    model = random_model(config_of(architecture, tie_word_embeddings=tied))
    path = write_gguf(tmp_path / "x.gguf", model, architecture, Q.Q8_0)
    ours = resolve_model(str(path)).config
    assert ours.pop("architectures") == [type(model).__name__]
    assert ours.pop("dtype") == "bfloat16"
    written = model.config.to_dict()
    assert ours == {key: written.get(key, False) for key in ours}
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file="x.gguf").to_dict()
    for key in ("model_type", "hidden_size", "num_key_value_heads", "tie_word_embeddings"):
        assert ours[key] == theirs[key]


@pytest.mark.parametrize(
    ("ggml_type", "dtype"), [(Q.F32, "float32"), (Q.F16, "float16"), (Q.Q4_0, "bfloat16")]
)
def test_dtype_is_the_stored_one(tmp_path: Path, ggml_type: Q, dtype: str) -> None:
    path = write_gguf(tmp_path / "x.gguf", random_model(llama_config()), ggml_type=ggml_type)
    assert resolve_model(str(path)).config["dtype"] == dtype


def test_a_window_makes_a_mistral(tmp_path: Path) -> None:
    model = random_model(llama_config())
    metadata = {"llama.attention.sliding_window": 32}
    write_gguf(tmp_path / "x.gguf", model, metadata=metadata)
    config = resolve_model(str(tmp_path / "x.gguf")).config
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["sliding_window"] == 32
    assert isinstance(AutoConfig.for_model(**config), MistralConfig)


def inverse_frequencies(rope_parameters: dict[str, Any], theta: float) -> tuple[Any, float]:
    """What transformers makes of rope settings."""
    config = LlamaConfig(
        head_dim=16, hidden_size=64, num_attention_heads=4, max_position_embeddings=32768,
        rope_parameters={"rope_theta": theta} | rope_parameters,
    )  # fmt: skip
    return ROPE_INIT_FUNCTIONS[rope_parameters["rope_type"]](config, device="cpu")


LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def llama3_file(path: Path, scale: float = 1.0) -> Path:
    """A file with the divisors which transformers' own llama3 scaling amounts to."""
    model = random_model(llama_config(rope_parameters={**LLAMA3, "rope_theta": 500000.0}))
    scaled, _ = inverse_frequencies(LLAMA3, 500000.0)
    plain = 500000.0 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    divisors = (plain / scaled.double()).float().numpy()
    divisors[1:] *= np.float32(scale)
    return write_gguf(path, model, tensors={"rope_freqs.weight": divisors})


def test_llama3_divisors_are_recognised(tmp_path: Path) -> None:
    config = resolve_model(str(llama3_file(tmp_path / "x.gguf"))).config
    assert config["rope_parameters"] == {**LLAMA3, "rope_theta": 500000.0}


def test_other_divisors_are_kept_as_they_are(tmp_path: Path) -> None:
    config = resolve_model(str(llama3_file(tmp_path / "x.gguf", scale=1.5))).config
    parameters = config["rope_parameters"]
    assert parameters["rope_type"] == "longrope"
    scaled, _ = inverse_frequencies(LLAMA3, 500000.0)
    scaled[1:] /= 1.5
    found, attention_factor = inverse_frequencies(parameters, 500000.0)
    torch.testing.assert_close(found, scaled, rtol=1e-5, atol=0)
    assert attention_factor == 1.0


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"type": "none"}, {"rope_type": "default"}),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 128},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        (
            {"type": "yarn", "factor": 2.5, "yarn_beta_fast": 16.0, "attn_factor": 0.5},
            {
                "rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 256,
                "beta_fast": 16.0, "attention_factor": 0.5 * (0.1 * np.log(2.5) + 1),
            },
        ),
    ],
)  # fmt: skip
def test_rope_scaling(tmp_path: Path, metadata: dict[str, Any], expected: dict[str, Any]) -> None:
    metadata = {f"qwen2.rope.scaling.{key}": value for key, value in metadata.items()}
    model = random_model(config_of("qwen2"))
    path = write_gguf(tmp_path / "x.gguf", model, "qwen2", metadata=metadata)
    parameters = resolve_model(str(path)).config["rope_parameters"]
    assert parameters == pytest.approx({"rope_theta": 50000.0} | expected)
    if parameters["rope_type"] != "default":
        inverse_frequencies(parameters, 50000.0)  # transformers understands it


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.logit_scale": 2.0}, "llama.logit_scale=2.0"),
        ({"llama.attention.value_length": 8}, "of different sizes"),
        ({"llama.rope.dimension_count": 8}, "rotated in part"),
        ({"llama.rope.scaling.type": "magic"}, "rope scaling 'magic'"),
        ({"llama.attention.head_count_kv": [2, 1]}, "differs from layer to layer"),
        ({"split.count": 3}, "one of 3 parts"),
    ],
)
def test_unsupported_features_are_refused(
    tmp_path: Path, metadata: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_refused(tmp_path, metadata, message, UnsupportedModelError, monkeypatch)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.block_count": "two"}, "llama.block_count is 'two', expected a positive integer"),
        ({"llama.context_length": -1}, "llama.context_length is -1, expected a positive integer"),
        ({"llama.rope.freq_base": float("nan")}, "llama.rope.freq_base is nan, expected a posit"),
        ({"llama.embedding_length": 128}, r"'token_embd.weight' has shape \(64, 64\), expected"),
    ],
)
def test_senseless_metadata_is_named(
    tmp_path: Path, metadata: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_refused(tmp_path, metadata, message, CheckpointError, monkeypatch)


def assert_refused(
    tmp_path: Path,
    metadata: dict[str, Any],
    message: str,
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The writer warns of a key it was given twice; the later value counts.
    monkeypatch.setattr(gguf.gguf_writer.logger, "warning", lambda *_: None)
    path = write_gguf(tmp_path / "x.gguf", random_model(llama_config()), metadata=metadata)
    with pytest.raises(error, match=message):
        resolve_model(str(path))


def test_missing_metadata_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", random_model(llama_config()))
    data = path.read_bytes().replace(b"llama.block_count", b"llama.clock_bount")
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"llama\.block_count is missing"):
        resolve_model(str(path))


def test_unknown_architecture_names_the_known_ones(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="'mamba' is not supported, only 'llama'"):
        resolve_model(str(tmp_path / "x.gguf"))


def test_unknown_tensors_are_not_passed_over(tmp_path: Path) -> None:
    extra = {"blk.0.attn_sinks.weight": np.ones(4, dtype=np.float32)}
    path = write_gguf(tmp_path / "x.gguf", random_model(llama_config()), tensors=extra)
    with pytest.raises(UnsupportedModelError, match=r"'blk\.0\.attn_sinks\.weight' has no known"):
        open_checkpoint(resolve_model(str(path)))


def test_derived_tensors_are_passed_over() -> None:
    names = ["rope_freqs.weight", "blk.0.attn_rot_embd.weight", "output.weight"]
    shapes = dict.fromkeys(names, (4, 4))
    found = hf_tensors(shapes, "llama", ROWS["llama"])
    assert found == {"lm_head.weight": StoredTensor("output.weight")}


def test_rows_of_a_merged_weight_can_be_filled(tmp_path: Path) -> None:
    model = random_model(llama_config())
    path = write_gguf(tmp_path / "x.gguf", model)
    merged = torch.full((64 + 32 + 32, 64), torch.nan, dtype=torch.bfloat16)
    layer = "model.layers.1.self_attn."
    with open_checkpoint(resolve_model(str(path))) as checkpoint:
        checkpoint.read_into(f"{layer}q_proj.weight", merged[:64])
        checkpoint.read_into(f"{layer}k_proj.weight", merged[64:96])
        checkpoint.read_into(f"{layer}v_proj.weight", merged[96:])
    state = model.state_dict()
    expected = torch.cat([state[f"{layer}{kind}_proj.weight"] for kind in "qkv"])
    assert torch.equal(merged, expected.bfloat16())


def test_wrong_names_and_shapes_are_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", random_model(llama_config()))
    with open_checkpoint(resolve_model(str(path))) as checkpoint:
        with pytest.raises(CheckpointError, match=r"Did you mean 'model\.norm\.weight'"):
            checkpoint.read_into("model.norms.weight", torch.empty(64))
        with pytest.raises(CheckpointError, match=r"x\.gguf.*q_proj.*\(64, 64\).*\(128, 32\)"):
            checkpoint.read_into("model.layers.0.self_attn.q_proj.weight", torch.empty(128, 32))
    with pytest.raises(CheckpointError, match="was closed"):
        checkpoint.read_into("model.norm.weight", torch.empty(64))


def test_closing_the_checkpoint_leaves_the_metadata(tmp_path: Path) -> None:
    files = resolve_model(str(write_gguf(tmp_path / "x.gguf", random_model(llama_config()))))
    open_checkpoint(files).close()
    assert isinstance(files.gguf, GGUFFile)
    assert files.gguf.raw("output_norm.weight").size == 256
    assert len(read_all(files.path)) == 20


EOS = "tokenizer.ggml.eos_token_id"


@pytest.mark.parametrize(
    ("metadata", "token_ids"),
    [
        ({}, (2,)),
        ({"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 6}, (2, 5, 6)),
        ({"tokenizer.ggml.eot_token_id": 2}, (2,)),
        ({"tokenizer.ggml.eot_token_id": 2**32 - 1}, (2,)),
        ({"tokenizer.ggml.eot_token_id": -1}, (2,)),
    ],
)
def test_eos_token_ids(
    tmp_path: Path, metadata: dict[str, Any], token_ids: tuple[int, ...]
) -> None:
    path = write_gguf(tmp_path / "x.gguf", random_model(llama_config()), metadata=metadata)
    assert resolve_model(str(path)).eos_token_ids == token_ids


def test_an_unnamed_end_of_turn_is_recognised_among_control_tokens(tmp_path: Path) -> None:
    # Of the two, id 1 is of the control type; id 5 is ordinary text that looks like it.
    tokens = list(TOKENS)
    tokens[1], tokens[5] = "<|end|>", "<|im_end|>"
    path = write_gguf(tmp_path / "x.gguf", random_model(llama_config()), tokens=tokens)
    assert resolve_model(str(path)).eos_token_ids == (2, 1)


@pytest.mark.slow
@pytest.mark.demo_model
def test_demo_model_loads_as_in_transformers(demo_gguf: Path) -> None:
    assert_same_weights(read_all(demo_gguf, torch.bfloat16), loaded_by_transformers(demo_gguf))


@pytest.mark.demo_model
def test_demo_model_resolves_and_opens(demo_gguf: Path) -> None:
    files = resolve_model("smollm2-135m")
    assert (files.kind, files.path, files.weight_files) == ("gguf", demo_gguf, (demo_gguf,))
    assert files.eos_token_ids == (2,)
    with open_checkpoint(files) as checkpoint:
        shapes = checkpoint.names() or {}
    config = AutoConfig.for_model(**files.config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    del expected["lm_head.weight"]
    assert dict(shapes) == expected
