"""Models in transformers' own code over our KV cache, against the same models on their own."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_driver import PagedDriver
from model_zoo import DictCheckpoint
from other_models import OTHERS, other_model, over_paged_kv, random_model
from safetensors.torch import load_file
from tiny_checkpoints import VOCAB_SIZE, write_byte_tokenizer, write_tiny_llama

from engine import CheckpointError, ConfigError, Engine, SamplingParams, UnsupportedModelError
from engine.models.any_model import describe_model, make_model, weight_bytes
from engine.models.registry import is_native
from engine.models.transformers_config import TransformersConfig, transformers_config
from engine.models.transformers_model import TransformersModel

CPU = torch.device("cpu")


@functools.cache
def models(name: str) -> tuple[Any, TransformersModel]:
    model = other_model(name)
    return model, over_paged_kv(model)


def random_ids(num_tokens: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(211), k=num_tokens)


def own_logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0]


def own_answer(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    generated = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return generated[0, len(prompt) :].tolist()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert not ours.isnan().any()
    assert (ours - theirs).abs().max().item() < 1e-4


def driver_for(ours: TransformersModel) -> PagedDriver:
    return PagedDriver(ours, num_blocks=40, block_size=16, num_layers=ours.config.num_layers)


@pytest.mark.parametrize("name", OTHERS)
def test_prompts_chunks_decodes_and_a_cached_prefix(name: str) -> None:
    model, ours = models(name)
    driver = driver_for(ours)
    texts = [random_ids(length, seed=length) for length in (40, 33, 58)]
    want = [own_logits(model, text) for text in texts]
    first, second, chunked = (driver.add(text) for text in texts)
    whole, half = driver.step([(first, 39), (second, 20)])
    assert_close(whole, want[0][:39])
    assert_close(half, want[1][:20])

    cached_ids = texts[0][:35] + random_ids(9, seed=1)
    cached = driver.add(cached_ids, prefix_of=first)
    assert cached.num_computed_tokens == 32
    results = driver.step([(first, 1), (chunked, 25), (cached, None), (second, 12)])
    assert_close(results[0], want[0][39:40])
    assert_close(results[1], want[2][:25])
    assert_close(results[2], own_logits(model, cached_ids)[32:])
    assert_close(results[3], want[1][20:32])
    decode, rest = driver.step([(second, 1), (chunked, None)])
    assert_close(decode, want[1][32:])
    assert_close(rest, want[2][25:])


@pytest.mark.parametrize("name", OTHERS)
def test_greedy_continuation_is_the_same(name: str) -> None:
    model, ours = models(name)
    prompt = random_ids(21, seed=7)
    assert driver_for(ours).generate(prompt, 16) == own_answer(model, prompt, 16)


def test_these_are_not_the_decoders_own() -> None:
    architectures = set()
    for name in OTHERS:
        model, ours = models(name)
        config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        with pytest.raises(UnsupportedModelError):
            describe_model(config, None, trust_remote_code=False)
        architectures.add(ours.config.architecture)
    assert len(architectures) >= 15


@pytest.mark.parametrize("name", ["olmoe-clipped", "cohere-qk-norm"])
def test_what_the_decoder_lacks_goes_to_transformers(tmp_path: Path, name: str) -> None:
    """The decoder has the architecture, but not what this config asks for."""
    other_model(name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert is_native(config)
    found = describe_model(config, tmp_path, trust_remote_code=False)
    assert isinstance(found, TransformersConfig)


@pytest.mark.parametrize(
    ("config_class", "changes", "reason"),
    [
        ("BloomConfig", {"n_layer": 2, "n_head": 4}, "does not take attention functions"),
        ("MambaConfig", {}, "keeps a state"),
        ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, "other logits|keeps a state"),
        ("MiniMaxConfig", {}, "other logits|keeps a state"),
        ("DogeConfig", {}, "an attention mask of its own"),
        ("MiMoV2FlashConfig", {}, "different numbers or sizes of heads"),
    ],
)
def test_what_cannot_run_says_why(config_class: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        over_paged_kv(random_model(config_class, changes))


def test_a_window_that_does_not_reach_the_attention_is_found() -> None:
    model = random_model("NemotronConfig", {"sliding_window": 20})
    with pytest.raises(UnsupportedModelError, match="sliding window of 20 tokens"):
        over_paged_kv(model)
    assert over_paged_kv(model, max_model_len=20).config.num_layers == 2


def saved(folder: Path, name: str = "arcee") -> tuple[Any, TransformersConfig]:
    """A model with a tokenizer in a folder, and what we make of its config."""
    model = other_model(name, vocab_size=VOCAB_SIZE)
    model.save_pretrained(folder, save_original_format=False)
    write_byte_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    return model, transformers_config(config, folder, trust_remote_code=False)


@pytest.mark.parametrize("placement", ["thread", "process"])
def test_engine_answers_as_transformers_does(tmp_path: Path, placement: str) -> None:
    model, _ = saved(tmp_path)
    prompts = [random_ids(length, seed=length) for length in (5, 30, 17)]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "num_threads": 1}
    with Engine(str(tmp_path), placement=placement, **options) as eng:
        outs = eng.generate(prompts, params)
    for prompt, out in zip(prompts, outs, strict=True):
        assert list(out.outputs[0].token_ids) == own_answer(model, prompt, 8)


def test_sixteen_bits_stay_close(tmp_path: Path) -> None:
    model, config = saved(tmp_path)
    ours = TransformersModel(config, CPU, torch.bfloat16)
    ours.load(DictCheckpoint(load_file(tmp_path / "model.safetensors")))
    token_ids = random_ids(40, seed=9)
    driver = driver_for(ours)
    [logits] = driver.step([(driver.add(token_ids), None)])
    assert logits.dtype == torch.bfloat16
    want = own_logits(model, token_ids)
    theirs = own_logits(model.bfloat16(), token_ids).float()
    assert (logits.float() - want).abs().mean() < 2 * (theirs - want).abs().mean()


def test_memory_is_known_beforehand(tmp_path: Path) -> None:
    model, config = saved(tmp_path)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert weight_bytes(config, torch.bfloat16, CPU) == 2 * numbers


def test_batch_invariance_is_not_promised(tmp_path: Path) -> None:
    _, config = saved(tmp_path)
    with pytest.raises(ConfigError, match="batch_invariant=True"):
        make_model(config, CPU, torch.float32, max_model_len=None, batch_invariant=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.norm.weight"), "lacks 'model.norm.weight'"),
        (lambda state: state.update(extra=torch.zeros(1)), "has 'extra'"),
        (
            lambda state: state.update({"model.norm.weight": torch.zeros(3)}),
            r"'model.norm.weight' has shape \(3,\)",
        ),
        (
            lambda state: state.update({"model.norm.w": state.pop("model.norm.weight")}),
            "save_original_format=False",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, change: Any, message: str) -> None:
    _, config = saved(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    ours = TransformersModel(config, CPU, torch.float32)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        ours.load(DictCheckpoint(state))
    assert isinstance(caught.value, CheckpointError) == ("original_format" not in message)


def test_unknown_architecture_names_what_is_near(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, architectures=["ArceForCausalLM"], model_type="arce")
    with pytest.raises(UnsupportedModelError, match="Did you mean 'ArceeForCausalLM'"):
        Engine(str(tmp_path), device="cpu")


MODEL_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OddConfig(LlamaConfig):
    model_type = "odd"


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def forward(self, **options):
        result = super().forward(**options)
        result.logits = -result.logits
        return result
"""


