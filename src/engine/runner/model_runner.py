"""`ModelRunner`: runs one `ScheduledBatch` on the device and hands back what it sampled.

    execute(batch)
      ├ settings of new rows           -> sampler tables
      ├ on a GPU                       -> a captured step (captured_steps.py), mixed or decode
      └ on a CPU, or where the prompt's
        logits are wanted              -> eager: inputs (step_inputs.py), forward, logits, sample
    PendingStep.wait() -> StepOutput

`execute` only launches work where the device is a GPU; sampled ids stay there as the next step's
input and come back by themselves, so that later steps can be launched while this one runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine.config import ResolvedConfig
from engine.core.batch import ScheduledBatch
from engine.core.state import SequenceTable
from engine.models.any_model import AnyModel
from engine.models.decoder import Decoder
from engine.runner.free_cores import ThreadChooser
from engine.runner.graph_launcher import GraphLauncher
from engine.runner.memory import run_largest_step
from engine.runner.pending_step import CapturedPendingStep, DeviceLogprobs, PendingStep
from engine.runner.sampler import Sampler
from engine.runner.sampling_tables import banned_tokens
from engine.runner.step_inputs import (
    DeviceUploader,
    StepInputs,
    build_host_inputs,
    to_cpu,
    to_gpu,
)
from engine.runner.step_slots import StepSlots

if TYPE_CHECKING:
    from engine.runner.captured_steps import CapturedSteps

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

    def __init__(self, model: AnyModel, config: ResolvedConfig, table: SequenceTable) -> None:
        self._model = model
        self._config = config
        self._table = table
        self._is_cuda = config.device.type == "cuda"
        self.kv_caches = allocate_kv_caches(model, config)
        self.sampler = Sampler(model.config.vocab_size, config.max_num_seqs, config.device)
        self._uploader: DeviceUploader | None = None
        self._slots: StepSlots | None = None
        self._captured: CapturedSteps | None = None
        self.threads = None if self._is_cuda else ThreadChooser(config.requested.num_threads)
        if self._is_cuda:
            num_buffers = config.max_steps_in_flight + 1
            self._uploader = DeviceUploader(config.device, num_buffers)
            self._slots = StepSlots(
                config.max_num_seqs,
                max(config.max_num_batched_tokens, config.max_num_seqs),
                table.max_blocks,
                config.block_size,
                self.sampler.tables.settings,
                config.device,
            )
            # The code of transformers' models may look at the device's data; a graph cannot.
            if isinstance(model, Decoder) and not config.requested.enforce_eager:
                # Imports triton: 66 MiB and a tenth of a second that a CPU does not need.
                from engine.runner.captured_steps import CapturedSteps

                self._launcher = GraphLauncher(torch.cuda.current_stream(config.device))
                self._captured = CapturedSteps(
                    model, self.sampler, self.kv_caches, config, self._slots, self._launcher
                )
            self._host_rings = [
                torch.empty(config.max_num_seqs, dtype=torch.int64, pin_memory=True)
                for _ in range(num_buffers)
            ]
            self._next_ring = 0

    def execute(self, batch: ScheduledBatch) -> PendingStep | CapturedPendingStep:
        """Launch one step; on a CPU, run it.

        Raises:
            RuntimeError: torch's own exception; the sequences of `batch` must be ended.
        """
        if self.threads is not None:
            self.threads.adjust()
        self._load_new_rows(batch)
        self._ban_bad_words(batch)
        wants_prompt_logits = (
            self._table.num_reporting_prompts > 0 and batch.needs_prompt_logprobs.any()
        )
        if self._captured is not None and not wants_prompt_logits:
            return self._run_captured(batch, self._captured)
        return self._run_eager(batch)

    def warm_up(self) -> None:
        """On a GPU, compile the kernels and capture the steps that no request shall wait for.

        Captured are those of greedy decoding; compiled is also what eager steps need.
        """
        if not self._is_cuda:
            return
        from engine.kernels.compile_ahead import compiling_ahead, only_compiling

        variant, config = self.sampler.greedy_variant, self._config
        num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        with compiling_ahead():
            with only_compiling():
                if self._captured is not None:
                    self._captured.launch_each_kernel(variant)
                run_largest_step(
                    self._model, config.max_num_batched_tokens, num_seqs, config.block_size
                )
            if self._captured is not None:
                self._captured.warm_up(variant)
        torch.cuda.synchronize(config.device)

    def check_health(self) -> None:
        """Raise torch's error if the device can no longer be used, as after an illegal access."""
        if self._slots is not None:
            torch.cuda.synchronize(self._config.device)
            self._slots.follow_device()

    def free_row(self, row: int) -> None:
        """The sequence in `row` ended: its settings no longer count."""
        self.sampler.free_row(row)

    def close(self) -> None:
        """Drop the model and every device tensor; nothing may be called afterwards."""
        del self._model
        self._captured = None
        self._slots = None
        self._uploader = None
        self.kv_caches.clear()

    # ---------------------------------------------------------------- settings of sequences

    def _load_new_rows(self, batch: ScheduledBatch) -> None:
        if self._slots is not None:
            self._slots.note_new(batch.new_rows)
        for row in batch.new_rows:
            self._load_row(row)
        for row in self._table.take_rows_with_changed_tokens():
            if self._slots is not None:
                self._slots.note_new([row])
            seq = self._table.sequences[row]
            if seq is not None and seq.request.params.has_penalties:
                # The counts have a token that was taken back.
                self._load_row(row)

    def _load_row(self, row: int) -> None:
        seq = self._table.sequences[row]
        if seq is None:
            return
        request = seq.request
        self.sampler.set_row(
            row,
            request.params,
            seed=seq.seed,
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=self._table.output_tokens(row),
            stop_token_ids=request.stop_token_ids,
            bad_words_ids=request.bad_words_ids,
            is_constrained=seq.constraint is not None,
        )

    def _ban_bad_words(self, batch: ScheduledBatch) -> None:
        for row in self._table.rows_needing_host_sync(batch.rows):
            seq = self._table.sequences[row]
            if seq is not None and seq.request.bad_words_ids:
                history = self._table.output_tokens(row)
                self.sampler.update_banned(row, banned_tokens(seq.request.bad_words_ids, history))

    # ---------------------------------------------------------------- eager steps

    def _run_eager(self, batch: ScheduledBatch) -> PendingStep:
        self.sampler.flush()
        if self._slots is not None:
            self._slots.apply_updates(batch.block_updates)
        host = build_host_inputs(batch, self._table, self._config.block_size)
        inputs = self._inputs_on_device(host)
        hidden = self._model.forward(inputs.input_ids, self.kv_caches, inputs.metadata)
        prompt_logprobs = self._prompt_logprobs(batch, hidden)
        if not batch.is_sampling.any():
            return self._pending(inputs.sampling_rows, batch, {}, prompt_logprobs)
        logits = self._model.compute_logits(hidden.index_select(0, inputs.logits_indices))
        variant = self.sampler.variant(host.sampling_rows)
        # On a GPU the forward runs meanwhile.
        self.sampler.fill_masks(batch, self._table)
        token_ids = self.sampler.sample(
            logits, inputs.sampling_rows, inputs.sampling_positions, variant
        )
        if self._slots is not None:
            # -1 (nothing could be sampled) must stay a valid input of a step launched ahead.
            self._slots.state.last_token_ids[inputs.sampling_rows] = token_ids.clamp(min=0)
            self._slots.note_sampled(host.sampling_rows.tolist())
        logprobs = self._sampled_logprobs(host.sampling_rows, logits, token_ids)
        return self._pending(token_ids, batch, logprobs, prompt_logprobs)

    def _inputs_on_device(self, host: Any) -> StepInputs:
        if self._uploader is None or self._slots is None:
            return to_cpu(host, self._config.block_size)
        return to_gpu(host, self._uploader, self._slots.state.last_token_ids)

    # ---------------------------------------------------------------- captured steps

    def _run_captured(self, batch: ScheduledBatch, captured: CapturedSteps) -> CapturedPendingStep:
        # The steady state makes no call that gives up the GIL: no torch, no reduction over rows.
        self.sampler.flush_lists()
        ticket = captured.launch(
            batch,
            self._table,
            self.sampler.live_variant(),
            before_sampling=lambda: self.sampler.fill_masks(batch, self._table),
        )
        logprobs = {}
        if self._table.num_wanting_logprobs:
            token_ids, logits = captured.results(batch.num_seqs)
            logprobs = self._sampled_logprobs(batch.rows, logits, token_ids, batch.is_sampling)
        return CapturedPendingStep(ticket, batch.is_sampling, self._launcher.stream, logprobs)

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
        self,
        rows: np.ndarray,
        logits: torch.Tensor,
        token_ids: torch.Tensor,
        is_sampling: np.ndarray | bool = True,
    ) -> dict[int, DeviceLogprobs]:
        """Log probabilities for those of `rows` [R] that asked and sample; `logits` is raw."""
        found: dict[int, DeviceLogprobs] = {}
        for index in np.flatnonzero(self._table.wants_logprobs[rows] & is_sampling):
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
    model: AnyModel, config: ResolvedConfig
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
