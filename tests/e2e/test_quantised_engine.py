"""An engine over a quantised checkpoint: answers, memory that is asked for, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from quantised_formats import FORMATS
from safetensors.torch import load_file, save_file
from tiny_checkpoints import write_tiny_llama

from engine import CapacityError, Engine, SamplingParams
from engine.layers.cpu_quantised import has_quick_products

PROMPT = list(range(10, 50))
MEMORY = "engine.runner.memory.available_host_bytes"


def quantised(folder: Path, name: str = "gptq-act-order") -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny Llama in codes, and the numbers they stand for."""
    write_tiny_llama(folder, hidden_size=128, intermediate_size=256, head_dim=32)
    kind = FORMATS[name]
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, torch.Tensor] = {}
    for key, weight in load_file(folder / "model.safetensors").items():
        if not key.endswith("_proj.weight"):
            tensors[key] = numbers[key] = weight
            continue
        written, numbers[key] = kind.write(weight)
        module = key.removesuffix(".weight")
        tensors |= {module + ending: value for ending, value in written.items()}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": kind.config, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, numbers


def test_greedy_answers_are_transformers_on_the_dequantised_weights(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, numbers = quantised(tmp_path / "m")
    config = LlamaConfig.from_pretrained(folder)
    del config.quantization_config
    model = LlamaForCausalLM(config).float()
    model.load_state_dict(numbers, strict=False)
    with torch.no_grad():
        answer = model.generate(
            torch.tensor([PROMPT]), max_new_tokens=16, do_sample=False, eos_token_id=None
        )
    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    with Engine(str(folder), device="cpu", dtype="float32") as engine:
        found = engine.generate(PROMPT, params).outputs[0].token_ids
    assert list(found) == answer[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize(("free", "said"), [(1 << 10, "0.00"), (1 << 30, "1.00")])
def test_too_large_a_model_is_refused_by_what_weights_and_cache_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, said: str
) -> None:
    """Too large for the weights alone, and for the cache beside them."""
    folder, _ = quantised(tmp_path / "m")
    monkeypatch.setattr(MEMORY, lambda: free)
    with pytest.raises(CapacityError) as caught:
        Engine(str(folder), device="cpu", dtype="float32", kv_cache_memory_bytes=3 << 29)
    message = str(caught.value)
    assert f"this machine has {said} GiB free" in message
    assert "and the smallest KV cache 1.50 GiB" in message


@pytest.mark.skipif(
    not has_quick_products(torch.bfloat16), reason="no quick products for quantised weights here"
)
def test_the_room_in_which_prompts_expand_a_weight_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for all layers, as large as gate and up: 2 bytes a number, and half a byte of codes."""
    folder, _ = quantised(tmp_path / "m")
    sizes = {"num_kv_blocks": 4, "block_size": 16, "max_model_len": 40}
    with Engine(str(folder), device="cpu", **sizes) as engine:
        needed = engine.stats().weight_bytes + 4 * 16 * 2 * 2 * 2 * 32 * 2 + 2 * 256 * 128 * 5 // 2
    monkeypatch.setattr(MEMORY, lambda: needed)
    Engine(str(folder), device="cpu", **sizes).close()
    monkeypatch.setattr(MEMORY, lambda: needed - 1)
    with pytest.raises(CapacityError):
        Engine(str(folder), device="cpu", **sizes)


@pytest.mark.skipif(
    not has_quick_products(torch.bfloat16), reason="no quick products for quantised weights here"
)
def test_where_memory_is_short_weights_stay_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """NF4 has no quick product in 4 bits: 8 bits a weight if there is room, else 4."""
    folder, numbers = quantised(tmp_path / "m", "nf4")
    in_codes = sum(w.numel() for key, w in numbers.items() if key.endswith("_proj.weight"))
    others = sum(w.numel() for key, w in numbers.items() if not key.endswith("_proj.weight"))
    tied = numbers["model.embed_tokens.weight"].numel()
    sizes = {"num_kv_blocks": 4, "block_size": 16, "max_model_len": 40}
    kv = 4 * 16 * 2 * 2 * 2 * 32 * 2
    plain_bytes = 2 * (others + tied) + kv
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    weight_bytes = {}
    for name, free in (("quick", plain_bytes + in_codes), ("small", plain_bytes + in_codes - 1)):
        monkeypatch.setattr(MEMORY, lambda free=free: free)
        with (
            caplog.at_level(logging.WARNING, logger="engine"),
            Engine(str(folder), device="cpu", **sizes) as engine,
        ):
            assert bool("weights stay packed" in caplog.text) == (name == "small")
            assert len(engine.generate(PROMPT[:20], params).outputs[0].token_ids) == 4
            weight_bytes[name] = engine.stats().weight_bytes
    assert weight_bytes["quick"] == plain_bytes - kv + in_codes
    # 4 bits, and a scale of 2 bytes for 64.
    assert weight_bytes["small"] == plain_bytes - kv + in_codes // 2 + in_codes // 64 * 2


def test_an_embedding_model_in_codes_is_expanded_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, numbers = quantised(tmp_path / "m")
    with (
        caplog.at_level(logging.WARNING, logger="engine"),
        Engine(str(folder), device="cpu", dtype="float32", task="embed") as engine,
    ):
        vector = engine.embed([PROMPT])[0]
    assert "are in codes and will be expanded to plain numbers" in caplog.text
    plain = tmp_path / "plain"
    write_tiny_llama(plain, hidden_size=128, intermediate_size=256, head_dim=32)
    save_file(numbers, plain / "model.safetensors")
    with Engine(str(plain), device="cpu", dtype="float32", task="embed") as engine:
        expected = engine.embed([PROMPT])[0]
    assert vector == pytest.approx(expected, abs=1e-6)
