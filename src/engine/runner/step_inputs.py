"""From a `ScheduledBatch` to the flat tensors of one step.

    rows [B], counts [B]  ──NumPy──►  ids, positions, slots [T], lengths [B]  ──one copy──►  device

Nothing here loops over sequences in Python except the block lists of the plain-torch CPU path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.core.batch import ScheduledBatch
from engine.core.state import SequenceTable
from engine.kernels.metadata import AttentionMetadata

Int64Array = npt.NDArray[np.int64]


@dataclass(slots=True)
class StepInputs:
    """Device tensors of one step. Letters: T tokens, B sequences, R sampled sequences.

    Attributes:
        input_ids: [T] int64.
        metadata: Layout of the batch for the attention.
        rows: [B] int64, state indices.
        sampling_rows: [R] int64, state indices of the sequences that sample.
        logits_indices: [R] int64, their last tokens' places in the flat batch.
        sampling_positions: [R] int64, positions of the tokens to be sampled.
    """

    input_ids: torch.Tensor
    metadata: AttentionMetadata
    rows: torch.Tensor
    sampling_rows: torch.Tensor
    logits_indices: torch.Tensor
    sampling_positions: torch.Tensor


@dataclass(slots=True)
class HostInputs:
    """The same on the host, as NumPy arrays; `input_ids` is -1 where a token is in flight."""

    input_ids: Int64Array
    positions: Int64Array
    slot_mapping: Int64Array
    seq_lens: npt.NDArray[np.int32]
    query_lens: npt.NDArray[np.int32]
    query_start_loc: npt.NDArray[np.int32]
    block_table: npt.NDArray[np.int32]
    rows: Int64Array
    sampling_rows: Int64Array
    logits_indices: Int64Array
    sampling_positions: Int64Array
    num_decodes: int


def build_host_inputs(batch: ScheduledBatch, table: SequenceTable, block_size: int) -> HostInputs:
    """Lay out `batch` as one flat run of tokens, sequence after sequence."""
    rows = batch.rows.astype(np.int64)
    query_lens = batch.num_scheduled_tokens
    computed = batch.num_computed_tokens
    query_start_loc = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum(query_lens, out=query_start_loc[1:])
    num_tokens = int(query_start_loc[-1])

    positions = np.arange(num_tokens, dtype=np.int64)
    positions += np.repeat(computed - query_start_loc[:-1], query_lens)
    token_rows = np.repeat(rows, query_lens)
    input_ids = table.token_ids[token_rows, positions].astype(np.int64)
    blocks = table.block_table[token_rows, positions // block_size].astype(np.int64)
    slot_mapping = blocks * block_size + positions % block_size

    seq_lens = computed + query_lens
    num_blocks_used = -(-int(seq_lens.max()) // block_size)
    is_sampling = batch.is_sampling
    return HostInputs(
        input_ids=input_ids,
        positions=positions,
        slot_mapping=slot_mapping,
        seq_lens=seq_lens,
        query_lens=query_lens,
        query_start_loc=query_start_loc,
        block_table=table.block_table[rows, :num_blocks_used],
        rows=rows,
        sampling_rows=rows[is_sampling],
        logits_indices=(query_start_loc[1:] - 1)[is_sampling].astype(np.int64),
        sampling_positions=seq_lens[is_sampling].astype(np.int64),
        num_decodes=int(np.count_nonzero(query_lens == 1)),
    )


def to_cpu(host: HostInputs, block_size: int) -> StepInputs:
    """Wrap the host arrays without a copy, and add the host lists the plain-torch path reads."""
    seq_lens = host.seq_lens.tolist()
    metadata = AttentionMetadata(
        positions=torch.from_numpy(host.positions),
        slot_mapping=torch.from_numpy(host.slot_mapping),
        block_table=torch.from_numpy(host.block_table),
        seq_lens=torch.from_numpy(host.seq_lens),
        query_lens=torch.from_numpy(host.query_lens),
        query_start_loc=torch.from_numpy(host.query_start_loc),
        num_decodes=host.num_decodes,
        max_query_len=int(host.query_lens.max()),
        max_seq_len=max(seq_lens),
        seq_lens_host=seq_lens,
        query_lens_host=host.query_lens.tolist(),
        block_table_host=[
            blocks[: -(-length // block_size)].tolist()
            for blocks, length in zip(host.block_table, seq_lens, strict=True)
        ],
    )
    return StepInputs(
        input_ids=torch.from_numpy(host.input_ids),
        metadata=metadata,
        rows=torch.from_numpy(host.rows),
        sampling_rows=torch.from_numpy(host.sampling_rows),
        logits_indices=torch.from_numpy(host.logits_indices),
        sampling_positions=torch.from_numpy(host.sampling_positions),
    )


class DeviceUploader:
    """Sends the arrays of one step to a GPU in a single asynchronous copy.

    A ring of pinned staging buffers, one more than there can be steps in flight, so that a buffer
    is refilled only after its copy has run.
    """

    def __init__(self, device: torch.device, num_buffers: int) -> None:
        self._device = device
        self._buffers: list[torch.Tensor | None] = [None] * num_buffers
        self._next = 0

    def upload(self, arrays: list[npt.NDArray[Any]]) -> list[torch.Tensor]:
        """Device copies of `arrays`, same shapes and dtypes, views of one new tensor.

        Asynchronous: valid for work launched afterwards on the current stream.
        """
        offsets = [0]
        for array in arrays:
            # 16-byte steps keep every view aligned for any dtype.
            offsets.append(offsets[-1] + -(-array.nbytes // 16) * 16)
        staging = self._staging(offsets[-1])
        host = staging.numpy()
        for array, start in zip(arrays, offsets, strict=False):
            host[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).ravel()
        device = staging[: offsets[-1]].to(self._device, non_blocking=True)
        return [
            device[start : start + array.nbytes]
            .view(torch.int64 if array.dtype == np.int64 else torch.int32)
            .view(array.shape)
            for array, start in zip(arrays, offsets, strict=False)
        ]

    def _staging(self, num_bytes: int) -> torch.Tensor:
        index, self._next = self._next, (self._next + 1) % len(self._buffers)
        buffer = self._buffers[index]
        if buffer is None or buffer.numel() < num_bytes:
            # Twice the need, so that growing batches do not pin memory again each step.
            buffer = torch.empty(max(2 * num_bytes, 1 << 16), dtype=torch.uint8, pin_memory=True)
            self._buffers[index] = buffer
        return buffer


def to_gpu(host: HostInputs, uploader: DeviceUploader, last_token_ids: torch.Tensor) -> StepInputs:
    """Upload the host arrays and fill tokens in flight from the device's own last tokens.

    Args:
        host: From `build_host_inputs`.
        uploader: Staging buffers.
        last_token_ids: [S+1] int64, last sampled token by state index.
    """
    (
        input_ids,
        positions,
        slot_mapping,
        rows,
        sampling_rows,
        logits_indices,
        sampling_positions,
        seq_lens,
        query_lens,
        query_start_loc,
        block_table,
    ) = uploader.upload(
        [
            host.input_ids,
            host.positions,
            host.slot_mapping,
            host.rows,
            host.sampling_rows,
            host.logits_indices,
            host.sampling_positions,
            host.seq_lens,
            host.query_lens,
            host.query_start_loc,
            host.block_table,
        ]
    )
    decodes = host.num_decodes
    if decodes and bool((host.input_ids[:decodes] < 0).any()):
        known = input_ids[:decodes]
        input_ids[:decodes] = torch.where(known < 0, last_token_ids[rows[:decodes]], known)
    metadata = AttentionMetadata(
        positions=positions,
        slot_mapping=slot_mapping,
        block_table=block_table,
        seq_lens=seq_lens,
        query_lens=query_lens,
        query_start_loc=query_start_loc,
        num_decodes=decodes,
        max_query_len=int(host.query_lens.max()),
        max_seq_len=int(host.seq_lens.max()),
    )
    return StepInputs(
        input_ids=input_ids,
        metadata=metadata,
        rows=rows,
        sampling_rows=sampling_rows,
        logits_indices=logits_indices,
        sampling_positions=sampling_positions,
    )
