"""Engines whose KV cache has 8 bits: same answers whatever the schedule, near those without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_driver import PagedDriver
from model_zoo import hf_model
from other_models import other_model
from tiny_checkpoints import VOCAB_SIZE, write_byte_tokenizer

from engine import ConfigError, Engine, SamplingParams
from engine.build import resolve_kv_cache_dtype
from engine.loader.checkpoint import open_checkpoint
from engine.loader.resolve import resolve_model
from engine.models.decoder import Decoder
from engine.models.registry import decoder_config

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
NAMES = ("int8", "fp8")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    shared = torch.randint(3, 300, (70,), generator=generator).tolist()
    plain = [
        torch.randint(3, 300, (n,), generator=generator).tolist() for n in (2, 16, 17, 33, 65, 100)
    ]
    return [*plain, *(shared + plain[index] for index in (0, 1, 3))]


def answers(folder: Path, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """Greedy answers, twice the same: the second time behind the prefix cache."""
    with Engine(str(folder), **{"device": "cpu", "num_threads": 1, **options}) as engine:
        first, second = (engine.generate(prompts, GREEDY) for _ in range(2))
        stats = engine.stats()
        assert stats.kv_blocks_used == 0
        if options.get("num_kv_blocks"):
            assert stats.preemptions > 0
        elif options.get("enable_prefix_caching", True):
            assert stats.prefix_hit_tokens > 0
    found = [list(out.outputs[0].token_ids) for out in first]
    assert [list(out.outputs[0].token_ids) for out in second] == found
    return found


SCHEDULES: dict[str, dict[str, Any]] = {
    "one at a time": {"max_num_seqs": 1},
    "chunks of 64": {"max_num_batched_tokens": 64},
    "no prefix cache": {"enable_prefix_caching": False},
    "tiny cache": {"num_kv_blocks": 10, "block_size": 16, "max_model_len": 140},
    "in a process": {"placement": "process"},
}


@pytest.mark.parametrize("name", NAMES)
def test_schedules_never_change_an_answer(
    tiny_llama: Path, prompts: list[list[int]], name: str
) -> None:
    want = answers(tiny_llama, prompts, kv_cache_dtype=name)
    assert want != answers(tiny_llama, prompts), "eight bits leave no trace"
    for schedule, options in SCHEDULES.items():
        found = answers(tiny_llama, prompts, kv_cache_dtype=name, **options)
        assert found == want, schedule


@pytest.mark.parametrize("name", NAMES)
def test_the_same_memory_has_nearly_twice_the_blocks(tiny_llama: Path, name: str) -> None:
    sizes = {"device": "cpu", "dtype": "bfloat16", "kv_cache_memory_bytes": 4 << 20}
    blocks, num_bytes = [], []
    for dtype in ("auto", name):
        with Engine(str(tiny_llama), kv_cache_dtype=dtype, **sizes) as engine:
            blocks.append(engine.stats().kv_blocks_total)
            num_bytes.append(engine.stats().kv_cache_bytes)
    # 16 entries a head: 32 bytes, or 16 and a scale of 4.
    assert blocks[1] / blocks[0] == pytest.approx(32 / 20, rel=0.01)
    assert num_bytes[1] == pytest.approx(num_bytes[0], rel=0.01)


@pytest.mark.parametrize("family", ["gpt-oss", "deepseek-v2", "gemma3", "llama4"])
def test_families_run_over_eight_bits(tmp_path: Path, family: str) -> None:
    """Sinks, chunks, windows and padded values: near the same engine over float32."""
    hf_model(family, vocab_size=VOCAB_SIZE).save_pretrained(tmp_path)
    write_byte_tokenizer(tmp_path)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, 300, (90,), generator=generator).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    found = []
    for name in ("auto", "int8"):
        with Engine(
            str(tmp_path), device="cpu", dtype="float32", num_threads=1, kv_cache_dtype=name
        ) as engine:
            out = engine.generate(prompt, params)
            assert out.prompt_logprobs is not None
            rows = zip(out.prompt_logprobs[1:], prompt[1:], strict=True)
            found.append(torch.tensor([row[token].logprob for row, token in rows if row]))
    # The mean alone has room for a token that chooses another expert.
    error = (found[0] - found[1]).abs()
    assert 1e-6 < error.median() < 0.02
    assert error.mean() < 0.05


def test_models_in_transformers_code(tmp_path: Path) -> None:
    other_model("arcee", vocab_size=VOCAB_SIZE).save_pretrained(tmp_path)
    write_byte_tokenizer(tmp_path)
    prompt = list(range(5, 90))
    exact, rounded = (
        answers(tmp_path, [prompt], dtype="float32", kv_cache_dtype=name)
        for name in ("auto", "int8")
    )
    assert exact[0][:4] == rounded[0][:4]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("int4", "kv_cache_dtype='int4' must be one of 'auto', 'fp8', 'int8'"),
        ("fp8_e5m2", "kv_cache_dtype='fp8_e5m2'"),
        (torch.int8, "kv_cache_dtype=torch.int8"),
        (None, "kv_cache_dtype=None"),
    ],
)
def test_other_values_are_refused(tiny_llama: Path, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine(str(tiny_llama), device="cpu", kv_cache_dtype=value)


def test_engines_that_keep_no_cache_refuse_it(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="keeps no KV cache"):
        Engine(str(tiny_llama), device="cpu", task="embed", kv_cache_dtype="int8")


def test_old_gpus_refuse_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(ConfigError, match=r"needs a GPU of compute capability 8\.9 .* has 8\.0"):
        resolve_kv_cache_dtype("fp8", torch.bfloat16, device)
    assert resolve_kv_cache_dtype("int8", torch.bfloat16, device) is torch.int8
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    assert resolve_kv_cache_dtype("fp8", torch.bfloat16, device) is torch.float8_e4m3fn


@pytest.mark.demo_model
def test_the_demo_model_loses_little(demo_model: str) -> None:
    """Logits of an answer against those over a float32 cache; see docs/KERNELS.md for more."""
    files = resolve_model(demo_model)
    decoder = Decoder(decoder_config(files.config), torch.device("cpu"), torch.float32)
    with open_checkpoint(files) as checkpoint:
        decoder.load(checkpoint)
    with Engine(demo_model, device="cpu", dtype="float32", num_threads=1) as engine:
        prompt = engine.apply_chat_template(
            [{"role": "user", "content": "Explain photosynthesis to a child."}]
        )
        answer = engine.generate(
            list(prompt), SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
        )
    ids = [*prompt, *answer.outputs[0].token_ids]
    found = {}
    for dtype in (None, torch.int8, torch.float8_e4m3fn):
        driver = PagedDriver(
            decoder, num_blocks=8, block_size=64, num_layers=30, kv_cache_dtype=dtype
        )
        [logits] = driver.step([(driver.add(ids), len(ids) - 1)])
        found[dtype] = logits[-48:].log_softmax(-1)
    want = found[None]
    for dtype, most in ((torch.int8, 0.005), (torch.float8_e4m3fn, 0.02)):
        divergence = (want.exp() * (want - found[dtype])).sum(-1)
        assert 0 < divergence.mean() < most
        same = (want.argmax(-1) == found[dtype].argmax(-1)).float().mean()
        assert same > 0.9
