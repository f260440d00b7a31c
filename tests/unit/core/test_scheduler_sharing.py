"""Which KV blocks sequences share."""

from __future__ import annotations

import pytest
from core_fakes import Harness

from engine.core.request import Request


def _computed(harness: Harness, request: Request, index: int = 0) -> int:
    """Prompt tokens computed for a request that was just admitted."""
    return request.num_prompt_tokens - request.sequences[index].num_cached_tokens


def test_sequences_of_one_step_share_a_prefix() -> None:
    harness = Harness(block_size=4)
    requests = [harness.submit([7] * 9 + [own], max_tokens=3) for own in (1, 2, 3)]
    batch = harness.launch()
    assert batch is not None
    assert sorted(batch.num_scheduled_tokens.tolist()) == [2, 2, 10]
    tables = [harness.scheduler.block_tables.block_ids(row) for row in range(3)]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]
    assert len({blocks[2] for blocks in tables}) == 3
    assert [request.sequences[0].num_cached_tokens for request in requests] == [0, 8, 8]
    harness.run()


def test_one_prompt_token_is_always_computed() -> None:
    harness = Harness(block_size=4)
    requests = [harness.submit([7] * 8, max_tokens=2) for _ in range(2)]
    batch = harness.launch()
    assert batch is not None
    assert sorted(batch.num_scheduled_tokens.tolist()) == [4, 8]
    assert [request.sequences[0].num_cached_tokens for request in requests] == [0, 4]
    harness.run()


def test_blocks_outlive_their_request() -> None:
    harness = Harness(block_size=4)
    harness.submit([7] * 9)
    harness.run()
    request = harness.submit([7] * 9)
    harness.launch()
    assert _computed(harness, request) == 1


def test_the_next_turn_of_a_conversation_reuses_the_answer() -> None:
    harness = Harness(block_size=4, steps_in_flight=3)
    first = harness.submit([7] * 5, max_tokens=9, eos=False)
    harness.run()
    answer = first.sequences[0].output_token_ids
    second = harness.submit([7] * 5 + answer + [8])
    harness.launch()
    # 5 + 9 tokens, but the answer's last one was never computed: 13 tokens, 3 full blocks.
    assert second.sequences[0].num_cached_tokens == 12
    harness.run()


def test_salts_separate_and_equal_salts_share() -> None:
    harness = Harness(block_size=4, max_num_seqs=8)
    salts = [None, "", "a", "b", "a", None]
    requests = [harness.submit([7] * 9, cache_salt=salt) for salt in salts]
    harness.launch()
    assert [r.sequences[0].num_cached_tokens for r in requests] == [0, 0, 0, 0, 8, 8]
    harness.run()


def test_without_the_cache_only_the_answers_of_one_request_share() -> None:
    harness = Harness(block_size=4, caching=False, max_num_seqs=8)
    one = harness.submit([7] * 9, n=3)
    single = harness.submit([7] * 9)
    other = harness.submit([7] * 9, n=2)
    harness.launch()
    assert [seq.num_cached_tokens for seq in one.sequences] == [0, 8, 8]
    assert [seq.num_cached_tokens for seq in single.sequences] == [0]
    assert [seq.num_cached_tokens for seq in other.sequences] == [0, 8]
    assert harness.scheduler.stats().prefix_query_tokens == 45
    harness.run()
    assert harness.scheduler.stats().prefix_hit_tokens == 24


@pytest.mark.parametrize("budget", [1, 3, 5, 64])
def test_prompt_logprobs_compute_every_token(budget: int) -> None:
    """But only for the first answer, and others may read what it wrote."""
    harness = Harness(block_size=4, max_num_seqs=8, budget=budget)
    harness.submit([7] * 9, max_tokens=2)
    harness.run()
    request = harness.submit([7] * 9, n=2, prompt_logprobs=0, max_tokens=2)
    reporting: dict[int, list[int]] = {0: [], 1: []}
    while harness.scheduler.has_unfinished:
        batch = harness.launch()
        assert batch is not None
        for seq, row in harness.scheduler.sequences_with_rows(batch):
            index = batch.rows.tolist().index(row)
            start = int(batch.num_computed_tokens[index])
            if batch.needs_prompt_logprobs[index]:
                end = start + int(batch.num_scheduled_tokens[index])
                reporting[seq.index] += range(start, end)
        harness.collect()
    assert [p for p in reporting[0] if p < 8] == list(range(8))
    assert reporting[1] == []
    assert [seq.num_cached_tokens for seq in request.sequences] == [0, 8]


def test_no_needless_prompt_logprobs_flag() -> None:
    """The last prompt token's logits are about the first new token."""
    harness = Harness(budget=8)
    harness.submit([7] * 9, prompt_logprobs=1)
    flags = []
    for _ in range(3):
        batch = harness.launch()
        assert batch is not None
        flags.append(batch.needs_prompt_logprobs.tolist())
        harness.collect()
    assert flags == [[True], [False], [False]]


def test_a_prefix_longer_than_the_budget_is_computed_once() -> None:
    harness = Harness(block_size=4, budget=6, num_blocks=200)
    for own in range(4):
        harness.submit([7] * 21 + [own + 1], max_tokens=1)
    counts = []
    while harness.scheduler.has_unfinished:
        batch = harness.launch()
        assert batch is not None
        counts.append(batch.num_tokens)
        harness.collect()
    # 22 tokens for the first, 2 for each of the others, and never a wait.
    assert counts == [6, 6, 6, 6, 4]


def test_an_aborted_prefill_leaves_what_it_has_computed() -> None:
    harness = Harness(block_size=4, budget=9)
    first = harness.submit([7] * 30)
    second = harness.submit([7] * 30)
    harness.launch()
    harness.abort(first.sequences[0])
    harness.launch()
    assert second.sequences[0].num_cached_tokens == 8
    harness.run()


def test_cached_blocks_make_room_for_new_ones() -> None:
    harness = Harness(block_size=4, num_blocks=6)
    for token in range(1, 6):
        harness.submit([token] * 17, max_tokens=3)
        harness.run()
    assert harness.scheduler.stats().blocks_cached <= 5
    again = harness.submit([5] * 17, max_tokens=3)
    harness.launch()
    assert again.sequences[0].num_cached_tokens == 16


def test_reset_forgets() -> None:
    harness = Harness(block_size=4)
    harness.submit([7] * 9)
    harness.run()
    harness.scheduler.reset_prefix_cache()
    request = harness.submit([7] * 9)
    harness.launch()
    assert _computed(harness, request) == 9
    harness.run()
