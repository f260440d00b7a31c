"""Bad input gets a typed error that names value, limit and way out, and disturbs nobody."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoints import write_tiny_llama

from engine import (
    LLM,
    CapacityError,
    CheckpointError,
    ConfigError,
    ContextOverflowError,
    Engine,
    EngineError,
    ModelNotFoundError,
    RequestError,
    SamplingParams,
    UnsupportedModelError,
)

USER = {"role": "user", "content": "in"}

BAD_REQUESTS: dict[str, tuple[Callable[[Engine], Any], type[EngineError], str]] = {
    "empty text": (lambda e: e.submit(""), RequestError, "prompt is empty"),
    "empty ids": (lambda e: e.submit([]), RequestError, "prompt is empty"),
    "id too large": (lambda e: e.submit([1, 300]), RequestError, r"prompt\[1\]=300 .* 0 to 299"),
    "id negative": (lambda e: e.submit([-1]), RequestError, r"prompt\[0\]=-1"),
    "id huge": (lambda e: e.submit([2**70]), RequestError, "token id"),
    "floats": (lambda e: e.submit([1.5]), RequestError, "integer token ids"),
    "bools": (lambda e: e.submit([True]), RequestError, "integer token ids"),
    "a float among ids": (lambda e: e.submit([1, 2.0]), RequestError, "integer token ids"),
    "nested": (lambda e: e.submit([[1], [2, 3]]), RequestError, "flat list"),
    "bytes": (lambda e: e.submit(b"abc"), RequestError, "got bytes"),
    "None": (lambda e: e.submit(None), RequestError, "got NoneType"),
    "lone surrogate": (lambda e: e.submit("a\ud800b"), RequestError, "surrogate"),
    "too long": (lambda e: e.submit([5] * 600), ContextOverflowError, r"600.*512"),
    "too many new": (
        lambda e: e.submit([5] * 500, SamplingParams(max_tokens=100)),
        ContextOverflowError,
        r"500.*100.*512",
    ),
    "params of another kind": (lambda e: e.submit([5], {"n": 1}), RequestError, "got dict"),
    "stop id out of range": (
        lambda e: e.submit([5], SamplingParams(stop_token_ids=[300])),
        RequestError,
        "300",
    ),
    "bias out of range": (
        lambda e: e.submit([5], SamplingParams(logit_bias={999: 1.0})),
        RequestError,
        "999",
    ),
    "priority": (lambda e: e.submit([5], priority="high"), RequestError, "priority='high'"),
    "lengths differ": (
        lambda e: e.generate([[5], [6]], [SamplingParams()]),
        RequestError,
        "1 SamplingParams were given for 2 prompts",
    ),
    "unknown role": (
        lambda e: e.chat([{"role": "wizard", "content": "x"}]),
        RequestError,
        "wizard",
    ),
    "image block": (
        lambda e: e.chat([{"role": "user", "content": [{"type": "image", "url": "x"}]}]),
        RequestError,
        "image",
    ),
    "no content": (lambda e: e.chat([{"role": "user"}]), RequestError, "content"),
    "no messages": (lambda e: e.chat([]), RequestError, "empty|at least one"),
    "broken template": (
        lambda e: e.chat([USER], chat_template="{% for %}"),
        EngineError,
        "template",
    ),
    "refusing template": (
        lambda e: e.chat([USER], chat_template="{{ raise_exception('only cats') }}"),
        RequestError,
        "only cats",
    ),
}


@pytest.mark.parametrize("case", list(BAD_REQUESTS))
def test_bad_requests(eng: Engine, case: str) -> None:
    call, error, message = BAD_REQUESTS[case]
    beside = eng.submit([7, 8], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
    with pytest.raises(error, match=message) as caught:
        call(eng)
    assert isinstance(caught.value, EngineError)
    assert len(beside.result(timeout=30).outputs[0].token_ids) == 8


def test_one_bad_prompt_of_many_starts_none(eng: Engine) -> None:
    before = eng.stats().prompt_tokens
    with pytest.raises(RequestError, match=r"prompt\[0\]=999") as caught:
        eng.generate([[5], [999], [6]])
    assert "This was prompt 1 of 3." in caught.value.__notes__
    assert eng.stats().prompt_tokens == before


def test_nul_and_strange_text_are_text(eng: Engine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    for text in ("\x00", "a\x00b", "\u202e", "<|im_end|>", "😀" * 3):
        output = eng.generate(text, params)
        assert eng.detokenize(output.prompt_token_ids, skip_special_tokens=False).endswith(text)
        assert 2 not in output.prompt_token_ids
    assert 2 in eng.submit("<|im_end|>", params, parse_special=True).result().prompt_token_ids


def test_ids_of_any_integers_come_back_as_plain_ones(eng: Engine) -> None:
    prompts = [[5, 6], (5, 6), np.array([5, 6]), [np.int64(5), 6], [5, np.int32(6)]]
    for output in eng.generate(prompts, SamplingParams(max_tokens=1)):
        assert output.prompt_token_ids == [5, 6]
        assert {type(token_id) for token_id in output.prompt_token_ids} == {int}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": -0.1}, r"temperature=-0.1 must be in \[0.0"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": "hot"}, "temperature='hot' must be a number"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0.0, 1.0\]"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k=-2 must be >= -1"),
        ({"min_p": 2}, "min_p=2"),
        ({"max_tokens": 0}, "max_tokens=0 must be >= 1"),
        ({"max_tokens": -5}, "max_tokens=-5"),
        ({"max_tokens": 1.5}, "max_tokens=1.5 must be an integer"),
        ({"max_tokens": True}, "max_tokens=True must be an integer"),
        ({"min_tokens": 20}, "min_tokens=20 is larger than max_tokens=16"),
        ({"n": 0}, "n=0"),
        ({"seed": 1.0}, "seed=1.0"),
        ({"stop": [""]}, "stop must hold non-empty strings"),
        ({"stop": [1]}, "stop must hold non-empty strings"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids='x'"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"presence_penalty": 3}, "presence_penalty=3"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"logprobs": 5000}, "logprobs=5000"),
        ({"ignore_eos": 1}, "ignore_eos=1 must be True or False"),
        ({"max_token": 5}, "Unknown sampling parameter 'max_token'. Did you mean 'max_tokens'?"),
    ],
)
def test_bad_sampling_params(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message.replace("?", r"\?")):
        SamplingParams.from_kwargs(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int3"}, "dtype='int3'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"device": "cuda:99"}, "device='cuda:99' was asked for, but"),
        ({"max_model_len": 0}, "max_model_len=0"),
        ({"max_model_len": 10_000}, "max_model_len=10000 is more than the 512 positions"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization=1.5"),
        ({"block_size": 24}, "block_size=24 must be a power of two"),
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"max_seqs": 3}, "Unknown engine option 'max_seqs'. Did you mean 'max_num_seqs'?"),
        ({"num_kv_blocks": 4, "kv_cache_memory_bytes": 4}, "Give one"),
        ({"placement": "moon"}, "placement='moon' must be one of 'thread', 'process'"),
        ({"max_model_len": 10_000, "placement": "process"}, "more than the 512 positions"),
    ],
)
def test_bad_configs(tiny_llama: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        Engine(str(tiny_llama), **{"device": "cpu", **options})


@pytest.mark.parametrize("placement", ["thread", "process"])
def test_a_request_that_never_fits_the_cache(tiny_llama: Path, placement: str) -> None:
    sizes = {"num_kv_blocks": 4, "block_size": 16, "max_model_len": 200}
    with Engine(str(tiny_llama), device="cpu", placement=placement, **sizes) as engine:
        with pytest.raises(CapacityError, match="48"):
            engine.submit([5] * 40, SamplingParams(max_tokens=20))
        output = engine.generate([5] * 40, SamplingParams(max_tokens=8, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 8


# -------------------------------------------------------------------- broken models


def test_unknown_names() -> None:
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        Engine("./no-such-model")
    with pytest.raises(ConfigError, match="non-empty"):
        Engine("")


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


BROKEN_FOLDERS: dict[str, tuple[Callable[[Path], object], type[EngineError], str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), EngineError, "config.json"),
    "config is no JSON": (
        lambda p: (p / "config.json").write_text("{"),
        CheckpointError,
        "config.json",
    ),
    "no weights": (
        lambda p: (p / "model.safetensors").unlink(),
        EngineError,
        "safetensors",
    ),
    "truncated weights": (
        lambda p: (p / "model.safetensors").write_bytes(
            (p / "model.safetensors").read_bytes()[:5000]
        ),
        CheckpointError,
        "model.safetensors",
    ),
    "garbage weights": (
        lambda p: (p / "model.safetensors").write_bytes(b"garbage" * 99),
        CheckpointError,
        "model.safetensors",
    ),
    "unknown architecture": (
        lambda p: edit_config(p, architectures=["WizardForCausalLM"]),
        UnsupportedModelError,
        "WizardForCausalLM",
    ),
    "missing layer": (
        lambda p: edit_config(p, num_hidden_layers=3),
        CheckpointError,
        r"model\.layers\.2",
    ),
    "left-over layer": (
        lambda p: edit_config(p, num_hidden_layers=1),
        CheckpointError,
        r"model\.layers\.1",
    ),
    "misshapen": (
        lambda p: edit_config(p, intermediate_size=100),
        CheckpointError,
        r"100",
    ),
    "unknown quantisation": (
        lambda p: edit_config(p, quantization_config={"quant_method": "quip"}),
        UnsupportedModelError,
        r"quant_method is 'quip'; the engine runs gptq, awq, compressed-tensors",
    ),
    "quantised in config alone": (
        lambda p: edit_config(
            p, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 32}
        ),
        CheckpointError,
        "quantised with awq, but no tensor holds codes",
    ),
    "tokenizer is no JSON": (
        lambda p: (p / "tokenizer.json").write_text("{"),
        EngineError,
        "tokenizer.json",
    ),
}


# Found in the parent, found in the child, and by which of the two kinds of reader.
ALSO_IN_A_PROCESS = ("no config", "unknown architecture", "truncated weights", "misshapen")


@pytest.mark.parametrize(
    ("case", "placement"),
    [
        *[(case, "thread") for case in BROKEN_FOLDERS],
        *[(case, "process") for case in ALSO_IN_A_PROCESS],
    ],
)
def test_broken_folders(tmp_path: Path, case: str, placement: str) -> None:
    break_it, error, message = BROKEN_FOLDERS[case]
    path = write_tiny_llama(tmp_path / "model")
    break_it(path)
    with pytest.raises(error, match=message):
        Engine(str(path), device="cpu", placement=placement)


def test_llm_refuses_what_it_cannot_honour(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size=2 is not available"):
        LLM(str(tiny_llama), tensor_parallel_size=2)
    with pytest.raises(ConfigError, match=r"Unknown engine option 'max_model_length'\. Did you"):
        LLM(str(tiny_llama), max_model_length=64)


def test_the_snippet_people_write_for_vllm(tiny_llama: Path) -> None:
    llm = LLM(model=str(tiny_llama), dtype="bfloat16", tensor_parallel_size=1, device="cpu")
    outputs = llm.generate("What is the capital of France?", SamplingParams(max_tokens=50))
    assert isinstance(outputs[0].outputs[0].text, str)
    prompts = ["in the", {"prompt": "and"}, {"prompt_token_ids": [5, 6]}]
    assert len(llm.generate(prompts, SamplingParams(max_tokens=2), use_tqdm=False)) == 3
    assert llm.generate("<|im_end|>", use_tqdm=False)[0].prompt_token_ids[-1] == 2
    assert len(llm.chat([USER], use_tqdm=False)) == 1
    assert len(llm.chat([[USER], [USER]], use_tqdm=False)) == 2
    with pytest.raises(RequestError, match="prompt dict"):
        llm.generate({"text": "x"}, use_tqdm=False)
    assert llm.get_tokenizer().encode("in")
    llm.close()
