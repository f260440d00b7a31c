"""Whole engines on families whose parts differ most from Llama's, against transformers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from model_zoo import hf_model
from tiny_checkpoints import VOCAB_SIZE, write_byte_tokenizer

from engine import Engine, SamplingParams


@pytest.mark.parametrize(
    "family", ["gpt2", "gpt-oss", "deepseek-v2", "qwen2-moe", "falcon-groups", "llama4", "olmo3"]
)
def test_answers_of_a_shared_prefix_in_small_steps(tmp_path: Path, family: str) -> None:
    model = hf_model(family, vocab_size=VOCAB_SIZE)
    model.save_pretrained(tmp_path)
    write_byte_tokenizer(tmp_path)
    texts = random.Random(1)
    shared = texts.choices(range(VOCAB_SIZE), k=70)
    prompts = [shared + texts.choices(range(VOCAB_SIZE), k=n) for n in (1, 5, 20)]
    prompts.append(texts.choices(range(VOCAB_SIZE), k=33))
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with Engine(
        str(tmp_path),
        device="cpu",
        dtype="float32",
        num_threads=1,
        block_size=16,
        max_num_seqs=8,
        max_num_batched_tokens=24,
    ) as eng:
        outs = eng.generate(prompts, params) + eng.generate(prompts[:2], params)
        assert eng.stats().prefix_hit_tokens > 0
    for prompt, out in zip([*prompts, *prompts[:2]], outs, strict=True):
        want = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        assert list(out.outputs[0].token_ids) == want[0, len(prompt) :].tolist()
