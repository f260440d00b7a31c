"""The whole engine on a GPU: CUDA graphs, steps in flight, sampling, memory given back."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine import Engine, SamplingParams, StepError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NEW_TOKENS = 40
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    shared = torch.randint(3, 300, (70,), generator=generator).tolist()
    lengths = [1, 2, 15, 16, 17, 63, 64, 65, 100, 300]
    plain = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in lengths]
    return plain + [shared + [5 + n] * n for n in (1, 5, 40)]


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, prompts: list[list[int]]) -> list[list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


SCHEDULES: dict[str, dict[str, Any]] = {
    "graphs": {},
    "eager": {"enforce_eager": True},
    "batch invariant": {"batch_invariant": True},
    "one at a time": {"max_num_seqs": 1},
    "chunks of 7": {"max_num_batched_tokens": 7},
    "tiny cache": {"num_kv_blocks": 12, "block_size": 32, "max_model_len": 350},
    "blocks of 16": {"block_size": 16},
    "in a process": {"placement": "process"},
}


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_greedy_equals_transformers(
    tiny_llama: Path, prompts: list[list[int]], expected: list[list[int]], schedule: str
) -> None:
    options = {
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": None if schedule == "tiny cache" else 64 << 20,
        **SCHEDULES[schedule],
    }
    with Engine(str(tiny_llama), device="cuda", dtype="float32", **options) as engine:
        for _ in range(2):
            outputs = engine.generate(prompts, GREEDY)
            assert [output.outputs[0].token_ids for output in outputs] == expected
        assert engine.stats().kv_blocks_used == 0
        if schedule == "tiny cache":
            assert engine.stats().preemptions > 0


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_schedules_over_eight_bits(tiny_llama: Path, prompts: list[list[int]], name: str) -> None:
    """Graphs and eager steps agree in every token, and with a CPU nearly in all first ones."""
    found = []
    cuda = {"device": "cuda", "batch_invariant": True}
    for options in (cuda, {**cuda, "enforce_eager": True}, {"device": "cpu"}):
        with Engine(
            str(tiny_llama),
            dtype="float32",
            kv_cache_dtype=name,
            max_num_seqs=8,
            kv_cache_memory_bytes=64 << 20,
            **options,
        ) as engine:
            outs = engine.generate(prompts, GREEDY)
            again = engine.generate(prompts, GREEDY)
            found.append([out.outputs[0].token_ids for out in outs])
            assert [out.outputs[0].token_ids for out in again] == found[-1]
            assert engine.stats().kv_blocks_used == 0
    assert found[0] == found[1]
    firsts = [(one[0], other[0]) for one, other in zip(found[0], found[2], strict=True)]
    assert sum(one == other for one, other in firsts) >= len(firsts) - 1


def test_sampling_options_in_one_batch(tiny_llama: Path, prompts: list[list[int]]) -> None:
    """Rows with all kinds of settings side by side, twice: seeded rows repeat."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 0.7, "min_p": 0.1, "repetition_penalty": 1.3},
        {"temperature": 0.0, "logit_bias": {50: 5.0}, "frequency_penalty": 0.5},
        {"temperature": 1.0, "logprobs": 3, "prompt_logprobs": 2},
        {"temperature": 0.0, "stop_token_ids": [60], "min_tokens": 4},
        {"temperature": 1.0, "n": 3},
        {"temperature": 1.0, "bad_words": ["the", "in the"]},
    ]
    params = [
        SamplingParams(max_tokens=30, ignore_eos=True, seed=index, **kind)
        for index, kind in enumerate(kinds)
    ]
    with Engine(
        str(tiny_llama),
        device="cuda",
        dtype="float32",
        batch_invariant=True,
        kv_cache_memory_bytes=64 << 20,
        max_num_seqs=32,
    ) as engine:
        batched = engine.generate([prompts[5]] * len(params), params)
        alone = [engine.generate(prompts[5], one) for one in params]
    for together, single in zip(batched, alone, strict=True):
        assert [a.token_ids for a in together.outputs] == [a.token_ids for a in single.outputs]
    assert batched[6].prompt_logprobs is not None
    assert len(batched[6].prompt_logprobs) == len(prompts[5])


