"""`quantization=` through the engine and both frameworks' classes, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf.constants import GGMLQuantizationType
from loader_files import llama_config, random_model, write_gguf
from tiny_encoders import write_encoder, write_wordpiece

from engine import ConfigError, Engine, EngineConfig, SamplingParams, UnsupportedModelError
from engine.config import QUANTIZATIONS

OPTIONS = {"device": "cpu", "num_threads": 1, "num_kv_blocks": 8}


def scored(model: Path, **options: object) -> tuple[list[float], int]:
    """Log-probabilities of a prompt's tokens, and the bytes of the weights."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    with Engine(str(model), **OPTIONS, **options) as engine:
        prompt = engine.tokenizer.encode("the way of one request")
        output = engine.generate(prompt, params)
        assert output.prompt_logprobs is not None
        pairs = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
        found = [entry[token].logprob for token, entry in pairs if entry is not None]
        assert len(found) == len(prompt) - 1
        return found, engine.stats().weight_bytes


def test_less_memory_costs_more_error(tiny_llama: Path) -> None:
    plain, plain_bytes = scored(tiny_llama)
    errors, sizes = {}, {}
    for name in QUANTIZATIONS:
        rounded, sizes[name] = scored(tiny_llama, quantization=name)
        errors[name] = sum(abs(a - b) for a, b in zip(plain, rounded, strict=True)) / len(plain)
    # float32 is 32 bits, and the output projection always has 8.
    assert sizes["int4"] < sizes["int8"] == sizes["fp8"] < 0.27 * plain_bytes
    assert 0.0 < errors["int8"] < errors["fp8"] < errors["int4"]


def test_random_weights_are_rounded_too(tiny_llama: Path) -> None:
    with Engine(str(tiny_llama), load_format="dummy", quantization="int4", **OPTIONS) as engine:
        outputs = engine.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=4))
        assert len(outputs[0].outputs[0].token_ids) == 4


def test_what_cannot_be_honoured_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="'int4', 'int8', 'fp8'"):
        EngineConfig(model="m", quantization="int2")
    q8_0 = GGMLQuantizationType.Q8_0
    path = write_gguf(tmp_path / "m.gguf", random_model(llama_config()), ggml_type=q8_0)
    with pytest.raises(ConfigError, match="quantised already"):
        Engine(str(path), tokenizer=str(tiny_llama), quantization="int8", **OPTIONS)
    encoder = tmp_path / "encoder"
    write_encoder(encoder)
    write_wordpiece(encoder)
    with pytest.raises(ConfigError, match="embeds or scores"):
        Engine(str(encoder), quantization="int8", device="cpu")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    config = json.loads((tiny_llama / "config.json").read_text())
    config |= {"architectures": ["NemotronForCausalLM"], "model_type": "nemotron"}
    (foreign / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="runs through transformers"):
        Engine(str(foreign), quantization="int8", load_format="dummy", **OPTIONS)


def test_frameworks_pass_it_on(tiny_llama: Path) -> None:
    langchain = pytest.importorskip("llm_connectors.langchain")
    options = {**OPTIONS, "quantization": "int8", "max_num_seqs": 4}
    model = langchain.LocalLLM(model=str(tiny_llama), engine_kwargs=options, max_tokens=3)
    try:
        assert isinstance(model.invoke("hello"), str)
        with Engine.shared(str(tiny_llama), **options) as engine:
            assert engine.config.quantization == "int8"
        with pytest.raises(ConfigError, match="quantization"):
            Engine.shared(str(tiny_llama), **{**options, "quantization": "int4"})
    finally:
        model.close()
