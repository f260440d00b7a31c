"""Draws: distributions, reproducibility, greedy choice and broken logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sampler_support import FILTERS, draw, hugging_face_kept, make_sampler

from engine.core.request import answer_seed
from engine.kernels import sampling_reference as twin
from engine.runner.sampler import Sampler
from engine.sampling_params import SamplingParams

NUM_DRAWS = 4000


def _chi_square_bound(degrees: int) -> float:
    """About the 99.9 % quantile (Wilson and Hilferty 1931)."""
    spread = 2.0 / (9.0 * degrees)
    return degrees * (1.0 - spread + 3.09 * math.sqrt(spread)) ** 3


def _chi_square(counts: np.ndarray, probabilities: np.ndarray) -> tuple[float, int]:
    """Statistic and degrees of freedom, cells below 5 expected draws put together."""
    expected = probabilities * counts.sum()
    assert counts[probabilities == 0].sum() == 0, "a token outside the kept set was drawn"
    large = expected >= 5
    observed_cells = np.append(counts[large], counts[~large].sum())
    expected_cells = np.append(expected[large], expected[~large].sum())
    used = expected_cells > 0
    observed_cells, expected_cells = observed_cells[used], expected_cells[used]
    statistic = ((observed_cells - expected_cells) ** 2 / expected_cells).sum()
    return float(statistic), len(expected_cells) - 1


@pytest.mark.parametrize("vocab_size", [40, 9000])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.8},
        {"top_k": 9},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 12, "top_p": 0.9, "min_p": 0.01, "temperature": 1.3},
    ],
    ids=str,
)
def test_frequencies_follow_softmax_of_the_kept_set(vocab_size: int, fields: dict) -> None:
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(1)) * 2
    scaled = logits.double() / fields.get("temperature", 1.0)
    kept = hugging_face_kept(logits, fields)
    probabilities = torch.softmax(scaled.masked_fill(~kept, -torch.inf), 0).numpy()
    sampler = make_sampler([fields], vocab_size, seeds=[20_26])

    ids = draw(sampler, logits.expand(NUM_DRAWS, -1), [0] * NUM_DRAWS, list(range(NUM_DRAWS)))

    statistic, degrees = _chi_square(np.bincount(ids, minlength=vocab_size), probabilities)
    assert degrees == 0 or statistic < _chi_square_bound(degrees)


@pytest.mark.parametrize("by", ["seed", "position"])
def test_noise_of_the_twin_follows_softmax(by: str) -> None:
    """Gumbel noise over consecutive seeds, or positions, samples the distribution."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0])
    draws = 3000
    counts = np.zeros(6)
    for i in range(draws):
        seed_words, position = ((i, 0), 5) if by == "seed" else ((9, 1), i)
        counts[int((logits + twin.gumbel_noise(seed_words, position, 6)).argmax())] += 1
    statistic, degrees = _chi_square(counts, torch.softmax(logits.double(), 0).numpy())
    assert statistic < _chi_square_bound(degrees)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter: tuple, key: tuple, expected: tuple) -> None:
    """Known answers of the Random123 distribution, for Python ints and int64 tensors."""
    assert twin.philox4x32(counter, key) == expected
    tensors = tuple(torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in twin.philox4x32(tensors, key)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    """Alone, in a batch, in another order, in another state index: the same token."""
    vocab_size = 3001
    options = [*FILTERS, {"temperature": 0.0}]
    num_rows = len(options)
    logits = (torch.randn(num_rows, vocab_size) * 2).to(dtype)
    sampler = make_sampler(options, vocab_size)
    together = draw(sampler, logits, list(range(num_rows)), [11] * num_rows)

    alone = [draw(sampler, logits[i : i + 1], [i], [11])[0] for i in range(num_rows)]
    order = list(reversed(range(num_rows)))
    turned = draw(sampler, logits[order], order, [11] * num_rows)
    other = Sampler(vocab_size, 2, "cpu")
    moved = []
    for i, fields in enumerate(options):
        other.set_row(1, SamplingParams(**fields), seed=i + 1)
        moved.append(draw(other, logits[i : i + 1], [1], [11])[0])

    assert alone == together
    assert turned[::-1] == together
    assert moved == together


def test_preemption_does_not_change_the_answer() -> None:
    """Freed and admitted again with its tokens so far, a sequence goes on as it would have."""
    vocab_size, prompt = 500, [3, 4, 5, 6]
    params = SamplingParams(
        top_k=40, repetition_penalty=1.4, frequency_penalty=0.5, presence_penalty=0.3
    )
    steps = torch.randn(12, vocab_size, generator=torch.Generator().manual_seed(8)) * 2

    def run(preempted_after: int | None) -> list[int]:
        sampler = Sampler(vocab_size, 4, "cpu")
        row, output = 0, []
        sampler.set_row(row, params, seed=77, prompt_token_ids=prompt)
        for step in range(12):
            if step == preempted_after:
                sampler.free_row(row)
                row = 3
                sampler.set_row(
                    row, params, seed=77, prompt_token_ids=prompt, output_token_ids=output
                )
            sampler.flush()
            output += draw(sampler, steps[step : step + 1], [row], [len(prompt) + step])
        return output

    assert run(preempted_after=5) == run(preempted_after=None)


def test_seed_position_and_answer_index_change_the_draw() -> None:
    vocab_size = 5000
    logits = torch.zeros(64, vocab_size)
    base = make_sampler([{}], vocab_size, seeds=[5])
    tokens = draw(base, logits, [0] * 64, list(range(64)))
    assert len(set(tokens)) > 55
    for seed in (6, 5 + 2**32, 5 + 2**63, -5):
        other = draw(make_sampler([{}], vocab_size, seeds=[seed]), logits, [0] * 64, range(64))
        assert sum(a == b for a, b in zip(tokens, other, strict=True)) < 3
    seeds = {answer_seed(seed, index) for seed in (0, 1, -1, 2**63) for index in range(128)}
    assert len(seeds) == 4 * 128
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_greedy_takes_the_lowest_of_the_largest() -> None:
    logits = torch.zeros(3, 4000)
    logits[0, [70, 71, 3999]] = 5.0
    logits[1, 3999] = 1e-4
    sampler = make_sampler([{"temperature": 0.0}, {"temperature": 0.0, "top_p": 0.1}] * 2, 4000)
    assert sampler.variant(np.arange(4)).is_greedy
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert draw(sampler, logits.to(dtype), [0, 1, 2], [1, 1, 1]) == [70, 3999, 0]


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}])
def test_broken_logits_stay_in_their_row(fields: dict) -> None:
    vocab_size = 3000
    logits = torch.randn(6, vocab_size)
    logits[1] = torch.nan
    logits[2] = -torch.inf
    logits[3, :-1] = torch.nan
    logits[4, 17] = torch.inf
    healthy = logits[[0, 5]]
    sampler = make_sampler([fields] * 6, vocab_size)
    ids = draw(sampler, logits, list(range(6)), [4] * 6)
    assert ids[1:5] == [-1, -1, vocab_size - 1, 17]
    assert [ids[0], ids[5]] == draw(sampler, healthy, [0, 5], [4, 4])


def test_extreme_options_stay_finite() -> None:
    logits = torch.randn(4, 2000)
    logits[:, 900] = 60.0
    options = [
        {"temperature": 1e-9},
        {"temperature": 1e-5},
        {"top_p": 1e-9},
        {"temperature": 0.02, "min_p": 1.0},
    ]
    assert draw(make_sampler(options, 2000), logits, [0, 1, 2, 3], [0] * 4) == [900] * 4
