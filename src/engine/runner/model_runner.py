"""`ModelRunner`: runs one `ScheduledBatch` on the device and hands back what it sampled.

    execute(batch)
      ├ settings of new rows      -> sampler tables
      ├ pure decode on a GPU      -> one CUDA graph (step_graph.py)
      └ anything else             -> eager: inputs (step_inputs.py), forward, logits, sample
    PendingStep.wait() -> StepOutput

`execute` only launches work where the device is a GPU; sampled ids stay there as the next step's
input and are copied back asynchronously, so that step N+1 can be launched while N runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from engine.config import ResolvedConfig
from engine.core.batch import ScheduledBatch
from engine.core.state import SequenceTable
from engine.kernels.metadata import AttentionMetadata
from engine.models.decoder import Decoder
from engine.runner.free_cores import ThreadChooser
from engine.runner.pending_step import DeviceLogprobs, PendingStep
from engine.runner.sampler import Sampler
from engine.runner.sampling_tables import banned_tokens
from engine.runner.step_graph import DeviceState, StepGraphs, padded_batch_sizes
from engine.runner.step_inputs import (
    DeviceUploader,
    StepInputs,
    build_host_inputs,
    to_cpu,
    to_gpu,
)

_PROMPT_LOGITS_ROWS = 256
"""Prompt positions whose logits are made at once for `prompt_logprobs`; bounds the memory."""


class ModelRunner:
    """Owns the KV cache, the sampler and the device's copy of the sequence state.

    Used by the engine thread alone.

    Args:
        model: With its weights loaded.
        config: Sizes, device and dtype.
        table: The scheduler's sequence state; read, never written.
    """

    def __init__(self, model: Decoder, config: ResolvedConfig, table: SequenceTable) -> None:
        self._model = model
        self._config = config
        self._table = table
        self._is_cuda = config.device.type == "cuda"
        self.kv_caches = allocate_kv_caches(model, config)
        self.sampler = Sampler(model.config.vocab_size, config.max_num_seqs, config.device)
        # Whether the device's `last_token_ids` holds the sequence's newest token, by state index.
        self._has_device_token = np.zeros(config.max_num_seqs, dtype=np.bool_)
        self._uploader: DeviceUploader | None = None
        self._state: DeviceState | None = None
        self._graphs: StepGraphs | None = None
        self.threads = None if self._is_cuda else ThreadChooser(config.requested.num_threads)
        if self._is_cuda:
            num_buffers = config.max_steps_in_flight + 1
            self._uploader = DeviceUploader(config.device, 2 * num_buffers)
            max_blocks = -(-config.max_model_len // config.block_size)
            self._state = DeviceState(config.max_num_seqs, max_blocks, config.device)
            if not config.requested.enforce_eager:
                self._graphs = StepGraphs(self._state, config.block_size, config.max_model_len)
            self._graph_sizes = padded_batch_sizes(config.max_num_seqs)
            self._host_rings = [
                torch.empty(config.max_num_seqs, dtype=torch.int64, pin_memory=True)
                for _ in range(num_buffers)
            ]
            self._next_ring = 0

    def execute(self, batch: ScheduledBatch) -> PendingStep:
        """Launch one step; on a CPU, run it.

        Raises:
            RuntimeError: torch's own exception; the sequences of `batch` must be ended.
        """
        if self.threads is not None:
            self.threads.adjust()
        self._load_new_rows(batch)
        self._ban_bad_words(batch)
        self.sampler.flush()
        if self._state is not None and self._uploader is not None and batch.block_updates:
            updates = self._uploader.upload(DeviceState.flatten_updates(batch.block_updates))
            self._state.apply_updates(*updates)
        if self._graphs is not None and self._is_pure_decode(batch):
            return self._run_graph(batch, self._graphs)
        return self._run_eager(batch)

    def warm_up(self) -> None:
        """Capture the graphs of greedy decoding, so that no request waits for them."""
        if self._graphs is None:
            return
        variant = self.sampler.greedy_variant
        # Largest first: the shared memory pool is then laid out once and only reused.
        for size in reversed(self._graph_sizes):
            self._graph_for(self._graphs, size, 1, variant)
        torch.cuda.synchronize(self._config.device)

    def check_health(self) -> None:
        """Raise torch's error if the device can no longer be used, as after an illegal access."""
        if self._is_cuda:
            torch.cuda.synchronize(self._config.device)

    def free_row(self, row: int) -> None:
        """The sequence in `row` ended: its settings no longer count."""
        self.sampler.free_row(row)

    def close(self) -> None:
        """Drop the model and every device tensor; nothing may be called afterwards."""
        del self._model
        if self._graphs is not None:
            self._graphs.clear()
        self.kv_caches.clear()
        self._state = None
        self._uploader = None
        self._graphs = None

    # ---------------------------------------------------------------- settings of sequences

    def _load_new_rows(self, batch: ScheduledBatch) -> None:
        self._has_device_token[batch.new_rows] = False
        for row in batch.new_rows:
            seq = self._table.sequences[row]
            if seq is None:
                continue
            request = seq.request
            self.sampler.set_row(
                row,
                request.params,
                seed=seq.seed,
                prompt_token_ids=request.prompt_token_ids,
                output_token_ids=self._table.output_tokens(row),
                stop_token_ids=request.stop_token_ids,
                bad_words_ids=request.bad_words_ids,
            )

    def _ban_bad_words(self, batch: ScheduledBatch) -> None:
        for row in self._table.rows_needing_host_sync(batch.rows):
            seq = self._table.sequences[row]
            if seq is not None:
                history = self._table.output_tokens(row)
                self.sampler.update_banned(row, banned_tokens(seq.request.bad_words_ids, history))

    # ---------------------------------------------------------------- eager steps

    def _run_eager(self, batch: ScheduledBatch) -> PendingStep:
        host = build_host_inputs(batch, self._table, self._config.block_size)
        inputs = self._inputs_on_device(host)
        hidden = self._model.forward(inputs.input_ids, self.kv_caches, inputs.metadata)
        prompt_logprobs = self._prompt_logprobs(batch, hidden)
        if self._state is not None:
            # The positions the next step starts from.
            self._state.next_positions[inputs.rows] = inputs.metadata.seq_lens.long()
        if not batch.is_sampling.any():
            return self._pending(inputs.sampling_rows, batch, {}, prompt_logprobs)
        logits = self._model.compute_logits(hidden.index_select(0, inputs.logits_indices))
        variant = self.sampler.variant(host.sampling_rows)
        token_ids = self.sampler.sample(
            logits, inputs.sampling_rows, inputs.sampling_positions, variant
        )
        if self._state is not None:
            # -1 (nothing could be sampled) must stay a valid input of a step launched ahead.
            self._state.last_token_ids[inputs.sampling_rows] = token_ids.clamp(min=0)
            self._has_device_token[host.sampling_rows] = True
        logprobs = self._sampled_logprobs(host.sampling_rows, logits, token_ids)
        return self._pending(token_ids, batch, logprobs, prompt_logprobs)

    def _inputs_on_device(self, host: Any) -> StepInputs:
        if self._uploader is None or self._state is None:
            return to_cpu(host, self._config.block_size)
        return to_gpu(host, self._uploader, self._state.last_token_ids)

    # ---------------------------------------------------------------- graphed decode steps

    def _is_pure_decode(self, batch: ScheduledBatch) -> bool:
        """True where every input token was sampled by an earlier step and still is on the GPU."""
        return bool(
            batch.num_tokens == batch.num_seqs
            and batch.is_sampling.all()
            and not batch.needs_prompt_logprobs.any()
            and self._has_device_token[batch.rows].all()
        )

    def _run_graph(self, batch: ScheduledBatch, graphs: StepGraphs) -> PendingStep:
        assert self._state is not None
        assert self._uploader is not None
        num_seqs = batch.num_seqs
        size = next(size for size in self._graph_sizes if size >= num_seqs)
        max_seq_len = int(batch.num_computed_tokens.max()) + 1
        variant = self.sampler.variant(batch.rows)
        step = self._graph_for(graphs, size, max_seq_len, variant)
        rows = np.full(size, self._state.padding_row, dtype=np.int64)
        rows[:num_seqs] = batch.rows
        step.rows.copy_(self._uploader.upload([rows])[0])
        step.graph.replay()
        token_ids = step.token_ids[:num_seqs]
        logprobs = self._sampled_logprobs(batch.rows, step.logits, token_ids)
        return self._pending(token_ids, batch, logprobs, {})

    def _graph_for(self, graphs: StepGraphs, size: int, max_seq_len: int, variant: Any) -> Any:
        def forward(input_ids: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
            hidden = self._model.forward(input_ids, self.kv_caches, metadata)
            return self._model.compute_logits(hidden)

        def sample(
            logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor
        ) -> torch.Tensor:
            return self.sampler.sample(logits, rows, positions, variant)

        return graphs.get(size, max_seq_len, variant, forward, sample)

    # ---------------------------------------------------------------- results

    def _pending(
        self,
        token_ids: torch.Tensor,
        batch: ScheduledBatch,
        logprobs: dict[int, DeviceLogprobs],
        prompt_logprobs: dict[int, DeviceLogprobs],
    ) -> PendingStep:
        if not self._is_cuda:
            return PendingStep(token_ids, batch.is_sampling, None, logprobs, prompt_logprobs)
        ring = self._host_rings[self._next_ring]
        self._next_ring = (self._next_ring + 1) % len(self._host_rings)
        host = ring[: token_ids.shape[0]]
        host.copy_(token_ids, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return PendingStep(host, batch.is_sampling, done, logprobs, prompt_logprobs)

    def _sampled_logprobs(
        self, rows: np.ndarray, logits: torch.Tensor, token_ids: torch.Tensor
    ) -> dict[int, DeviceLogprobs]:
        """Log probabilities for those of `rows` [R] that asked; `logits` [>= R, V] is raw."""
        found: dict[int, DeviceLogprobs] = {}
        for index in np.flatnonzero(self._table.wants_logprobs[rows]):
            row = int(rows[index])
            seq = self._table.sequences[row]
            if seq is None or seq.request.params.logprobs is None:
                continue
            one = slice(int(index), int(index) + 1)
            found[row] = DeviceLogprobs(
                *self.sampler.gather_logprobs(
                    logits[one], token_ids[one], seq.request.params.logprobs
                )
            )
        return found

    def _prompt_logprobs(
        self, batch: ScheduledBatch, hidden: torch.Tensor
    ) -> dict[int, DeviceLogprobs]:
        """Log probabilities of prompt tokens 1… predicted by this step's prompt positions."""
        found: dict[int, DeviceLogprobs] = {}
        starts = np.concatenate([[0], np.cumsum(batch.num_scheduled_tokens)])
        for index in np.flatnonzero(batch.needs_prompt_logprobs):
            row = int(batch.rows[index])
            seq = self._table.sequences[row]
            if seq is None or seq.request.params.prompt_logprobs is None:
                continue
            first = int(batch.num_computed_tokens[index])
            last = min(
                first + int(batch.num_scheduled_tokens[index]), seq.request.num_prompt_tokens - 1
            )
            if last <= first:
                continue
            targets = torch.tensor(
                seq.request.prompt_token_ids[first + 1 : last + 1], device=hidden.device
            )
            mine = hidden[int(starts[index]) : int(starts[index]) + last - first]
            parts = [
                self.sampler.gather_logprobs(
                    self._model.compute_logits(mine[start : start + _PROMPT_LOGITS_ROWS]),
                    targets[start : start + _PROMPT_LOGITS_ROWS],
                    seq.request.params.prompt_logprobs,
                )
                for start in range(0, last - first, _PROMPT_LOGITS_ROWS)
            ]
            found[row] = DeviceLogprobs(*(torch.cat(part) for part in zip(*parts, strict=True)))
        return found


def allocate_kv_caches(
    model: Decoder, config: ResolvedConfig
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """K and V of each layer, [num_blocks, block_size, num_kv_heads, head_dim], not initialised.

    Not initialised on purpose: on a CPU the system then gives memory block by block as it is
    written, and attention never reads what was not written.
    """
    shape = model.kv_cache_shape(config.num_kv_blocks, config.block_size)
    return [
        (
            torch.empty(shape, dtype=config.dtype, device=config.device),
            torch.empty(shape, dtype=config.dtype, device=config.device),
        )
        for _ in range(model.config.num_layers)
    ]
