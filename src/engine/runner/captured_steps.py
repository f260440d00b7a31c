"""Whole steps as CUDA graphs: inputs, forward, sampling and feedback, launched without the host.

An eager step costs hundreds of launches at about 21 µs of host time each; a captured one costs two:

    forward graph   (B sequences, T tokens,   slot ─► inputs ─► forward ─► logits
                     with prefix groups or without)
    sampling graph  (B, sampler variant)      logits ─► ids ─► last tokens, results, launch count

Pure decode and mixed steps are captured alike. Sizes are padded to a ladder (`buckets.py`); what
the batch at hand really holds stands in its slot (`step_slots.py`) and is read on the device, so
nothing of a graph depends on lengths. Logits live in one buffer that all graphs write, so that a
new sampler variant captures a handful of kernels and not the model again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from engine.config import ResolvedConfig
from engine.core.batch import ScheduledBatch
from engine.core.state import SequenceTable
from engine.kernels.captured_inputs import CapturedInputs
from engine.kernels.captured_step import begin_captured_step, finish_captured_step
from engine.kernels.kv_cache import KVCache
from engine.kernels.metadata import AttentionMetadata
from engine.kernels.sampling_reference import FILTERED, GREEDY, RANDOM
from engine.models.decoder import Decoder
from engine.runner.buckets import Ladder
from engine.runner.graph_launcher import CapturedGraph
from engine.runner.sampler import Sampler, SamplerVariant
from engine.runner.step_slots import StepSlots, StepTicket


class Launcher(Protocol):
    """What is needed of a `GraphLauncher`; tests bring one that needs no GPU."""

    def capture(self, work: Callable[[], Any]) -> CapturedGraph:
        """Record what `work` launches."""

    def launch(self, graph: CapturedGraph) -> None:
        """Queue a graph behind what was launched before."""


class _Size(NamedTuple):
    """What distinguishes forward graphs."""

    num_seqs: int
    num_tokens: int
    is_pure_decode: bool
    has_prefix_groups: bool = False


@functools.cache
def _stream_beside(stream: torch.cuda.Stream) -> torch.cuda.Stream:
    """A second stream for the work of the engine whose own is `stream`.

    Made once: engines take the streams of closed ones, and torch has no more than 32 to give.
    """
    return torch.cuda.Stream(stream.device)


class CapturedSteps:
    """Captures steps when first met, and launches them.

    Args:
        model: With its weights loaded.
        sampler: Its settings table is updated by the captured steps.
        kv_caches: Of each layer.
        config: Sizes and device.
        slots: Parameters, results and the device's tables.
        launcher: Captures and launches.
    """

    def __init__(
        self,
        model: Decoder,
        sampler: Sampler,
        kv_caches: Sequence[KVCache],
        config: ResolvedConfig,
        slots: StepSlots,
        launcher: Launcher,
    ) -> None:
        self._model = model
        self._sampler = sampler
        self._kv_caches = kv_caches
        self._block_size = config.block_size
        self._max_model_len = config.max_model_len
        self._slots = slots
        self._launcher = launcher
        max_num_tokens = max(config.max_num_batched_tokens, config.max_num_seqs)
        self._ladder = Ladder(config.max_num_seqs, max_num_tokens)
        self._inputs = CapturedInputs.zeros(
            config.max_num_seqs, max_num_tokens, slots.state.layout.max_groups, config.device
        )
        self._logits = torch.empty(
            (config.max_num_seqs, model.config.vocab_size), dtype=config.dtype, device=config.device
        )
        self._token_ids = torch.zeros(config.max_num_seqs, dtype=torch.int64, device=config.device)
        is_cuda = config.device.type == "cuda"
        self._side_stream = _stream_beside(torch.cuda.current_stream()) if is_cuda else None
        self._forwards: dict[_Size, CapturedGraph] = {}
        self._samplings: dict[tuple[int, SamplerVariant], CapturedGraph] = {}

    def launch(
        self,
        batch: ScheduledBatch,
        table: SequenceTable,
        variant: SamplerVariant,
        before_sampling: Callable[[], None] | None = None,
    ) -> StepTicket:
        """Queue one step.

        Args:
            batch: Any step without prompt log probabilities.
            table: For token ids and new blocks.
            variant: What the sampling sequences need, or more.
            before_sampling: Host work that the sampling waits for, and the forward does not.
        """
        is_pure_decode = batch.num_tokens == batch.num_seqs
        if is_pure_decode:
            num_seqs = num_tokens = self._ladder.decode_size(batch.num_seqs)
        else:
            num_seqs, num_tokens = self._ladder.mixed_size(batch.num_seqs, batch.num_tokens)
        size = _Size(num_seqs, num_tokens, is_pure_decode, bool(batch.prefix_groups))
        forward = self._forward_graph(size)
        sampling = self._sampling_graph(num_seqs, variant)
        rows, words = self._sampler.take_changed_settings()
        if not self._slots.write(batch, table, rows, words):
            self._slots.apply_updates(batch.block_updates)
        self._launcher.launch(forward)
        if before_sampling is not None:
            before_sampling()
        self._launcher.launch(sampling)
        return self._slots.count_launch()

    def results(self, num_seqs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sampled ids [num_seqs] and logits [num_seqs, V] of the step launched last, views.

        Valid for work queued before the next launch.
        """
        return self._token_ids[:num_seqs], self._logits[:num_seqs]

    def launch_each_kernel(self, variant: SamplerVariant) -> None:
        """Launch what steps launch, at least once each, whatever the kind of draw.

        For `only_compiling`. What takes longest to compile comes first. Sizes between these meet
        the same kernels; one that is forgotten here is compiled when it is launched.
        """
        draws = [dataclasses.replace(variant, draw=draw) for draw in (GREEDY, RANDOM, FILTERED)]
        for num_seqs, num_tokens in (self._ladder.mixed[-1], self._ladder.mixed[0]):
            for has_groups in (False, True):
                self._rehearse(_Size(num_seqs, num_tokens, False, has_groups))
        for num_seqs in self._ladder.decode:
            for has_groups in (False, True):
                self._rehearse(_Size(num_seqs, num_seqs, True, has_groups))
            for one in draws:
                self._run_sampling(num_seqs, one)

    def warm_up(self, variant: SamplerVariant) -> None:
        """Capture every size without prefix groups, with the sampling of one variant.

        First the sizes whose kernels are compiled soonest (see `compiling_ahead`): not the mixed
        ones with their prefill, nor one sequence, which has a kernel of all layers. Among each,
        largest first: the shared memory pool is then laid out once and only reused. Steps with
        prefix groups are captured when first met.
        """
        *larger, smallest = [
            _Size(num_seqs, num_seqs, is_pure_decode=True)
            for num_seqs in reversed(self._ladder.decode)
        ]
        mixed = [_Size(*pair, is_pure_decode=False) for pair in reversed(self._ladder.mixed)]
        for size in (*larger, *mixed, smallest):
            self._forward_graph(size)
            self._sampling_graph(size.num_seqs, variant)

    # ---------------------------------------------------------------- captures

    def _forward_graph(self, size: _Size) -> CapturedGraph:
        graph = self._forwards.get(size)
        if graph is None:
            self._slots.write_empty()
            self._rehearse(size)
            graph = self._launcher.capture(lambda: self._run_forward(size, self._kv_caches))
            self._forwards[size] = graph
        return graph

    def _sampling_graph(self, num_seqs: int, variant: SamplerVariant) -> CapturedGraph:
        key = (num_seqs, variant)
        graph = self._samplings.get(key)
        if graph is None:
            self._slots.write_empty()
            # Sets the rows that the sampling below reads to padding.
            begin_captured_step(
                self._slots.state,
                self._inputs.narrow(num_seqs, num_seqs),
                self._block_size,
                is_pure_decode=True,
            )
            self._run_sampling(*key)
            self._slots.count_launch()
            graph = self._launcher.capture(lambda: self._run_sampling(*key))
            self._samplings[key] = graph
        return graph

    def _rehearse(self, size: _Size) -> None:
        """Run a step once without capture, as one without sequences.

        Compiles kernels, lets the libraries make their workspaces, and touches nothing a sequence
        owns. One layer of each kind does for that, and takes a tenth of the time of thirty.
        """
        if size.num_tokens == 1:
            # There a kernel of all layers may be made, for all caches.
            self._run_forward(size, self._kv_caches)
            return
        with self._model.rehearsal() as layers:
            self._run_forward(size, [self._kv_caches[index] for index in layers])

    def _run_forward(self, size: _Size, kv_caches: Sequence[KVCache]) -> None:
        num_seqs, is_pure_decode = size.num_seqs, size.is_pure_decode
        inputs = self._inputs.narrow(num_seqs, size.num_tokens)
        begin_captured_step(
            self._slots.state, inputs, self._block_size, is_pure_decode=is_pure_decode
        )
        metadata = AttentionMetadata(
            positions=inputs.positions,
            slot_mapping=inputs.slot_mapping,
            block_table=self._slots.state.block_table,
            seq_lens=inputs.seq_lens,
            query_lens=inputs.query_lens,
            query_start_loc=inputs.query_start_loc,
            num_decodes=num_seqs,
            max_query_len=1 if is_pure_decode else size.num_tokens,
            max_seq_len=self._max_model_len,
            block_rows=inputs.block_rows,
            device_counts=inputs.device_counts,
            max_prefills=0 if is_pure_decode else num_seqs,
            shared_prefixes=inputs.shared_prefixes if size.has_prefix_groups else None,
            side_stream=None if is_pure_decode else self._side_stream,
        )
        hidden = self._model.forward(inputs.input_ids, kv_caches, metadata)
        if not is_pure_decode:
            hidden = hidden.index_select(0, inputs.logits_indices)
        self._model.compute_logits(hidden, out=self._logits[:num_seqs])

    def _run_sampling(self, num_seqs: int, variant: SamplerVariant) -> None:
        inputs = self._inputs.narrow(num_seqs, num_seqs)
        token_ids = self._sampler.sample(
            self._logits[:num_seqs], inputs.sampling_rows, inputs.sampling_positions, variant
        )
        self._token_ids[:num_seqs].copy_(token_ids)
        finish_captured_step(self._slots.state, inputs, token_ids)
