"""First and last kernels of a captured step against what the eager path lays out on the host.

On a GPU as they are, without one in Triton's interpreter (`test_triton_interpreter.py`).
"""

from __future__ import annotations

import os
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine.core.batch import BlockUpdate, PrefixGroup, ScheduledBatch
from engine.core.prefix_groups import MAX_GROUPS
from engine.kernels.captured_inputs import CapturedInputs
from engine.kernels.sampling_reference import NUM_SETTING_WORDS
from engine.runner.step_inputs import build_host_inputs
from engine.runner.step_slots import NUM_SLOTS, StepSlots

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not IS_INTERPRETED and not torch.cuda.is_available(),
        reason="needs a CUDA device, or TRITON_INTERPRET=1",
    ),
]

MAX_SEQS, MAX_TOKENS, MAX_BLOCKS, BLOCK_SIZE = 12, 96, 9, 16
NUM_BLOCKS = 200


class FakeTable:
    """The parts of a `SequenceTable` that a step reads."""

    def __init__(self, rng: random.Random) -> None:
        length = MAX_BLOCKS * BLOCK_SIZE
        values = np.random.default_rng(rng.randrange(1 << 30))
        self.token_ids = values.integers(3, 900, (MAX_SEQS, length)).astype(np.int32)
        self.block_table = values.integers(1, NUM_BLOCKS, (MAX_SEQS, MAX_BLOCKS)).astype(np.int32)


def make_batch(
    rng: random.Random, table: FakeTable, num_decodes: int, prefills: list[int]
) -> ScheduledBatch:
    """Decoding sequences with tokens in flight, then chunks of prompts; every block is new."""
    rows = np.array(rng.sample(range(MAX_SEQS), num_decodes + len(prefills)), dtype=np.int32)
    counts = np.array([1] * num_decodes + prefills, dtype=np.int32)
    starts = np.array(
        [rng.randrange(MAX_BLOCKS * BLOCK_SIZE - count) for count in counts.tolist()],
        dtype=np.int32,
    )
    is_sampling = np.array([True] * num_decodes + [rng.random() < 0.6 for _ in prefills], bool)
    for index in range(num_decodes):
        if rng.random() < 0.7:
            table.token_ids[rows[index], starts[index]] = -1
    return ScheduledBatch(
        step_id=0,
        rows=rows,
        num_scheduled_tokens=counts,
        num_computed_tokens=starts,
        is_sampling=is_sampling,
        needs_prompt_logprobs=np.zeros(len(rows), bool),
        block_updates=[
            BlockUpdate(row, 0, table.block_table[row].tolist()) for row in rows.tolist()
        ],
        num_tokens=int(counts.sum()),
    )


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if IS_INTERPRETED else "cuda")


def make_slots(device: torch.device) -> StepSlots:
    settings = torch.zeros((MAX_SEQS + 1, NUM_SETTING_WORDS), dtype=torch.int32, device=device)
    return StepSlots(MAX_SEQS, MAX_TOKENS, MAX_BLOCKS, BLOCK_SIZE, settings, device)


def begin(slots: StepSlots, num_seqs: int, num_tokens: int, *, is_pure_decode: bool) -> Any:
    from engine.kernels.captured_step import begin_captured_step

    device = slots.state.launch_count.device
    inputs = CapturedInputs.zeros(num_seqs, num_tokens, MAX_GROUPS, device)
    for owner in (inputs, inputs.shared_prefixes):
        for name in owner.__slots__:
            if isinstance(value := getattr(owner, name), torch.Tensor):
                value.fill_(-77)
    begin_captured_step(slots.state, inputs, BLOCK_SIZE, is_pure_decode=is_pure_decode)
    return inputs


NO_SETTINGS = (np.zeros(0, np.int32), np.zeros((0, NUM_SETTING_WORDS), np.int32))

