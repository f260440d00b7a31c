"""Many streams share a part of the engine thread's time; none is forgotten, nothing is lost."""

import numpy as np
import pytest
from core_fakes import make_request

from engine.core import output as output_module
from engine.core import stream_pacing
from engine.core.batch import StepOutput
from engine.core.output import OutputProcessor
from engine.core.scheduler import Scheduler
from engine.stats import Counters


class Clock:
    """A clock that a publication moves by `publish_s`, and nothing else."""

    def __init__(self, publish_s):
        self.now_s = 100.0
        self.publish_s = publish_s

    def perf_counter(self):
        return self.now_s

    def monotonic(self):
        return self.now_s


class Sink:
    """Notes what a handle would be given."""

    def __init__(self, clock):
        self._clock = clock
        self.deltas = []
        self.output = None

    def publish(self, deltas=None, output=None, error=None):
        assert error is None
        self._clock.now_s += self._clock.publish_s
        self.deltas.append([token_id for delta in deltas or () for token_id in delta.token_ids])
        self.output = output or self.output
        return []


class Bench:
    """Scheduler and output processor with a device that counts up per sequence."""

    def __init__(self, num_requests, monkeypatch, *, publish_s, **params):
        self.clock = Clock(publish_s)
        monkeypatch.setattr(output_module, "time", self.clock)
        monkeypatch.setattr(stream_pacing, "time", self.clock)
        self.readers = (0.0, 0)
        self.scheduler = Scheduler(
            max_num_seqs=64,
            max_num_batched_tokens=256,
            max_model_len=64,
            block_size=16,
            num_blocks=300,
            enable_prefix_caching=False,
        )
        self.outputs = OutputProcessor(
            self.scheduler, None, Counters(), lambda row: None, lambda: self.readers
        )
        self.requests, self.sinks = [], []
        for _ in range(num_requests):
            self.add(**params)

    def add(self, *, is_streamed=True, **params):
        request = make_request(self.scheduler, [1, 2], **{"max_tokens": 20, **params})
        self.requests.append(request)
        self.sinks.append(Sink(self.clock))
        self.outputs.add(request, self.sinks[-1])
        for seq in request.sequences:
            self.scheduler.add(seq)
        if is_streamed:
            self.outputs.start_stream(request)
            self.outputs.take_wakeups()

    def step(self, passing_s):
        """One step of so many seconds; the places of the sinks that were given something."""
        before = [len(sink.deltas) for sink in self.sinks]
        batch = self.scheduler.schedule()
        assert batch is not None
        self.clock.now_s += passing_s
        # A sequence's n-th new token is 10 + n, so that the order can be seen.
        computed = batch.num_computed_tokens + batch.num_scheduled_tokens
        ids = np.where(batch.is_sampling, 10 + computed - 2, -1).astype(np.int64)
        self.outputs.process(batch, StepOutput(ids))
        self.outputs.take_wakeups()
        return [
            place
            for place, (sink, count) in enumerate(zip(self.sinks, before, strict=True))
            if len(sink.deltas) > count
        ]


def test_a_few_streams_get_every_token_of_every_step(monkeypatch):
    bench = Bench(4, monkeypatch, publish_s=0.00001)
    for _ in range(10):
        assert bench.step(0.003) == [0, 1, 2, 3]
    for sink in bench.sinks:
        assert sink.deltas == [[token_id] for token_id in range(10, 20)]


def test_many_streams_share_a_part_of_the_time_in_turn(monkeypatch):
    bench = Bench(40, monkeypatch, publish_s=0.00003)
    assert bench.step(0.003) == list(range(40))  # first tokens wait for nobody
    # 8 % of 3 ms are 8 publications; what they take themselves passes as well.
    served = [bench.step(0.003) for _ in range(8)]
    assert all(8 <= len(places) <= 11 for places in served)
    turns = [place for places in served for place in places]
    assert len(set(turns[:40])) == min(40, len(turns))
    # Whoever waited gets all of it at once.
    longest = max((sink.deltas[-1] for sink in bench.sinks), key=len)
    assert longest == list(range(longest[0], longest[0] + len(longest)))
    assert len(longest) >= 3


def test_what_readers_take_counts_as_well(monkeypatch):
    """Readers that were measured to take five times as long as the engine are served less often."""
    counts = []
    for reader_s in (0.0, 0.00015):
        bench = Bench(40, monkeypatch, publish_s=0.00003, max_tokens=60, eos=False)
        bench.step(0.003)
        served = []
        for _ in range(50):
            served.append(bench.step(0.003))
            seconds, count = bench.readers
            more = len(served[-1])
            bench.readers = (seconds + reader_s * more, count + more)
        counts.append(sum(map(len, served[30:])))
        turns = [place for places in served for place in places]
        assert max(map(turns.count, range(40))) - min(map(turns.count, range(40))) <= 1
    assert 5.5 <= counts[0] / counts[1] <= 6.5


def test_a_burst_is_made_up_for_and_then_forgotten(monkeypatch):
    bench = Bench(40, monkeypatch, publish_s=0.00003, max_tokens=60, eos=False)
    bench.step(0.003)
    bench.readers = (0.5, 10_000)
    served = [len(bench.step(0.02)) for _ in range(20)]
    # 20 ms of the debt are remembered, which is the share of 12 such steps.
    assert served[:10] == [1] * 10
    assert min(served[15:]) > 10


def test_one_stream_at_least_is_served_in_each_step(monkeypatch):
    bench = Bench(3, monkeypatch, publish_s=1.0)
    bench.step(0.001)
    served = [bench.step(0.0) for _ in range(6)]
    assert all(len(places) == 1 for places in served)
    turns = [places[0] for places in served]
    assert sorted(turns[:3]) == [0, 1, 2]
    assert turns[3:] == turns[:3]


@pytest.mark.parametrize("publish_s", [0.00001, 0.01])
def test_nothing_is_lost_whatever_the_turns(monkeypatch, publish_s):
    bench = Bench(20, monkeypatch, publish_s=publish_s, eos=False)
    while bench.scheduler.has_unfinished:
        bench.step(0.003)
    for sink in bench.sinks:
        ids = [token_id for delta in sink.deltas for token_id in delta]
        assert ids == list(range(10, 30)) == sink.output.outputs[0].token_ids


def test_finished_and_aborted_streams_leave_the_round(monkeypatch):
    bench = Bench(2, monkeypatch, publish_s=0.00001, max_tokens=3, eos=False)
    bench.add(eos=False)
    bench.step(0.003)
    bench.outputs.abort(bench.requests[2])
    for _ in range(2):
        bench.step(0.003)
    bench.add(is_streamed=False, eos=False)
    bench.step(0.003)
    assert [sink.output is not None for sink in bench.sinks] == [True, True, True, False]
    assert bench.sinks[3].deltas == []
    assert not bench.outputs._streams


def test_all_answers_of_a_stream_are_served(monkeypatch):
    bench = Bench(1, monkeypatch, publish_s=0.00001, n=3, eos=False)
    for _ in range(3):
        bench.step(0.003)
    assert bench.sinks[0].deltas == [[10] * 3, [11] * 3, [12] * 3]
