"""Constrained requests through the engine, in both placements, alone and beside others."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from constrained_answers import CONSTRAINTS, PHONE, SCHEMA, VARIATIONS, check

from engine import ConstraintError, Engine, SamplingParams


@pytest.mark.parametrize("name", VARIATIONS)
@pytest.mark.parametrize("options", CONSTRAINTS, ids=lambda options: str(next(iter(options))))
def test_every_constraint_holds_with_every_option(
    eng: Engine, options: dict[str, Any], name: str
) -> None:
    params = SamplingParams(max_tokens=90, **options, **VARIATIONS[name])
    output = eng.generate([3, 4, 5], params)
    for answer in output.outputs:
        check(answer.text, options)
        assert answer.finish_reason == "stop" or "grammar" in options
        if params.logprobs is not None:
            assert answer.logprobs is not None
            assert len(answer.logprobs) == len(answer.token_ids)
            assert all(i in at for i, at in zip(answer.token_ids, answer.logprobs, strict=True))
    assert len({answer.text for answer in output.outputs}) == len(output.outputs) or (
        "choice" in options or "root" in str(options)
    )


@pytest.mark.parametrize("extra", [{}, {"logprobs": 0}, {"repetition_penalty": 1.2}], ids=str)
def test_json_is_complete_whatever_max_tokens_is(eng: Engine, extra: dict[str, Any]) -> None:
    """Every budget from one token to far more than is needed: refused, or complete."""
    budgets, params, refusals = [], [], []
    for budget in range(1, 101):
        one = SamplingParams(json_schema=SCHEMA, max_tokens=budget, n=2, seed=budget, **extra)
        try:
            eng.submit([7, 8, 9], one).abort()
        except ConstraintError as error:
            refusals.append(str(error))
        else:
            budgets.append(budget)
            params.append(one)
    assert budgets == list(range(len(refusals) + 1, 101))
    for budget, refusal in enumerate(refusals, start=1):
        assert f"max_tokens={budget} leaves no room" in refusal
    assert 1 < budgets[0] <= len('{"name": "", "kind": "small", "sizes": []}')
    for budget, output in zip(
        budgets, eng.generate([[7, 8, 9]] * len(params), params), strict=True
    ):
        for answer in output.outputs:
            check(answer.text, {"json_schema": SCHEMA})
            assert answer.finish_reason == "stop"
            assert len(answer.token_ids) <= budget


def test_jumping_over_forced_tokens_changes_no_answer(eng: Engine) -> None:
    """`logprobs` rules jumping out, and nothing else."""
    for seed in range(6):
        common: dict[str, Any] = {"json_schema": SCHEMA, "max_tokens": 90, "seed": seed}
        jumped = eng.generate([3, seed], SamplingParams(**common)).outputs[0]
        stepped = eng.generate([3, seed], SamplingParams(logprobs=0, **common)).outputs[0]
        assert jumped.token_ids == stepped.token_ids
        assert (jumped.text, jumped.finish_reason) == (stepped.text, stepped.finish_reason)


def test_neighbours_are_what_they_are_without_constrained_ones(eng: Engine) -> None:
    prompts = [[3 + i, 9, 8, 7 + i] for i in range(8)]
    plain = [
        SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
        if i % 2
        else SamplingParams(max_tokens=40, seed=i, repetition_penalty=1.1, ignore_eos=True)
        for i in range(8)
    ]
    alone = [output.outputs[0].token_ids for output in eng.generate(prompts, plain)]
    mixed_prompts: list[list[int]] = []
    mixed: list[SamplingParams] = []
    for i, params in enumerate(plain):
        options = CONSTRAINTS[i % len(CONSTRAINTS)]
        mixed_prompts += [prompts[i], [5, i]]
        mixed += [params, SamplingParams(max_tokens=90, seed=i, **options)]
    outputs = eng.generate(mixed_prompts, mixed)
    assert [output.outputs[0].token_ids for output in outputs[::2]] == alone
    for i, output in enumerate(outputs[1::2]):
        check(output.outputs[0].text, CONSTRAINTS[i % len(CONSTRAINTS)])


def test_seeded_answers_depend_on_nothing_else(eng: Engine) -> None:
    params = SamplingParams(json_schema=SCHEMA, max_tokens=90, seed=11)
    alone = eng.generate([3, 4], params).outputs[0].text
    beside = eng.generate(
        [[3, 4], [5, 6], [7] * 40],
        [params, SamplingParams(regex=PHONE, max_tokens=20), SamplingParams(max_tokens=50)],
    )
    assert beside[0].outputs[0].text == alone


def test_streams_bring_the_same_text(eng: Engine) -> None:
    params = SamplingParams(json_schema=SCHEMA, max_tokens=90, seed=4, n=2)
    whole = eng.generate([3, 4], params)
    texts, ids = ["", ""], [[], []]  # type: ignore[var-annotated]
    for delta in eng.submit([3, 4], params):
        texts[delta.index] += delta.text
        ids[delta.index] += delta.token_ids
    assert texts == [answer.text for answer in whole.outputs]
    assert ids == [answer.token_ids for answer in whole.outputs]

    async def read() -> str:
        return "".join([delta.text async for delta in eng.submit([3, 4], params.replace(n=1))])

    assert asyncio.run(read()) == whole.outputs[0].text


def test_stop_strings_and_stop_tokens_still_end_an_answer(eng: Engine) -> None:
    params = SamplingParams(json_schema=SCHEMA, max_tokens=90, seed=4)
    text = eng.generate([3, 4], params).outputs[0].text
    stopped = eng.generate([3, 4], params.replace(stop='"kind')).outputs[0]
    assert stopped.text == text[: text.index('"kind')]
    assert stopped.stop_reason == '"kind'
    comma = eng.tokenize(",", add_special_tokens=False)[0]
    stopped = eng.generate([3, 4], params.replace(stop_token_ids=[comma])).outputs[0]
    assert stopped.text == text[: text.index(",")]
    assert stopped.stop_reason == comma


def test_what_bars_every_token_is_an_error(eng: Engine) -> None:
    params = SamplingParams(choice=["a"], bad_words=["a"], max_tokens=5)
    with pytest.raises(ConstraintError, match="bad_words bar every token"):
        eng.generate([3], params)
    check(eng.generate([3], SamplingParams(regex=PHONE, max_tokens=20)).outputs[0].text,
          {"regex": PHONE})  # fmt: skip


def test_constraints_are_refused_at_submit(eng: Engine) -> None:
    for options, message in (
        ({"json_schema": {"properties": {"a": {"not": {}}}}}, r"\$.properties.a"),
        ({"json_schema": SCHEMA, "max_tokens": 5}, "max_tokens=5 leaves no room"),
        ({"choice": ["a longer string"], "max_tokens": 2}, "leaves no room"),
    ):
        with pytest.raises(ConstraintError, match=message):
            eng.submit([3], SamplingParams(**options))


@pytest.fixture(scope="module")
def small_engine(tiny_llama: Path) -> Iterator[Engine]:
    """So few KV blocks and step tokens that sequences are preempted and prompts chunked."""
    with Engine(
        str(tiny_llama),
        device="cpu",
        num_threads=1,
        num_kv_blocks=14,
        block_size=16,
        max_model_len=160,
        max_num_batched_tokens=24,
    ) as engine:
        yield engine
        assert engine.stats().kv_blocks_used == 0


@pytest.mark.parametrize("extra", [{}, {"repetition_penalty": 1.2}, {"logprobs": 1}], ids=str)
def test_preempted_answers_go_on_where_they_were(
    small_engine: Engine, eng: Engine, extra: dict[str, Any]
) -> None:
    prompts = [[3 + i] * (10 + 3 * i) for i in range(10)]
    params = [
        SamplingParams(max_tokens=90, seed=i, **CONSTRAINTS[i % 2], **extra) for i in range(10)
    ]
    before = small_engine.stats().preemptions
    outputs = small_engine.generate(prompts, params)
    assert small_engine.stats().preemptions > before
    for i, output in enumerate(outputs):
        check(output.outputs[0].text, CONSTRAINTS[i % 2])
        alone = eng.generate(prompts[i], params[i]).outputs[0]
        assert output.outputs[0].token_ids == alone.token_ids


def test_prefixes_are_shared_with_free_text(tiny_engine: Engine) -> None:
    prompt = [5] * 100
    free = SamplingParams(max_tokens=4, temperature=0.0)
    cold = tiny_engine.generate(prompt, SamplingParams(max_tokens=90, seed=1, json_schema=SCHEMA))
    tiny_engine.generate(prompt, free)
    warm = tiny_engine.generate(prompt, SamplingParams(max_tokens=90, seed=1, json_schema=SCHEMA))
    assert warm.usage.cached_tokens >= 64
    assert warm.outputs[0].token_ids == cold.outputs[0].token_ids


def test_an_aborted_answer_frees_what_it_had(tiny_engine: Engine) -> None:
    endless = SamplingParams(regex="(a|b)*", max_tokens=400, ignore_eos=True)
    handle = tiny_engine.submit([3, 4], endless)
    next(iter(handle))
    handle.abort()
    assert handle.result(timeout=30).outputs[0].finish_reason == "abort"
    assert re.fullmatch("[ab]*", handle.result().outputs[0].text)
