"""Constraints on a GPU: masks read by captured steps, beside free requests, under little memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from constrained_answers import CONSTRAINTS, SCHEMA, VARIATIONS, check

from engine import Engine, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def engine(tiny_llama: Path) -> Iterator[Engine]:
    """Steps are captured; each row's result is the same whatever else is in the batch."""
    with Engine(
        str(tiny_llama),
        device="cuda",
        dtype="float32",
        batch_invariant=True,
        kv_cache_memory_bytes=64 << 20,
        max_num_seqs=128,
    ) as engine:
        yield engine
        assert engine.stats().kv_blocks_used == 0


def test_every_constraint_holds_with_every_option(engine: Engine) -> None:
    """All of them in one batch."""
    cases = [(options, extra) for options in CONSTRAINTS for extra in VARIATIONS.values()]
    params = [SamplingParams(max_tokens=90, **options, **extra) for options, extra in cases]
    outputs = engine.generate([[3, 4, 5 + i] for i in range(len(cases))], params)
    for output, (options, _) in zip(outputs, cases, strict=True):
        for answer in output.outputs:
            check(answer.text, options)
            assert answer.finish_reason == "stop" or "grammar" in options


@pytest.mark.parametrize("extra", [{}, {"logprobs": 0}, {"repetition_penalty": 1.2}], ids=str)
def test_json_is_complete_whatever_max_tokens_is(engine: Engine, extra: dict[str, Any]) -> None:
    budgets = range(60, 100)
    params = [
        SamplingParams(json_schema=SCHEMA, max_tokens=budget, seed=budget, **extra)
        for budget in budgets
    ]
    outputs = engine.generate([[7, 8, 9]] * len(params), params)
    for budget, output in zip(budgets, outputs, strict=True):
        check(output.outputs[0].text, {"json_schema": SCHEMA})
        assert len(output.outputs[0].token_ids) <= budget


def test_jumps_and_neighbours_change_no_answer(engine: Engine) -> None:
    held = [
        SamplingParams(max_tokens=90, seed=i, **CONSTRAINTS[i % len(CONSTRAINTS)])
        for i in range(20)
    ]
    free = [
        SamplingParams(max_tokens=40 + i, seed=i, ignore_eos=True, temperature=float(i % 2))
        for i in range(20)
    ]
    prompts = [[3 + i, 9, 8] for i in range(20)]
    held_alone = [engine.generate(prompts[i], held[i]).outputs[0].token_ids for i in range(20)]
    free_alone = [output.outputs[0].token_ids for output in engine.generate(prompts, free)]
    stepped = engine.generate(prompts, [params.replace(logprobs=0) for params in held])
    assert [output.outputs[0].token_ids for output in stepped] == held_alone
    mixed = engine.generate([*prompts, *prompts], [*held, *free])
    assert [output.outputs[0].token_ids for output in mixed] == [*held_alone, *free_alone]


def test_text_without_masks_is_the_text_under_masks(engine: Engine) -> None:
    """Log probabilities rule guesses out; every kind of draw that allows them is compared."""
    note = {
        "type": "object",
        "properties": {
            "note": {"type": "string", "minLength": 25},
            "kind": {"enum": ["small", "large"]},
            "rest": {"type": "string", "maxLength": 12},
        },
        "required": ["note", "kind", "rest"],
        "additionalProperties": False,
    }
    params = [
        SamplingParams(json_schema=note, max_tokens=110, seed=i, temperature=(0.0, 1.0, 0.6)[i % 3])
        for i in range(30)
    ]
    prompts = [[3 + i, 9, 8] for i in range(30)]
    guessed = engine.generate(prompts, params)
    masked = engine.generate(prompts, [one.replace(logprobs=0) for one in params])
    for one, other in zip(guessed, masked, strict=True):
        jsonschema.validate(json.loads(one.outputs[0].text), note)
        assert one.outputs[0].token_ids == other.outputs[0].token_ids


def test_masks_of_captured_steps_are_those_of_eager_ones(engine: Engine, tiny_llama: Path) -> None:
    params = [
        SamplingParams(max_tokens=90, seed=i, **CONSTRAINTS[i % len(CONSTRAINTS)])
        for i in range(10)
    ]
    prompts = [[3 + i] * (1 + 9 * i) for i in range(10)]
    captured = engine.generate(prompts, params)
    with Engine(
        str(tiny_llama),
        device="cuda",
        dtype="float32",
        batch_invariant=True,
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
    ) as eager:
        outputs = eager.generate(prompts, params)
    for one, other in zip(captured, outputs, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids


def test_preempted_answers_go_on_where_they_were(engine: Engine, tiny_llama: Path) -> None:
    prompts = [[3 + i] * (10 + 3 * i) for i in range(10)]
    params = [SamplingParams(max_tokens=90, seed=i, **CONSTRAINTS[i % 2]) for i in range(10)]
    with Engine(
        str(tiny_llama),
        device="cuda",
        dtype="float32",
        batch_invariant=True,
        num_kv_blocks=14,
        block_size=16,
        max_model_len=160,
        max_num_batched_tokens=24,
    ) as small:
        outputs = small.generate(prompts, params)
        assert small.stats().preemptions > 0
        assert small.stats().kv_blocks_used == 0
    expected = engine.generate(prompts, params)
    for i, (output, other) in enumerate(zip(outputs, expected, strict=True)):
        check(output.outputs[0].text, CONSTRAINTS[i % 2])
        assert output.outputs[0].token_ids == other.outputs[0].token_ids


def test_the_process_placement_holds_them_too(tiny_llama: Path) -> None:
    with Engine(
        str(tiny_llama), device="cuda", placement="process", kv_cache_memory_bytes=64 << 20
    ) as engine:
        params = SamplingParams(json_schema=SCHEMA, max_tokens=90, seed=4)
        deltas = list(engine.submit([3, 4], params))
        text = "".join(delta.text for delta in deltas)
        assert json.loads(text).keys() == {"name", "kind", "sizes"}
        assert text == engine.generate([3, 4], params).outputs[0].text
