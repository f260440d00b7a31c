"""Every other option: bias, bans, penalties, checks, variants and log probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampler_support import draw, make_sampler
from transformers import generation

from engine.errors import RequestError
from engine.kernels import sampling_reference as twin
from engine.runner.sampler import (
    Sampler,
    banned_tokens,
    check_params,
    gather_logprobs,
    needs_host_sync,
)
from engine.runner.sampling_rules import MAX_LOGIT_BIAS
from engine.sampling_params import SamplingParams

V = 400
GREEDY = {"temperature": 0.0}


def _adjusted(sampler: Sampler, logits: torch.Tensor, position: int) -> torch.Tensor:
    """Row 0 after bias, bans and penalties: the CPU path's, checked against the twin's."""
    from engine.runner.sampling_cpu import adjust_row

    row, at = torch.tensor([0]), torch.tensor([position])
    by_twin = twin.adjust_logits_reference(logits[None], sampler.tables, row, at)[0]
    on_cpu = torch.from_numpy(adjust_row(logits.numpy(), sampler._state, 0, position))
    torch.testing.assert_close(on_cpu, by_twin, rtol=0, atol=0)
    return on_cpu


def test_repetition_penalty_equals_hugging_face() -> None:
    logits = torch.randn(V)
    prompt, output = [1, 2, 3, 3, 50], [7, 7, 2]
    sampler = make_sampler(
        [{"repetition_penalty": 1.7}], V, prompt_token_ids=prompt, output_token_ids=output
    )
    processor = generation.RepetitionPenaltyLogitsProcessor(1.7)
    expected = processor(torch.tensor([prompt + output]), logits[None].clone())[0]
    torch.testing.assert_close(_adjusted(sampler, logits, 8), expected)


def test_frequency_and_presence_count_the_answer_only() -> None:
    logits = torch.randn(V)
    fields = {"frequency_penalty": 0.7, "presence_penalty": -0.4}
    sampler = make_sampler([fields], V, prompt_token_ids=[1, 2, 7], output_token_ids=[7, 7, 7, 9])
    expected = logits.clone()
    expected[7] += -0.7 * 3 + 0.4
    expected[9] += -0.7 + 0.4
    torch.testing.assert_close(_adjusted(sampler, logits, 7), expected)


def test_penalties_follow_the_sampled_tokens() -> None:
    """Each step bans the last winner, so greedy walks down the ranking without the host."""
    logits = torch.arange(V, 0, -1).float()[None] * 0.5
    sampler = make_sampler([{**GREEDY, "presence_penalty": 2.0, "frequency_penalty": 2.0}], V)
    ids = [draw(sampler, logits, [0], [step])[0] for step in range(9)]
    assert ids[:4] == [0, 1, 2, 3]
    counts = torch.zeros(V)
    for step in range(9):
        expected = (logits[0] - 2.0 * counts - 2.0 * (counts > 0)).argmax()
        assert ids[step] == int(expected)
        counts[expected] += 1


def test_bias_comes_before_penalties_and_bans_win() -> None:
    logits = torch.full((V,), -1.0)
    logits[5] = 3.0
    fields = {"logit_bias": {5: -7.0, 6: 4.0, 8: 100.0}, "repetition_penalty": 2.0}
    sampler = make_sampler([fields], V, prompt_token_ids=[5, 6], bad_words_ids=[[8]])
    adjusted = _adjusted(sampler, logits, 2)
    assert adjusted[5] == (3.0 - 7.0) * 2.0
    assert adjusted[6] == (-1.0 + 4.0) / 2.0
    assert adjusted[8] == -torch.inf
    assert adjusted[9] == -1.0


@pytest.mark.parametrize("bias", [float("-inf"), -1e38])
def test_bias_can_exclude_a_token(bias: float) -> None:
    logits = torch.zeros(1, V)
    logits[0, 3], logits[0, 4] = 9.0, 1.0
    sampler = make_sampler([{**GREEDY, "logit_bias": {3: bias}}], V)
    assert draw(sampler, logits, [0], [0]) == [4]


def test_infinite_bias_forces_a_token() -> None:
    sampler = make_sampler([{"logit_bias": {3: float("inf")}}], V)
    assert draw(sampler, torch.randn(1, V), [0], [0]) == [3]


def test_min_tokens_equals_hugging_face() -> None:
    prompt, stops = [1, 2, 3], [7, 9, V + 5]
    logits = torch.randn(V)
    sampler = make_sampler(
        [{"min_tokens": 2, "logit_bias": {7: 1.0}}],
        V,
        prompt_token_ids=prompt,
        stop_token_ids=stops,
    )
    biased = logits.clone()
    biased[7] += 1.0
    processor = generation.MinNewTokensLengthLogitsProcessor(3, 2, stops[:2], device="cpu")
    for num_new in range(4):
        input_ids = torch.ones((1, 3 + num_new), dtype=torch.int64)
        expected = processor(input_ids, biased[None].clone())[0]
        torch.testing.assert_close(_adjusted(sampler, logits, 3 + num_new), expected)


def test_bad_words_equal_hugging_face() -> None:
    words = [[4], [5, 6], [5, 6, 7], [8, 8, 8]]
    processor = generation.NoBadWordsLogitsProcessor(words, eos_token_id=V - 1)
    logits = torch.zeros(V)
    for output in ([], [5], [5, 6], [8], [8, 8], [6, 5], [8, 8, 8, 8], [1, 2, 5]):
        input_ids = torch.tensor([[0, *output]])
        expected = processor(input_ids, logits[None].clone())[0] == -torch.inf
        sampler = make_sampler([{}], V, bad_words_ids=words)
        sampler.update_banned(0, banned_tokens(words, output))
        assert torch.equal(_adjusted(sampler, logits, 9) == -torch.inf, expected)
        readmitted = make_sampler([{}], V, bad_words_ids=words, output_token_ids=output)
        assert torch.equal(_adjusted(readmitted, logits, 9) == -torch.inf, expected)


def test_only_words_of_several_tokens_need_the_host() -> None:
    assert not needs_host_sync([[1], [2]])
    assert needs_host_sync([[1], [2, 3]])


def test_a_freed_row_forgets_everything() -> None:
    fields = {"repetition_penalty": 1.9, "logit_bias": {3: -50.0}, "top_k": 2, "min_tokens": 9}
    sampler = make_sampler(
        [fields], V, prompt_token_ids=[3], output_token_ids=[3], bad_words_ids=[[1]],
        stop_token_ids=[2],
    )  # fmt: skip
    sampler.free_row(0)
    assert sampler.variant(np.array([0])) == sampler.greedy_variant
    assert sampler.tables.counts is not None
    assert not sampler.tables.counts[0].any()
    sampler.set_row(0, SamplingParams(repetition_penalty=1.5), seed=1)
    logits = torch.randn(V)
    torch.testing.assert_close(_adjusted(sampler, logits, 0), logits)


def test_variant_names_what_the_rows_need() -> None:
    options = [
        GREEDY,
        {},
        {"top_k": V},
        {"min_p": 0.1},
        {**GREEDY, "logit_bias": {1: 1.0}},
        {**GREEDY, "presence_penalty": 1.0},
        {**GREEDY, "top_p": 0.5},
    ]
    sampler = make_sampler(options, V)
    seen = [sampler.variant(np.array([row])) for row in range(len(options))]
    assert [variant.draw for variant in seen] == [0, 1, 1, 2, 0, 0, 0]
    assert [variant.sparse_width > 0 for variant in seen] == [False] * 4 + [True, False, False]
    assert [variant.has_penalties for variant in seen] == [False] * 5 + [True, False]
    assert sampler.variant(np.array([0, sampler.dummy_row])) == sampler.greedy_variant
    assert len({*seen}) == 5


def test_wider_lists_change_the_variant_and_keep_the_entries() -> None:
    sampler = make_sampler([{"logit_bias": {1: 2.0}}, {}], V)
    before = sampler.variant(np.array([0]))
    sampler.set_row(1, SamplingParams(logit_bias=dict.fromkeys(range(30), 1.0)), seed=1)
    assert sampler.variant(np.array([0])).sparse_width > before.sparse_width
    assert _adjusted(sampler, torch.zeros(V), 0).nonzero().tolist() == [[1]]


def test_bans_of_long_words_do_not_widen_the_lists_later() -> None:
    words = [[9, i] for i in range(100)]
    sampler = make_sampler([{}], V, bad_words_ids=words)
    sampler.update_banned(0, [1])
    before = sampler.variant(np.array([0]))
    sampler.update_banned(0, banned_tokens(words, [9]))
    assert sampler.variant(np.array([0])) == before


def test_counts_are_allocated_with_the_first_penalty() -> None:
    sampler = make_sampler([{}], V)
    assert sampler.tables.counts is None
    sampler.set_row(0, SamplingParams(frequency_penalty=0.1), seed=0)
    assert sampler.tables.counts is not None
    assert sampler.tables.counts.nbytes == 2 * 2 * V


def test_counts_saturate() -> None:
    many = [3] * (twin.COUNT_MASK + 10)
    sampler = make_sampler([{**GREEDY, "frequency_penalty": -0.001}], V, output_token_ids=many)
    logits = torch.zeros(1, V)
    logits[0, 3] = 1.0
    assert draw(sampler, logits, [0], [0]) == [3]
    assert sampler.tables.counts is not None
    assert int(sampler.tables.counts[0, 3]) == twin.COUNT_MASK


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"logit_bias": {V: 1.0}}, "logit_bias"),
        ({"stop_token_ids": [1, V]}, "stop_token_ids"),
        ({"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0)}, "logit_bias"),
    ],
)
def test_ids_beyond_the_vocabulary_are_refused(fields: dict, named: str) -> None:
    with pytest.raises(RequestError, match=named):
        check_params(SamplingParams(**fields), V if len(str(fields)) < 99 else 10**6)
    check_params(SamplingParams(logit_bias={V - 1: 1.0}, stop_token_ids=[0]), V)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_top", [0, 5, 10**6])
def test_logprobs_equal_log_softmax(dtype: torch.dtype, num_top: int) -> None:
    logits = (torch.randn(7, V) * 5).to(dtype)
    token_ids = torch.randint(0, V, (7,))
    ids, logprobs, ranks = gather_logprobs(logits, token_ids, num_top)
    expected = torch.log_softmax(logits.double(), dim=-1)
    top = min(num_top, V)
    assert ids.shape == logprobs.shape == (7, top + 1)
    assert logprobs.dtype == torch.float32
    assert torch.equal(ids[:, 0], token_ids)
    torch.testing.assert_close(logprobs.double(), expected.gather(1, ids), atol=1e-5, rtol=0)
    best = expected.sort(dim=1, descending=True).values[:, :top]
    torch.testing.assert_close(logprobs[:, 1:].double(), best, atol=1e-5, rtol=0)
    own = expected.gather(1, token_ids[:, None])
    assert ranks.tolist() == ((expected > own).sum(1) + 1).tolist()


def test_logprobs_of_many_rows_are_worked_out_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(50, V)
    token_ids = torch.randint(0, V, (50,))
    whole = gather_logprobs(logits, token_ids, 3)
    monkeypatch.setattr("engine.runner.sampling_logprobs._CHUNK_ELEMENTS", 7 * V)
    for chunked, expected in zip(gather_logprobs(logits, token_ids, 3), whole, strict=True):
        torch.testing.assert_close(chunked, expected, rtol=0, atol=0)


def test_logprobs_are_raw_and_logits_stay_as_they_are() -> None:
    fields = {"temperature": 0.3, "top_k": 2, "logit_bias": {1: 9.0}, "repetition_penalty": 2.0}
    sampler = make_sampler([fields], V, prompt_token_ids=[1, 2])
    logits = torch.randn(1, V)
    before = logits.clone()
    token = draw(sampler, logits, [0], [2])
    assert torch.equal(logits, before)
    _, logprobs, _ = sampler.gather_logprobs(logits, torch.tensor(token), 0)
    expected = torch.log_softmax(before.double(), -1)[0, token[0]]
    assert abs(float(logprobs[0, 0]) - float(expected)) < 1e-5
