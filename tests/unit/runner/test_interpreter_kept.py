"""What the engine thread does in each step keeps the GIL, however many sequences run."""

import sys
import threading
import time

import numpy as np
import pytest
import torch
from core_fakes import make_request

from engine.core.batch import StepOutput
from engine.core.output import OutputProcessor
from engine.core.pieces import MAX_PIECE, gathered, joined, pieces
from engine.core.scheduler import Scheduler
from engine.kernels.sampling_reference import NUM_SETTING_WORDS
from engine.prompts import check_token_ids
from engine.runner.pending_step import CapturedPendingStep
from engine.runner.sampler import Sampler
from engine.runner.step_slots import StepSlots
from engine.stats import Counters


class Neighbour:
    """A thread that takes the interpreter whenever it is given up, and only then."""

    def __init__(self):
        self.num_turns = 0
        self._is_over = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        # First: a thread that waits already asks for the interpreter after the interval of before.
        self._interval_s = sys.getswitchinterval()
        sys.setswitchinterval(100.0)
        self._thread.start()
        return self

    def __exit__(self, *_):
        sys.setswitchinterval(self._interval_s)
        self._is_over = True
        self._thread.join()

    def _run(self):
        while not self._is_over:
            self.num_turns += 1
            time.sleep(20e-6)


class Steps:
    """Scheduler, slots and output processor as on a GPU, with a device that does nothing."""

    def __init__(self, num_seqs):
        self.scheduler = Scheduler(
            max_num_seqs=num_seqs,
            max_num_batched_tokens=8192,
            max_model_len=1024,
            block_size=16,
            num_blocks=64 * num_seqs,
            enable_prefix_caching=True,
            finds_prefix_groups=True,
        )
        self.sampler = Sampler(1000, num_seqs, torch.device("cpu"))
        self.outputs = OutputProcessor(self.scheduler, None, Counters(), self.sampler.free_row)
        self.table = self.scheduler.table
        self.slots = StepSlots(
            num_seqs,
            8192,
            self.table.max_blocks,
            16,
            torch.zeros((num_seqs + 1, NUM_SETTING_WORDS), dtype=torch.int32),
            torch.device("cpu"),
        )

    def add(self, prompt, **params):
        request = make_request(self.scheduler, prompt, **params)
        self.outputs.add(request, self)
        for seq in request.sequences:
            self.scheduler.add(seq)

    def publish(self, deltas=None, output=None, error=None):
        assert error is None
        return []

    def run(self):
        batch = self.scheduler.schedule()
        self.slots.note_new(batch.new_rows)
        for row in batch.new_rows:
            seq = self.table.sequences[row]
            self.sampler.set_row(
                row,
                seq.request.params,
                seed=seq.seed,
                prompt_token_ids=seq.request.prompt_token_ids,
                output_token_ids=self.table.output_tokens(row),
                stop_token_ids=seq.request.stop_token_ids,
                bad_words_ids=[],
            )
        self.sampler.flush_lists()
        self.sampler.live_variant()
        settings = self.sampler.take_changed_settings()
        assert self.slots.write(batch, self.table, *settings)
        ticket = self.slots.count_launch()
        results = self.slots._results[(self.slots._launch_count - 1) % len(self.slots._results)]
        for piece in pieces(batch.num_seqs):
            results[piece] = (self.slots._launch_count << 32) + 7
        pending = CapturedPendingStep(ticket, batch.is_sampling, None, {})
        assert pending.is_done
        output = pending.wait()
        self.outputs.process(batch, output)
        self.outputs.take_wakeups()
        return batch, output


@pytest.mark.parametrize("num_seqs", [256, 512])
def test_steady_steps_keep_the_interpreter(num_seqs):
    steps = Steps(num_seqs)
    for number in range(num_seqs):
        steps.add([number + 2, 3, 4], max_tokens=400, eos=False)
    steps.run()
    batch, output = steps.run()
    assert batch.num_tokens == batch.num_seqs == num_seqs
    assert set(output.token_ids.tolist()) == {7}
    # What runs for the first time may import modules and make caches.
    with Neighbour() as neighbour:
        before = neighbour.num_turns
        for _ in range(200):
            steps.run()
        assert neighbour.num_turns == before