CASES = {
    "one decode": (1, [], 1, 1),
    "decodes": (7, [], 7, 7),
    "padded decodes": (7, [], 12, 12),
    "one prompt": (0, [33], 1, 33),
    "padded prompt": (0, [33], 4, 40),
    "mixed": (5, [17, 2, 40], 8, 64),
    "mixed, padded": (3, [2, 9, 30, 8], 12, 96),
    "chunks alone": (0, [31, 5], 2, 36),
    "nobody": (0, [], 4, 16),
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("seed", [0, 1])
def test_inputs_equal_the_hosts(device: torch.device, case: str, seed: int) -> None:
    rng = random.Random(seed)
    num_decodes, prefills, max_seqs, max_tokens = CASES[case]
    table = FakeTable(rng)
    slots = make_slots(device)
    last_ids = torch.randint(3, 900, (MAX_SEQS + 1,), dtype=torch.int64)
    slots.state.last_token_ids.copy_(last_ids)
    batch = make_batch(rng, table, num_decodes, prefills)
    slots.note_new(batch.rows.tolist())
    is_pure_decode = not prefills and num_decodes > 0
    assert slots.write(batch, table, *NO_SETTINGS)  # type: ignore[arg-type]
    inputs = begin(slots, max_seqs, max_tokens, is_pure_decode=is_pure_decode)

    n, t = batch.num_seqs, batch.num_tokens
    if n == 0:
        expected = SimpleNamespace(
            input_ids=[],
            positions=[],
            slot_mapping=[],
            seq_lens=[],
            query_lens=[],
            query_start_loc=[0],
        )
    else:
        expected = build_host_inputs(batch, table, BLOCK_SIZE)  # type: ignore[arg-type]
        ids = torch.from_numpy(expected.input_ids)
        flat_rows = np.repeat(batch.rows, batch.num_scheduled_tokens)
        ids = torch.where(ids < 0, last_ids[torch.from_numpy(flat_rows.astype(np.int64))], ids)
        assert inputs.input_ids[:t].tolist() == ids.tolist()
        assert inputs.logits_indices[:n].tolist() == (expected.query_start_loc[1:] - 1).tolist()
        sampling_rows = np.where(batch.is_sampling, batch.rows, MAX_SEQS).tolist()
        assert inputs.sampling_rows[:n].tolist() == sampling_rows
        assert inputs.sampling_positions[:n].tolist() == expected.seq_lens.tolist()
        for row in batch.rows.tolist():
            assert slots.state.block_table[row].tolist() == table.block_table[row].tolist()
    assert inputs.positions[:t].tolist() == list(expected.positions)
    assert inputs.slot_mapping[:t].tolist() == list(expected.slot_mapping)
    assert inputs.seq_lens.tolist() == [*expected.seq_lens, *[0] * (max_seqs - n)]
    assert inputs.query_lens.tolist() == [*expected.query_lens, *[0] * (max_seqs - n)]
    assert inputs.query_start_loc.tolist() == [*expected.query_start_loc, *[t] * (max_seqs - n)]
    assert inputs.block_rows.tolist() == [*batch.rows, *[MAX_SEQS] * (max_seqs - n)]
    assert inputs.device_counts.tolist() == [num_decodes, n]
    # Padding writes nowhere and is a valid input.
    assert inputs.slot_mapping[t:].tolist() == [-1] * (max_tokens - t)
    assert inputs.positions[t:].tolist() == [0] * (max_tokens - t)
    assert all(0 <= token_id < 900 for token_id in inputs.input_ids[t:].tolist())
    assert inputs.sampling_rows[n:].tolist() == [MAX_SEQS] * (max_seqs - n)
    assert all(0 <= index < max_tokens for index in inputs.logits_indices.tolist())


@pytest.mark.parametrize("sizes", [[], [3], [2, 4, 1], [1] * MAX_GROUPS])
@pytest.mark.parametrize("is_mixed", [False, True])
def test_prefix_groups(device: torch.device, sizes: list[int], is_mixed: bool) -> None:
    rng = random.Random(len(sizes))
    max_seqs = 40
    slots = StepSlots(
        max_seqs,
        MAX_TOKENS,
        MAX_BLOCKS,
        BLOCK_SIZE,
        torch.zeros((max_seqs + 1, NUM_SETTING_WORDS), dtype=torch.int32, device=device),
        device,
    )
    table = FakeTable(rng)
    num_decodes = 9
    batch = make_batch(rng, table, num_decodes, [8, 3] if is_mixed else [])
    if len(sizes) > num_decodes:
        batch = make_batch(rng, table, 12, [])
        sizes = sizes[:12]
    places = rng.sample(range(batch.num_decodes), sum(sizes))
    for index, size in enumerate(sizes):
        members = np.array(sorted(places[:size]), np.int32)
        places = places[size:]
        batch.prefix_groups.append(PrefixGroup(members, 2 + index))
    # What an earlier step left in the slot and on the device must not be seen.
    slots._params[:, 20:900] = 5
    assert slots.write(batch, table, *NO_SETTINGS)  # type: ignore[arg-type]
    tokens = 40 if is_mixed else 16
    inputs = begin(slots, 16, tokens, is_pure_decode=not is_mixed)
    shared = inputs.shared_prefixes
    lengths = [group.num_blocks * BLOCK_SIZE for group in batch.prefix_groups]
    unused = MAX_GROUPS - len(lengths)
    ends = np.cumsum([0, *(len(group.members) for group in batch.prefix_groups)]).tolist()
    assert shared.group_lens.tolist() == lengths + [0] * unused
    assert shared.member_start.tolist() == ends + [ends[-1]] * unused
    expected = [0] * 16
    for group, length in zip(batch.prefix_groups, lengths, strict=True):
        for member in group.members.tolist():
            expected[member] = length
    assert shared.prefix_lens.tolist() == expected
    everybody = [m for group in batch.prefix_groups for m in group.members.tolist()]
    assert shared.members[: ends[-1]].tolist() == everybody


def test_settings_and_slots_go_round(device: torch.device) -> None:
    """Every launch reads its own slot and tells its own results, also after the ring's end."""
    from engine.kernels.captured_step import finish_captured_step

    rng = random.Random(5)
    slots = make_slots(device)
    known = np.zeros((MAX_SEQS + 1, NUM_SETTING_WORDS), np.int32)
    tickets = []
    for launch in range(NUM_SLOTS + 3):
        table = FakeTable(rng)
        batch = make_batch(rng, table, 6, [])
        rows = np.array(rng.sample(range(MAX_SEQS), rng.randrange(4)), np.int32)
        words = np.full((len(rows), NUM_SETTING_WORDS), launch, np.int32)
        words += np.arange(NUM_SETTING_WORDS, dtype=np.int32)
        known[rows] = words
        slots.write(batch, table, rows, words)  # type: ignore[arg-type]
        inputs = begin(slots, 8, 8, is_pure_decode=True)
        before = slots.state.last_token_ids.clone()
        assert inputs.input_ids[:6].tolist() == before[batch.rows.tolist()].tolist()
        token_ids = torch.randint(0, 900, (8,), dtype=torch.int64, device=device)
        token_ids[launch % 6] = -1
        finish_captured_step(slots.state, inputs, token_ids)
        if device.type == "cuda":
            torch.cuda.synchronize()
        ticket = slots.count_launch()
        tickets.append(ticket)
        assert ticket.is_done(6)
        assert ticket.token_ids(6).tolist() == token_ids[:6].tolist()
        after = slots.state.last_token_ids
        expected = before.clone()
        expected[batch.rows.tolist()] = token_ids[:6].clamp(min=0)
        assert after.tolist() == expected.tolist()
        assert slots.state.settings.tolist() == known.tolist()
    assert not tickets[0].is_done(6), "the slot belongs to a later step by now"
    assert not slots.count_launch().is_done(6), "nothing was launched for this ticket"
    slots.follow_device()
    assert slots.state.launch_count.item() == NUM_SLOTS + 3


def test_chunks_keep_the_last_tokens(device: torch.device) -> None:
    """A row whose prompt is not finished samples nothing that a later step could read."""
    from engine.kernels.captured_step import finish_captured_step

    rng = random.Random(2)
    table = FakeTable(rng)
    slots = make_slots(device)
    slots.state.last_token_ids.fill_(5)
    batch = make_batch(rng, table, 0, [10, 20])
    batch.is_sampling[:] = [False, True]
    slots.write(batch, table, *NO_SETTINGS)  # type: ignore[arg-type]
    inputs = begin(slots, 4, 32, is_pure_decode=False)
    finish_captured_step(slots.state, inputs, torch.full((4,), 9, dtype=torch.int64, device=device))
    last = slots.state.last_token_ids.tolist()
    assert last[batch.rows[0]] == 5
    assert last[batch.rows[1]] == 9
    assert last.count(9) == 1


def test_a_grown_sequence_changes_one_entry(device: torch.device) -> None:
    rng = random.Random(4)
    table = FakeTable(rng)
    slots = make_slots(device)
    batch = make_batch(rng, table, 2, [])
    row = int(batch.rows[1])
    batch.block_updates = [BlockUpdate(row, 5, table.block_table[row, 5:7].tolist())]
    slots.write(batch, table, *NO_SETTINGS)  # type: ignore[arg-type]
    begin(slots, 2, 2, is_pure_decode=True)
    expected = np.zeros((MAX_SEQS + 1, MAX_BLOCKS), np.int32)
    expected[row, 5:7] = table.block_table[row, 5:7]
    assert slots.state.block_table.tolist() == expected.tolist()


def test_more_changes_than_a_slot_holds_are_refused(device: torch.device) -> None:
    rng = random.Random(1)
    table = FakeTable(rng)
    slots = make_slots(device)
    batch = make_batch(rng, table, 2, [])
    batch.block_updates *= 1000
    assert not slots.write(batch, table, *NO_SETTINGS)  # type: ignore[arg-type]
    inputs = begin(slots, 2, 2, is_pure_decode=True)
    assert inputs.block_rows.tolist() == batch.rows.tolist()
    assert not slots.state.block_table.any(), "the caller brings the changes, all of them"
