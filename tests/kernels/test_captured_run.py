"""Whole runs of captured steps under the real scheduler, without a GPU.

A launcher that runs what was "captured" whenever it is launched, and a model whose next token is a
function of the whole history it reads back through block table and KV slots. The kernels are the
real ones, in Triton's interpreter (`test_triton_interpreter.py` runs this file so). The harness of
the scheduler's tests drives it, several steps ahead, and compares every answer with the same model
run alone.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from core_fakes import VOCAB_SIZE, Harness, next_token

from engine.core.batch import ScheduledBatch
from engine.core.prefix_groups import MIN_BLOCKS, PrefixGroups
from engine.core.request import Sequence
from engine.runner.sampler import Sampler
from engine.runner.step_slots import NUM_SLOTS, StepSlots, StepTicket

pytest.importorskip("triton", reason="Triton is not installed on this platform")
from engine.kernels.compile_ahead import without_launches
from engine.runner.captured_steps import CapturedSteps

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not IS_INTERPRETED, reason="runs Triton kernels on CPU tensors: needs TRITON_INTERPRET=1"
)

CPU = torch.device("cpu")
# `next_token` of the harness may return VOCAB_SIZE itself.
NUM_LOGITS = VOCAB_SIZE + 1


class ImmediateLauncher:
    """Runs the captured work on launch, with the padded sizes of its capture."""

    def capture(self, work: Any) -> Any:
        return work

    def launch(self, graph: Any) -> None:
        graph()


class HistoryModel:
    """Keeps the id of each token in its KV slot, and continues what it reads there."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.config = SimpleNamespace(vocab_size=NUM_LOGITS)
        self.kv = torch.full((num_blocks * block_size,), -1, dtype=torch.int64)
        self.owners: dict[int, Sequence] = {}
        self.block_size = block_size
        self.num_empty = 0
        self.num_shared = 0
        self.is_dry = False

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[list[int]]:
        yield []

    def forward(self, input_ids: torch.Tensor, kv_caches: Any, metadata: Any) -> torch.Tensor:
        if self.is_dry:
            return torch.zeros((len(input_ids), 1), dtype=torch.int64)
        slots = metadata.slot_mapping
        is_token = slots >= 0
        self.kv[slots[is_token]] = input_ids[is_token]
        num_decodes, num_seqs = metadata.device_counts.tolist()
        self.num_empty += num_seqs == 0
        hidden = torch.zeros((len(input_ids), 1), dtype=torch.int64)
        assert (metadata.query_lens[:num_decodes] == 1).all()
        assert int(metadata.query_lens.sum()) == int(is_token.sum())
        for index in range(num_seqs):
            row, length = int(metadata.block_rows[index]), int(metadata.seq_lens[index])
            last = int(metadata.query_start_loc[index + 1]) - 1
            assert int(metadata.positions[last]) == length - 1
            positions = torch.arange(length)
            blocks = metadata.block_table[row][positions // self.block_size].long()
            history = self.kv[blocks * self.block_size + positions % self.block_size].tolist()
            assert min(history) >= 0, f"row {row} reads a slot nobody wrote"
            hidden[last] = next_token(self.owners[row], history)
        if metadata.shared_prefixes is not None:
            self._check_groups(metadata)
        return hidden

    def _check_groups(self, metadata: Any) -> None:
        shared = metadata.shared_prefixes
        starts = shared.member_start.tolist()
        for group, length in enumerate(shared.group_lens.tolist()):
            members = shared.members[starts[group] : starts[group + 1]].tolist()
            assert bool(members) == (length > 0)
            if not members:
                continue
            assert length % self.block_size == 0
            tables = {
                tuple(
                    metadata.block_table[int(metadata.block_rows[member])][
                        : length // self.block_size
                    ].tolist()
                )
                for member in members
            }
            assert len(tables) == 1
            for member in members:
                assert int(shared.prefix_lens[member]) == length < int(metadata.seq_lens[member])
                self.num_shared += 1

    def compute_logits(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        out.zero_()
        out[torch.arange(len(hidden)), hidden[:, 0]] = 1.0
        return out


class CapturedDevice:
    """The harness's device: launches captured steps and reads their results by their tickets."""

    def __init__(self, harness: Harness, num_blocks: int, max_num_seqs: int) -> None:
        self._scheduler = harness.scheduler
        table = harness.scheduler.table
        config: Any = SimpleNamespace(
            block_size=harness.block_size,
            max_model_len=table.max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=harness.budget,
            device=CPU,
            dtype=torch.float32,
        )
        self.model = HistoryModel(num_blocks, harness.block_size)
        self.sampler = Sampler(NUM_LOGITS, max_num_seqs, CPU)
        self.slots = StepSlots(
            max_num_seqs,
            max(harness.budget, max_num_seqs),
            table.max_blocks,
            harness.block_size,
            self.sampler.tables.settings,
            CPU,
        )
        model: Any = self.model
        self.captured = CapturedSteps(
            model, self.sampler, [], config, self.slots, ImmediateLauncher()
        )
        with without_launches():
            # As the start of an engine does; nothing of it may be left.
            self.model.is_dry = True
            self.captured.launch_each_kernel(self.sampler.greedy_variant)
            self.model.is_dry = False
        self._queue: deque[tuple[ScheduledBatch, StepTicket]] = deque()
        self.num_launches = 0

    def launch(self, batch: ScheduledBatch) -> None:
        table = self._scheduler.table
        self.slots.note_new(batch.new_rows)
        for row in batch.new_rows:
            seq = table.sequences[row]
            assert seq is not None
            self.model.owners[row] = seq
            self.sampler.set_row(
                row,
                seq.request.params,
                seed=seq.seed,
                prompt_token_ids=seq.request.prompt_token_ids,
            )
        ticket = self.captured.launch(batch, table, self.sampler.live_variant())
        self._queue.append((batch, ticket))
        self.num_launches += 1

    def run_oldest(self) -> tuple[ScheduledBatch, np.ndarray]:
        batch, ticket = self._queue.popleft()
        assert ticket.is_done(batch.num_seqs)
        token_ids = ticket.token_ids(batch.num_seqs)
        token_ids[~batch.is_sampling] = -1
        return batch, token_ids


def make_harness(max_num_seqs: int = 6, num_blocks: int = 90, **options: Any) -> Harness:
    harness = Harness(max_num_seqs=max_num_seqs, num_blocks=num_blocks, **options)
    device: Any = CapturedDevice(harness, num_blocks, max_num_seqs)
    harness.device = device
    return harness


@pytest.mark.parametrize("steps_in_flight", [1, 3])
@pytest.mark.parametrize("budget", [7, 40])
def test_any_load_gives_every_request_its_own_tokens(steps_in_flight: int, budget: int) -> None:
    """Chunks, mixed and pure steps, stop ids met in flight, preemption, rows used again."""
    rng = random.Random(10 * budget + steps_in_flight)
    harness = make_harness(num_blocks=18, budget=budget, steps_in_flight=steps_in_flight)
    system = [rng.randrange(1, VOCAB_SIZE) for _ in range(9)]
    for _ in range(30):
        prompt = system[: rng.randrange(9)] + [
            rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randrange(1, 16))
        ]
        harness.submit(prompt, max_tokens=rng.randrange(1, 20), temperature=0.0)
        for _ in range(rng.randrange(4)):
            harness.turn()
        if rng.random() < 0.1 and harness.submitted:
            harness.abort(rng.choice(harness.submitted))
    harness.run()
    device: Any = harness.device
    assert device.num_launches > NUM_SLOTS, "the ring of slots goes round"
    assert sum(seq.num_preemptions for seq in harness.submitted) > 0


def test_groups_that_share_a_prefix() -> None:
    harness = make_harness(
        max_num_seqs=8, num_blocks=150, budget=64, max_model_len=64, steps_in_flight=2
    )
    scheduler: Any = harness.scheduler
    scheduler._prefix_groups = PrefixGroups(scheduler.table, harness.block_size)
    context = [1 + index % (VOCAB_SIZE - 1) for index in range(MIN_BLOCKS * harness.block_size + 2)]
    for index in range(7):
        harness.submit([*context, 3 + index], max_tokens=6 + index, eos=False, temperature=0.0)
    harness.submit([9, 8, 7], max_tokens=9, eos=False, temperature=0.0)
    harness.run()
    device: Any = harness.device
    assert device.model.num_shared > 20


def test_a_capture_runs_an_empty_step() -> None:
    """The runs that compile must not repeat what an earlier step left in its slot."""
    harness = make_harness()
    device: Any = harness.device
    captured = device.captured
    run_sampling, seen = captured._run_sampling, set()

    def spy(num_seqs: int, variant: Any) -> None:
        if (num_seqs, variant) not in seen:
            seen.add((num_seqs, variant))
            rows = captured._inputs.sampling_rows[:num_seqs]
            assert (rows == device.sampler.dummy_row).all(), "a row of an earlier step is sampled"
        run_sampling(num_seqs, variant)

    captured._run_sampling = spy
    header = device.slots._params[:, : device.slots.state.layout.seqs]
    # The second request finds its forward graphs captured, but not the sampling it needs.
    for sampling in ({"temperature": 0.0}, {"temperature": 0.1, "top_k": 1}):
        header[...] = 2
        harness.submit([5, 6, 7], max_tokens=3, eos=False, **sampling)
        harness.run()
    assert device.model.num_empty == len(captured._forwards) == 2
    assert len(seen) == 4


def test_more_changes_of_the_block_table_than_a_slot_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.runner.step_slots._MAX_UPDATES", 3)
    harness = make_harness(budget=40, steps_in_flight=2)
    rng = random.Random(8)
    for length in (30, 3, 17, 9, 40, 6):
        prompt = [rng.randrange(1, VOCAB_SIZE) for _ in range(length)]
        harness.submit(prompt, max_tokens=12, temperature=0.0, eos=False)
    harness.run()
