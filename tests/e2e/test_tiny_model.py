"""Whatever the schedule, greedy answers are those of transformers, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine import Engine, SamplingParams

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    shared = torch.randint(3, 300, (70,), generator=generator).tolist()
    lengths = [1, 2, 15, 16, 17, 33, 64, 65, 100]
    plain = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in lengths]
    with_prefix = [shared + torch.randint(3, 300, (n,), generator=generator).tolist()
                   for n in (1, 5, 40)]  # fmt: skip
    return plain + with_prefix


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
    "default": {},
    "one at a time": {"max_num_seqs": 1},
    "chunks of 7": {"max_num_batched_tokens": 7},
    "chunks of 64": {"max_num_batched_tokens": 64},
    "no prefix cache": {"enable_prefix_caching": False},
    "tiny cache": {"num_kv_blocks": 10, "block_size": 16, "max_model_len": 140},
    "large blocks": {"block_size": 128},
    "in a process": {"placement": "process"},
    "tiny cache in a process": {
        "num_kv_blocks": 10,
        "block_size": 16,
        "max_model_len": 140,
        "placement": "process",
    },
}


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_greedy_equals_transformers(
    tiny_llama: Path, prompts: list[list[int]], expected: list[list[int]], schedule: str
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    options = {"max_num_seqs": 8, **SCHEDULES[schedule]}
    with Engine(str(tiny_llama), device="cpu", num_threads=1, **options) as engine:
        for _ in range(2):  # the second time from the prefix cache
            outputs = engine.generate(prompts, params)
            assert [output.outputs[0].token_ids for output in outputs] == expected
        stats = engine.stats()
        assert stats.kv_blocks_used == 0
        if schedule.startswith("tiny cache"):
            assert stats.preemptions > 0
        if schedule == "default":
            assert stats.prefix_hit_tokens > 0
            assert stats.peak_running == 8


def test_n_answers_share_the_prompt(
    tiny_llama: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, n=4)
    for caching in (True, False):
        with Engine(
            str(tiny_llama), device="cpu", num_threads=1, enable_prefix_caching=caching
        ) as engine:
            output = engine.generate(prompts[8], params)
            assert [answer.token_ids for answer in output.outputs] == [expected[8]] * 4
            # 100 prompt tokens: three answers find one block of 64.
            assert engine.stats().prefix_hit_tokens == 3 * 64


@pytest.mark.parametrize("placement", ["thread", "process"])
def test_logprobs_equal_transformers(
    tiny_llama: Path, prompts: list[list[int]], placement: str
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    params = SamplingParams(
        temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=2
    )
    options = {"num_threads": 1, "max_num_batched_tokens": 30, "placement": placement}
    with Engine(str(tiny_llama), device="cpu", **options) as engine:
        outputs = engine.generate(prompts[3:9], params)
    for output in outputs:
        answer = output.outputs[0]
        ids = output.prompt_token_ids + answer.token_ids
        with torch.inference_mode():
            rows = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
        assert output.prompt_logprobs is not None
        assert answer.logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
        assert len(answer.logprobs) == 6
        reported = [*output.prompt_logprobs[1:], *answer.logprobs]
        for position, (at, token_id) in enumerate(zip(reported, ids[1:], strict=True)):
            assert at is not None
            row = rows[position]
            assert at[token_id].rank == int((row > row[token_id]).sum()) + 1
            for other, logprob in at.items():
                assert abs(logprob.logprob - float(row[other])) < 1e-4
            top = row.topk(2).indices.tolist()
            assert set(top) <= set(at)
        assert answer.cumulative_logprob == pytest.approx(
            sum(at[i].logprob for at, i in zip(answer.logprobs, answer.token_ids, strict=True))
        )
