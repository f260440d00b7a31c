"""Cases of the sampling kernels, for Triton's interpreter and for a GPU alike.

`python sampler_kernel_cases.py` runs all of them on the CPU, which needs TRITON_INTERPRET=1 from
the start of the process, and prints a JSON object: case -> error text, or null.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sampler_support import FILTERS, make_sampler

from engine.kernels import sampling, sampling_filters, sampling_reference
from engine.runner.sampler import Sampler
from engine.sampling_params import SamplingParams

ADJUSTMENTS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "frequency_penalty": 0.5, "presence_penalty": -0.7},
    {"logit_bias": {0: -3.0, 3: 2.5, 2500: 4.0}, "min_tokens": 4},
    {"logit_bias": {3: float("-inf")}, "presence_penalty": 1.0, "top_k": 30},
    {"temperature": 0.0},
]
_ROW_OPTIONS = {
    "prompt_token_ids": [1, 3, 3, 2500],
    "output_token_ids": [3, 9, 9, 9],
    "stop_token_ids": [0, 11],
    "bad_words_ids": [[21], [9, 22], [8, 23]],
}


def _on_cpu(sampler: Sampler) -> sampling_reference.SamplingTables:
    """A copy of the tables, so that the twin's counting does not touch the kernel's."""
    tables = sampler.tables
    return sampling_reference.SamplingTables(
        tables.settings.cpu().clone(),
        None if tables.sparse is None else tables.sparse.cpu().clone(),
        None if tables.counts is None else tables.counts.cpu().clone(),
        None if tables.masks is None else tables.masks.clone(),
    )


def _logits(num_rows: int, vocab_size: int, scale: float, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows * vocab_size)
    # Every second row of a wider tensor: the row stride is not V, and gaps hold NaN.
    wide = torch.full((num_rows, 2, vocab_size), torch.nan)
    wide[:, 0] = torch.randn(num_rows, vocab_size, generator=generator) * scale
    return wide.to(dtype)[:, 0]


def _sample(sampler: Sampler, logits: torch.Tensor, rows: Sequence[int], position: int) -> Any:
    variant = sampler.variant(np.asarray(rows))
    return sampling.sample_tokens(
        logits,
        sampler.tables,
        torch.tensor(rows, device=logits.device),
        torch.full((len(rows),), position, device=logits.device),
        draw=variant.draw,
        use_sparse=variant.sparse_width > 0,
        use_penalties=variant.has_penalties,
    )


_SPREADS = (
    (3.0, torch.float32),
    (0.05, torch.float32),
    (2.0, torch.bfloat16),
    (0.0, torch.float16),
)


def _kept_sets(
    device: str,
    vocab_size: int,
    block: int,
    spreads: Sequence[tuple[float, torch.dtype]] = _SPREADS,
) -> None:
    sampler = make_sampler([*FILTERS, {"temperature": 0.0}], vocab_size, device=device)
    rows = torch.arange(len(FILTERS) + 1)
    tables = _on_cpu(sampler)
    before = sampling_filters._SEARCH_BLOCK
    sampling_filters._SEARCH_BLOCK = block
    try:
        for scale, dtype in spreads:
            logits = _logits(len(rows), vocab_size, scale, dtype)
            thresholds = sampling_filters.filter_thresholds(
                logits.to(device), sampler.tables, rows.to(device)
            ).cpu()
            clean = sampling_reference.clean_logits(logits)
            expected = sampling_reference.filter_thresholds_reference(clean, tables, rows)
            kept, expected_kept = clean >= thresholds[:, None], clean >= expected[:, None]
            wrong = (kept != expected_kept).any(dim=1).nonzero().flatten().tolist()
            counts = [(FILTERS[i], int(kept[i].sum()), int(expected_kept[i].sum())) for i in wrong]
            assert not wrong, f"scale {scale}, {dtype}: {counts}"
    finally:
        sampling_filters._SEARCH_BLOCK = before


def kept_sets_in_one_block(device: str) -> None:
    _kept_sets(device, 250, sampling_filters._SEARCH_BLOCK)


def kept_sets_in_crowded_lanes(device: str) -> None:
    """A narrow search: lanes overflow, and passes over the row halve the bracket first."""
    _kept_sets(device, 1000, 64, _SPREADS[1:3])


def draws_equal_the_twin(device: str) -> None:
    vocab_size = 2500
    options = [*FILTERS, {"temperature": 0.0}]
    sampler = make_sampler(options, vocab_size, device=device, seeds=[2**63 + i for i in range(99)])
    rows = list(range(len(options)))
    for dtype in (torch.float32, torch.bfloat16):
        logits = _logits(len(options), vocab_size, 2.0, dtype)
        ids = _sample(sampler, logits.to(device), rows, 70_000).tolist()
        expected = sampling_reference.sample_tokens_reference(
            logits, _on_cpu(sampler), torch.tensor(rows), torch.full((len(rows),), 70_000)
        )
        assert ids == expected.tolist()


def adjusted_logits_equal_the_twin(device: str) -> None:
    vocab_size = 2600
    sampler = make_sampler(ADJUSTMENTS, vocab_size, device=device, **_ROW_OPTIONS)
    rows = torch.arange(len(ADJUSTMENTS))
    logits = _logits(len(rows), vocab_size, 3.0, torch.bfloat16)
    for position in (6, 8):
        positions = torch.full((len(rows),), position)
        adjusted = sampling.adjust_logits(
            logits.to(device), sampler.tables, rows.to(device), positions.to(device)
        )
        expected = sampling_reference.adjust_logits_reference(
            logits, _on_cpu(sampler), rows, positions
        )
        # One rounding may be saved by a fused multiply-add.
        torch.testing.assert_close(adjusted.cpu(), expected, rtol=1e-6, atol=1e-6)


def counts_follow_the_tokens(device: str) -> None:
    vocab_size = 2600
    sampler = make_sampler(ADJUSTMENTS, vocab_size, device=device, **_ROW_OPTIONS)
    logits = _logits(len(ADJUSTMENTS) + 2, vocab_size, 3.0, torch.float32)
    rows = [*range(len(ADJUSTMENTS)), sampler.dummy_row, sampler.dummy_row]
    tables = _on_cpu(sampler)
    for position in range(8, 12):
        ids = _sample(sampler, logits.to(device), rows, position).tolist()
        expected = sampling_reference.sample_tokens_reference(
            logits, tables, torch.tensor(rows), torch.full((len(rows),), position)
        )
        assert ids == expected.tolist()
    assert tables.counts is not None
    assert sampler.tables.counts is not None
    assert torch.equal(sampler.tables.counts.cpu(), tables.counts)
    assert not tables.counts[sampler.dummy_row].any()


def broken_rows_stay_alone(device: str) -> None:
    vocab_size = 2100
    logits = _logits(6, vocab_size, 2.0, torch.float32)
    logits[1] = torch.nan
    logits[2] = -torch.inf
    logits[3, :-1] = torch.nan
    logits[4, 17] = torch.inf
    logits = logits.to(device)
    for fields in ({"temperature": 0.0}, {}, {"top_k": 3, "top_p": 0.9}):
        sampler = make_sampler([fields] * 6, vocab_size, device=device)
        ids = _sample(sampler, logits, list(range(6)), 4).tolist()
        healthy = _sample(sampler, logits[[0, 5]], [0, 5], 4).tolist()
        assert ids[1:5] == [-1, -1, vocab_size - 1, 17]
        assert [ids[0], ids[5]] == healthy


def ties_go_to_the_lowest_id(device: str) -> None:
    """Equal maxima in one lane, in one tile and in tiles of different programs."""
    vocab_size = 4 * 2048
    sampler = make_sampler([{"temperature": 0.0}], vocab_size, device=device)
    for ids in ([5000, 8000], [7, 2048 + 7], [100, 612], [300, 301, 8191], [8191]):
        logits = torch.zeros(1, vocab_size)
        logits[0, ids] = 2.0
        for dtype in (torch.float32, torch.bfloat16):
            assert _sample(sampler, logits.to(device, dtype), [0], 0).tolist() == [ids[0]]


def rows_do_not_depend_on_the_batch(device: str) -> None:
    """Every row alone equals the row in the batch, whose variant is another."""
    vocab_size = 2600
    options = [*FILTERS[::3], *ADJUSTMENTS]
    sampler = make_sampler(options, vocab_size, device=device, **_ROW_OPTIONS)
    logits = _logits(len(options), vocab_size, 0.5, torch.bfloat16).to(device)
    rows = list(range(len(options)))
    together = _sample(sampler, logits, rows, 8).tolist()
    again = make_sampler(options, vocab_size, device=device, **_ROW_OPTIONS)
    alone = [int(_sample(again, logits[i : i + 1], [i], 8)[0]) for i in rows]
    assert alone == together


def no_rows_give_no_tokens(device: str) -> None:
    sampler = make_sampler([{"top_k": 3}], 300, device=device)
    assert _sample(sampler, torch.empty(0, 300, device=device), [], 0).shape == (0,)


def masks_bar_what_they_do_not_allow(device: str) -> None:
    """Rows with and without a mask in turn; V is no multiple of a word, nor of a program's tile."""
    words = np.random.default_rng(5)
    for vocab_size in (70, 2600):
        for fields in ({"temperature": 0.0}, {}, {"top_k": 9}, {"presence_penalty": 1.0}):
            sampler = Sampler(vocab_size, 6, device)
            for row in range(6):
                sampler.set_row(
                    row, SamplingParams(**fields), seed=row, is_constrained=row % 2 == 0
                )
            sampler.flush()
            masks = sampler._state.masks
            assert masks is not None
            masks.array[...] = words.integers(-(2**31), 2**31, masks.array.shape)
            masks.array[4] = 0
            masks.array[4, -1] = 1 << (vocab_size - 1) % 32  # the very last token alone
            rows = [4, 1, 0, 3, 2, 5]
            variant = sampler.variant(np.asarray(rows))
            assert variant.has_masks
            logits = _logits(len(rows), vocab_size, 3.0, torch.bfloat16)
            tables = _on_cpu(sampler)
            expected = sampling_reference.sample_tokens_reference(
                logits, tables, torch.tensor(rows), torch.full((6,), 3)
            )
            for keeps_logits in (True, False):
                given = logits.to(device).clone()
                ids = sampling.sample_tokens(
                    given,
                    sampler.tables,
                    torch.tensor(rows, device=device),
                    torch.full((6,), 3, device=device),
                    draw=variant.draw,
                    use_sparse=False,
                    use_penalties=variant.has_penalties and keeps_logits,
                    use_masks=True,
                    keeps_logits=keeps_logits,
                )
                if keeps_logits or "presence_penalty" not in fields:
                    assert ids.tolist() == expected.tolist(), (vocab_size, fields)
                assert int(ids[0]) == vocab_size - 1
                for row, token_id in zip(rows, ids.tolist(), strict=True):
                    word = int(masks.array[row, token_id >> 5])
                    assert row % 2 or word >> (token_id & 31) & 1
                is_free = torch.tensor([row % 2 == 1 for row in rows])
                kept = given.cpu() == logits
                assert kept.all() if keeps_logits else kept[is_free].all()


