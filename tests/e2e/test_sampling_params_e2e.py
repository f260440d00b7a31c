"""Every sampling option changes what it should, through the whole engine, and nothing beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine import Engine, RequestOutput, SamplingParams

PROMPT = [70, 71, 72, 262, 261]


def ask(eng: Engine, **options: Any) -> RequestOutput:
    defaults = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True}
    return eng.generate(PROMPT, SamplingParams(**{**defaults, **options}))


def ids(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def test_seed_alone_decides_whatever_runs_beside(eng: Engine) -> None:
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=20, ignore_eos=True, n=2)
    alone = eng.generate(PROMPT, params)
    noise = SamplingParams(temperature=1.5, max_tokens=20, ignore_eos=True)
    handles = eng.submit_many([[5 + i, 6] for i in range(12)], noise)
    crowded = eng.submit(PROMPT, params).result()
    for handle in handles:
        handle.abort()
    assert [answer.token_ids for answer in crowded.outputs] == [
        answer.token_ids for answer in alone.outputs
    ]
    assert alone.outputs[0].token_ids != alone.outputs[1].token_ids
    other = eng.generate(PROMPT, params.replace(seed=8))
    assert other.outputs[0].token_ids != alone.outputs[0].token_ids


def test_without_a_seed_answers_differ(eng: Engine) -> None:
    answers = {tuple(ids(ask(eng, temperature=1.0))) for _ in range(4)}
    assert len(answers) == 4


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_narrow_filters_are_greedy(eng: Engine, options: dict[str, Any]) -> None:
    assert ids(ask(eng, temperature=2.0, seed=1, **options)) == ids(ask(eng))


def test_max_tokens_and_length(eng: Engine) -> None:
    output = ask(eng, max_tokens=3)
    assert len(ids(output)) == 3
    assert output.outputs[0].finish_reason == "length"
    to_the_end = ask(eng, max_tokens=None)
    assert len(PROMPT) + len(ids(to_the_end)) == eng.max_model_len


def test_stop_token_ids_and_min_tokens(eng: Engine) -> None:
    plain = ids(ask(eng))
    stop_id = plain[3]
    first = plain.index(stop_id)
    output = ask(eng, stop_token_ids=[stop_id])
    assert ids(output) == plain[: first + 1]
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason == stop_id
    assert output.outputs[0].text == eng.detokenize(plain[:first])
    shown = ask(eng, stop_token_ids=[stop_id], include_stop_str_in_output=True)
    assert shown.outputs[0].text == eng.detokenize(plain[: first + 1])
    late = ids(ask(eng, stop_token_ids=[stop_id], min_tokens=first + 3))
    assert len(late) >= first + 3
    assert stop_id not in late[: first + 3]


def test_end_of_sequence_ends_unless_ignored(eng: Engine) -> None:
    # The tiny model's end-of-sequence id is 2: make it the likeliest.
    ended = ask(eng, ignore_eos=False, logit_bias={2: 100.0})
    assert ids(ended) == [2]
    assert ended.outputs[0].finish_reason == "stop"
    assert ended.outputs[0].stop_reason is None
    assert ended.outputs[0].text == ""
    assert ids(ask(eng, ignore_eos=True, logit_bias={2: 100.0})) == [2] * 20
    shown = ask(eng, ignore_eos=True, logit_bias={2: 100.0}, skip_special_tokens=False)
    assert shown.outputs[0].text == "<|im_end|>" * 20


def test_stop_strings_across_token_boundaries(eng: Engine) -> None:
    whole = ask(eng, max_tokens=40).outputs[0].text
    stop = whole[9:13]
    place = whole.index(stop)
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, stop=[stop, "zzzz"])
    output = eng.generate(PROMPT, params).outputs[0]
    assert output.text == whole[:place]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    deltas = list(eng.submit(PROMPT, params))
    assert "".join(delta.text for delta in deltas) == whole[:place]
    assert deltas[-1].stop_reason == stop
    shown = eng.generate(PROMPT, params.replace(include_stop_str_in_output=True)).outputs[0]
    assert shown.text == whole[: place + len(stop)]


def test_logit_bias_and_bad_words(eng: Engine) -> None:
    plain = ids(ask(eng))
    assert plain[0] not in ids(ask(eng, logit_bias={plain[0]: -100.0}))
    text = eng.detokenize(plain)
    word = text[2:6].strip("\ufffd \x00") or text[2]
    banned = ask(eng, bad_words=[word], max_tokens=40)
    assert word not in banned.outputs[0].text


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"repetition_penalty": 5.0},
    ],
)
def test_penalties_lower_repetition(eng: Engine, options: dict[str, Any]) -> None:
    # A bias makes the model repeat itself for certain; the penalty must break that.
    plain = ids(ask(eng, logit_bias={50: 3.0, 51: 2.9}, max_tokens=30))
    changed = ids(ask(eng, logit_bias={50: 3.0, 51: 2.9}, max_tokens=30, **options))
    assert changed != plain
    assert len(set(changed)) >= len(set(plain))


def test_logprobs_zero_reports_the_sampled_token(eng: Engine) -> None:
    output = ask(eng, logprobs=0, max_tokens=4).outputs[0]
    assert output.logprobs is not None
    assert [list(at) for at in output.logprobs] == [[token] for token in output.token_ids]
    assert all(
        at[token].rank == 1 for at, token in zip(output.logprobs, output.token_ids, strict=True)
    )


def test_streamed_logprobs_match_the_tokens(eng: Engine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2)
    deltas = list(eng.submit(PROMPT, params))
    tokens = [token for delta in deltas for token in delta.token_ids]
    logprobs = [at for delta in deltas for at in delta.logprobs or []]
    assert len(tokens) == len(logprobs) == 12
    assert all(token in at for token, at in zip(tokens, logprobs, strict=True))


@pytest.mark.parametrize("placement", ["thread", "process"])
def test_priority_runs_first(tiny_llama: Path, placement: str) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    options = {"num_threads": 1, "max_num_seqs": 1, "placement": placement}
    with Engine(str(tiny_llama), device="cpu", **options) as engine:
        engine.submit(PROMPT, params)
        later = engine.submit(PROMPT, params, priority=5)
        sooner = engine.submit(PROMPT, params, priority=1)
        first, last = sooner.result(), later.result()
    assert first.metrics.finished_s is not None
    assert last.metrics.first_scheduled_s is not None
    assert first.metrics.finished_s <= last.metrics.first_scheduled_s


def test_cache_salt_separates_prefixes(eng: Engine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    prompt = list(range(3, 203))
    eng.reset_prefix_cache()
    cached = [
        eng.submit(prompt, params, cache_salt=salt).result().usage.cached_tokens
        for salt in ("a", "a", "b", None, None)
    ]
    assert cached == [0, 192, 0, 0, 192]
    eng.reset_prefix_cache()
    assert eng.submit(prompt, params).result().usage.cached_tokens == 0


def test_metrics_are_in_order(eng: Engine) -> None:
    metrics = ask(eng).metrics
    assert metrics.first_scheduled_s is not None
    assert metrics.first_token_s is not None
    assert metrics.finished_s is not None
    times = [
        metrics.arrival_s,
        metrics.first_scheduled_s,
        metrics.first_token_s,
        metrics.finished_s,
    ]
    assert times == sorted(times)
    assert metrics.tokens_per_s(20) is not None