def test_steps_are_captured_and_allocate_nothing(tiny_llama: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=300, ignore_eos=True)
    with Engine(str(tiny_llama), device="cuda", kv_cache_memory_bytes=64 << 20) as engine:
        prompts = [[5 + index] * (1 + 3 * index) for index in range(20)]
        expected = engine.generate(prompts, params)
        assert engine._host.parts is not None
        model = engine._host.parts.model

        def not_again(*args: Any) -> torch.Tensor:
            raise AssertionError("a step ran eagerly or was captured late")

        model.forward = not_again  # type: ignore[assignment, method-assign]
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        outputs = engine.generate(prompts, params)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        for output, first in zip(outputs, expected, strict=True):
            assert output.outputs[0].token_ids == first.outputs[0].token_ids


def test_a_busy_application_thread_changes_no_result(tiny_llama: Path) -> None:
    """Deep launch-ahead beside a spinning thread: same tokens, also where stop ids end early."""
    params = [
        SamplingParams(temperature=0.9, seed=index, max_tokens=60, stop_token_ids=[60 + index])
        for index in range(24)
    ]
    prompts = [[5 + index, 7] for index in range(24)]
    spins = threading.Event()

    def spin() -> None:
        while not spins.is_set():
            sum(range(200))

    with Engine(
        str(tiny_llama), device="cuda", dtype="float32", kv_cache_memory_bytes=64 << 20
    ) as engine:
        quiet = engine.generate(prompts, params)
        threads = [threading.Thread(target=spin) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            busy = engine.generate(prompts, params)
        finally:
            spins.set()
            for thread in threads:
                thread.join()
        assert engine.stats().kv_blocks_used == 0
    for one, other in zip(quiet, busy, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.outputs[0].finish_reason == other.outputs[0].finish_reason


def test_streams_and_aborts(tiny_llama: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    with Engine(str(tiny_llama), device="cuda", kv_cache_memory_bytes=64 << 20) as engine:
        whole = engine.generate([5, 6, 7], params).outputs[0]
        deltas = list(engine.submit([5, 6, 7], params))
        assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
        handles = engine.submit_many([[5, 6, 7 + i] for i in range(32)], params)
        for handle in handles[::2]:
            handle.abort()
        reasons = [handle.result().outputs[0].finish_reason for handle in handles]
        assert reasons[1::2] == ["length"] * 16
        assert engine.stats().kv_blocks_used == 0


def test_an_out_of_memory_step_ends_its_requests_only(tiny_llama: Path) -> None:
    with Engine(str(tiny_llama), device="cuda", kv_cache_memory_bytes=64 << 20) as engine:
        expected = engine.generate([5, 6, 7], GREEDY).outputs[0].token_ids
        assert engine._host.parts is not None
        model = engine._host.parts.model
        forward = model.forward

        def exhausted(*args: Any) -> torch.Tensor:
            del model.forward  # type: ignore[attr-defined]
            return torch.empty(1 << 44, device="cuda")

        model.forward = exhausted  # type: ignore[assignment, method-assign]
        # Captured steps allocate nothing; one that wants the prompt's logits runs eagerly.
        eagerly = SamplingParams(max_tokens=4, prompt_logprobs=1)
        with pytest.raises(StepError, match="out of memory"):
            engine.generate([5, 6, 7], eagerly)
        assert model.forward == forward
        assert engine.generate([5, 6, 7], GREEDY).outputs[0].token_ids == expected


def test_close_gives_the_memory_back(tiny_llama: Path) -> None:
    def free_bytes() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    with Engine(str(tiny_llama), device="cuda", kv_cache_memory_bytes=1 << 20) as engine:
        engine.generate([5], GREEDY)
    before = free_bytes()
    for _ in range(2):
        engine = Engine(str(tiny_llama), device="cuda", gpu_memory_utilization=0.5)
        engine.generate([5], GREEDY)
        assert before - free_bytes() > 10 << 30
        engine.close()
        assert before - free_bytes() < 100 << 20