@pytest.mark.parametrize("num_seqs", [256, 512])
def test_admissions_and_ends_keep_the_interpreter(num_seqs):
    """A full house with prompts of up to 900 tokens, where somebody ends in most steps."""
    rng = np.random.default_rng(2)
    steps = Steps(num_seqs)
    for _ in range(num_seqs * 2):
        length, new = int(rng.integers(1, 900)), int(rng.integers(60, 124))
        steps.add(rng.integers(2, 90, length).tolist(), max_tokens=new, eos=False)
    while steps.scheduler.num_running < num_seqs:
        steps.run()
    num_admitted = num_ended = 0
    with Neighbour() as neighbour:
        before = neighbour.num_turns
        for _ in range(150):
            num_running = steps.scheduler.num_running
            batch, _ = steps.run()
            num_admitted += len(batch.new_rows)
            num_ended += num_running + len(batch.new_rows) - steps.scheduler.num_running
        assert neighbour.num_turns == before
    assert num_admitted > num_seqs // 2 < num_ended


def test_checking_prompts_keeps_the_interpreter():
    prompts = [[7] * length for length in (100, 501, 1500, 16000)] * 20
    with Neighbour() as neighbour:
        before = neighbour.num_turns
        for prompt in prompts:
            assert check_token_ids(prompt, 10).tolist() == prompt
        assert neighbour.num_turns == before


def test_the_neighbour_sees_what_gives_the_interpreter_up():
    """The test above can fail: one of the operations that it replaces is seen."""
    rows = np.random.default_rng(0).permutation(512)
    values = np.zeros(512, np.int32)
    with Neighbour() as neighbour:
        before = neighbour.num_turns
        for _ in range(20_000):
            _ = values[rows]
        assert neighbour.num_turns > before


@pytest.mark.parametrize("length", [0, 1, 499, 500, 501, 512, 1000, 1001, 1777])
def test_pieces_cover_everything_once(length):
    found = pieces(length)
    assert [one for piece in found for one in range(piece.start, piece.stop)] == list(range(length))
    assert all(piece.stop - piece.start <= MAX_PIECE for piece in found)
    values, indices = np.arange(length) * 3, np.arange(length)[::-1].astype(np.intp)
    assert joined([values[piece] for piece in found]).tolist() == values.tolist()
    assert gathered(values, indices).tolist() == values[indices].tolist()


@pytest.mark.parametrize("num_seqs", [40, 300])
def test_a_batch_in_pieces_is_the_same_batch(num_seqs, monkeypatch):
    """Prompts, chunks, ends and admissions with pieces of 7 sequences, and without pieces."""

    def histories(max_piece):
        monkeypatch.setattr("engine.core.pieces.MAX_PIECE", max_piece)
        monkeypatch.setattr("engine.core.running_plan.MAX_PIECE", max_piece)
        rng = np.random.default_rng(1)
        steps = Steps(num_seqs)
        seen = []
        for _ in range(num_seqs * 2):
            length, new = int(rng.integers(1, 200)), int(rng.integers(1, 30))
            steps.add(rng.integers(2, 90, length).tolist(), max_tokens=new, eos=False)
        while steps.scheduler.has_unfinished:
            batch, output = steps.run()
            assert isinstance(output, StepOutput)
            seen.append(
                (
                    batch.rows.tolist(),
                    batch.num_scheduled_tokens.tolist(),
                    batch.num_computed_tokens.tolist(),
                    batch.is_sampling.tolist(),
                    batch.num_decodes,
                    output.token_ids.tolist(),
                    steps.table.num_tokens.tolist(),
                    [list(update.block_ids) for update in batch.block_updates],
                    steps.slots._params.sum().item(),
                )
            )
        return seen

    assert histories(7) == histories(10**6)