def test_code_of_a_folder_runs_with_trust_alone(tmp_path: Path) -> None:
    write_tiny_llama(
        tmp_path,
        architectures=["OddForCausalLM"],
        model_type="odd",
        auto_map={
            "AutoConfig": "odd_code.OddConfig",
            "AutoModelForCausalLM": "odd_code.OddForCausalLM",
        },
    )
    marker = tmp_path / "was-run"
    (tmp_path / "odd_code.py").write_text(f"open({str(marker)!r}, 'w').close()\n{MODEL_CODE}")
    options: dict[str, Any] = {"device": "cpu", "num_threads": 1, "max_model_len": 64}
    with pytest.raises(UnsupportedModelError, match="trust_remote_code=True"):
        Engine(str(tmp_path), **options)
    assert not marker.exists()
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=1, ignore_eos=True)
    with Engine(str(tmp_path), trust_remote_code=True, **options) as eng:
        [odd] = eng.generate([[5, 6, 7]], params)
    assert marker.exists()
    config = json.loads((tmp_path / "config.json").read_text())
    del config["auto_map"]
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with Engine(str(tmp_path), **options) as eng:
        [plain] = eng.generate([[5, 6, 7]], params)
    assert odd.outputs[0].token_ids != plain.outputs[0].token_ids


def test_our_attention_tells_strangers_whose_it_is() -> None:
    models("arcee")
    stranger = other_model("arcee")
    stranger.set_attn_implementation("llm_connectors_paged")
    with pytest.raises(UnsupportedModelError, match="belongs to engines"):
        stranger(torch.tensor([[1, 2]]))


def test_chunks_in_transformers_code_are_refused() -> None:
    """They would reach no attention function, and a short probe would not notice."""
    config = over_paged_kv(other_model("arcee"))._source
    hf_config = SimpleNamespace(layer_types=["chunked_attention", "full_attention"])
    with pytest.raises(UnsupportedModelError, match="attends within chunks"):
        TransformersModel(dataclasses.replace(config, hf_config=hf_config), CPU, torch.float32)