CASES: dict[str, Callable[[str], None]] = {
    case.__name__: case
    for case in (
        kept_sets_in_one_block,
        kept_sets_in_crowded_lanes,
        draws_equal_the_twin,
        adjusted_logits_equal_the_twin,
        counts_follow_the_tokens,
        broken_rows_stay_alone,
        ties_go_to_the_lowest_id,
        rows_do_not_depend_on_the_batch,
        no_rows_give_no_tokens,
        masks_bar_what_they_do_not_allow,
    )
}


def full_vocabularies_keep_the_right_set(device: str) -> None:
    """Real sizes; GPU only, the interpreter would take minutes."""
    for vocab_size in (49_152, 151_936):
        _kept_sets(device, vocab_size, sampling_filters._SEARCH_BLOCK)


def whole_sampling_replays_in_a_graph(device: str) -> None:
    """Captured once, replayed under other settings, positions and logits; counts go on."""
    vocab_size, num_rows = 49_152, 5
    options = [{"top_k": 40}, {"top_p": 0.9}, {}, {"temperature": 0.0}, {"presence_penalty": 1.0}]
    sampler = make_sampler(options, vocab_size, device=device)
    variant = sampler.variant(np.arange(num_rows))
    rows = torch.arange(num_rows, device=device)
    positions = torch.zeros(num_rows, dtype=torch.int64, device=device)
    logits = torch.randn(num_rows, vocab_size, device=device)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        sampler.sample(logits, rows, positions, variant)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token_ids = sampler.sample(logits, rows, positions, variant)
    for step in range(4):
        sampler.set_row(0, SamplingParams(top_k=3 + step), seed=step)
        sampler.flush()
        logits.normal_()
        positions.fill_(step)
        before = _on_cpu(sampler)
        graph.replay()
        host_positions = torch.full((num_rows,), step)
        expected = sampling_reference.sample_tokens_reference(
            logits.cpu(), before, torch.arange(num_rows), host_positions
        )
        assert token_ids.tolist() == expected.tolist()
        assert before.counts is not None
        assert sampler.tables.counts is not None
        assert torch.equal(before.counts, sampler.tables.counts.cpu())


GPU_CASES = {
    **CASES,
    full_vocabularies_keep_the_right_set.__name__: full_vocabularies_keep_the_right_set,
    whole_sampling_replays_in_a_graph.__name__: whole_sampling_replays_in_a_graph,
}


def main() -> None:
    results: dict[str, str | None] = {}
    for name, case in CASES.items():
        try:
            case("cpu")
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
