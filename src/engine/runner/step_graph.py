"""Whole decode steps as CUDA graphs: inputs, forward, sampling and feedback in one launch.

An eager step costs hundreds of launches at about 21 µs of host time each; a graph costs one. So
that nothing changes between replays but numbers on the device, every input is derived there:

    rows [Bp] ──► last_token_ids[rows], next_positions[rows], block_table[rows]
                  └─► forward ─► logits ─► sampled ids
    last_token_ids[rows] = ids;  next_positions[rows] += 1

The host sends the state indices when the batch changes and new block-table entries when a
sequence crosses a block boundary, nothing else. Batches are padded to the sizes of a short ladder;
padding points at a spare row of every table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from engine.core.batch import BlockUpdate
from engine.kernels.metadata import AttentionMetadata

Forward = Callable[[torch.Tensor, AttentionMetadata], torch.Tensor]
Sample = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_SHORTEST_BUCKET_TOKENS = 1024


def padded_batch_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes that graphs are captured for: fine steps while small, at most 1/8 waste later.

    The first sizes are those where a padded row costs most; a capture takes 20-40 ms on a slow
    host, so there are not more of them than help.
    """
    sizes = [1, 2, 4, 8]
    size = 16
    while size < max_num_seqs:
        sizes.append(size)
        size += 16 if size < 128 else 32 if size < 256 else 64
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def padded_seq_len(max_seq_len: int, limit: int) -> int:
    """Bound on the KV length a graph's attention grid is laid out for: a power of two."""
    bucket = _SHORTEST_BUCKET_TOKENS
    while bucket < max_seq_len:
        bucket *= 2
    return min(bucket, max(limit, 1))


class DeviceState:
    """Per-sequence tables on the GPU, one row per state index and a spare one for padding.

    Attributes:
        last_token_ids: [S+1] int64, the newest token of each sequence: the next step's input.
        next_positions: [S+1] int64, where that token stands.
        block_table: [S+1, max_blocks] int32.
        padding_row: S, the spare row.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int, device: torch.device) -> None:
        self.padding_row = max_num_seqs
        self.last_token_ids = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)
        self.next_positions = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)
        self.block_table = torch.zeros(
            (max_num_seqs + 1, max_blocks), dtype=torch.int32, device=device
        )

    @staticmethod
    def flatten_updates(updates: list[BlockUpdate]) -> list[np.ndarray]:
        """Rows, columns and block ids of all changed table entries, as three [N] int64 arrays."""
        rows = [update.row for update in updates for _ in update.block_ids]
        columns = [
            column
            for update in updates
            for column in range(update.start, update.start + len(update.block_ids))
        ]
        block_ids = [block_id for update in updates for block_id in update.block_ids]
        return [np.asarray(values, dtype=np.int64) for values in (rows, columns, block_ids)]

    def apply_updates(
        self, rows: torch.Tensor, columns: torch.Tensor, block_ids: torch.Tensor
    ) -> None:
        """Write the changed entries; device tensors from `flatten_updates`."""
        self.block_table.index_put_((rows, columns), block_ids.to(torch.int32))


@dataclass(slots=True)
class StepGraph:
    """One captured decode step.

    Attributes:
        graph: Replays the step on the current stream.
        rows: [Bp] int64, static input: state indices, padded with the spare row.
        token_ids: [Bp] int64, static output.
        logits: [Bp, V], static output; valid until the next replay of any graph.
    """

    graph: torch.cuda.CUDAGraph
    rows: torch.Tensor
    token_ids: torch.Tensor
    logits: torch.Tensor


class StepGraphs:
    """The captured graphs, by (padded batch size, padded length, sampler variant).

    Captured when first met; all share one memory pool, because only one runs at a time.
    """

    def __init__(self, state: DeviceState, block_size: int, max_model_len: int) -> None:
        self._state = state
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._graphs: dict[tuple[int, int, object], StepGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def get(
        self, padded_size: int, max_seq_len: int, variant: object, forward: Forward, sample: Sample
    ) -> StepGraph:
        """The graph for this key, captured now if need be (20-40 ms on a slow host)."""
        bucket = padded_seq_len(max_seq_len, self._max_model_len)
        key = (padded_size, bucket, variant)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._capture(padded_size, bucket, forward, sample)
            self._graphs[key] = graph
        return graph

    def clear(self) -> None:
        """Drop all graphs and the memory they hold."""
        self._graphs.clear()

    def _capture(self, size: int, bucket: int, forward: Forward, sample: Sample) -> StepGraph:
        rows = torch.full(
            (size,),
            self._state.padding_row,
            dtype=torch.int64,
            device=self._state.block_table.device,
        )
        # Once without capture: compiles kernels and lets cuBLAS make its workspace. All rows are
        # padding, so nothing a sequence owns is touched.
        self._run(rows, bucket, forward, sample)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads of the application may use CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            token_ids, logits = self._run(rows, bucket, forward, sample)
        return StepGraph(graph=graph, rows=rows, token_ids=token_ids, logits=logits)

    def _run(
        self, rows: torch.Tensor, bucket: int, forward: Forward, sample: Sample
    ) -> tuple[torch.Tensor, torch.Tensor]:
        state = self._state
        size = rows.shape[0]
        is_padding = rows == state.padding_row
        positions = state.next_positions[rows]
        max_blocks = -(-bucket // self._block_size)
        block_table = state.block_table[:, :max_blocks][rows]
        blocks = block_table.gather(1, (positions // self._block_size).unsqueeze(1)).squeeze(1)
        slots = blocks.long() * self._block_size + positions % self._block_size
        metadata = AttentionMetadata(
            positions=positions,
            slot_mapping=torch.where(is_padding, -1, slots),
            block_table=block_table,
            seq_lens=torch.where(is_padding, 0, positions + 1).to(torch.int32),
            query_lens=torch.ones(size, dtype=torch.int32, device=rows.device),
            query_start_loc=torch.arange(size + 1, dtype=torch.int32, device=rows.device),
            num_decodes=size,
            max_query_len=1,
            max_seq_len=bucket,
        )
        logits = forward(state.last_token_ids[rows], metadata)
        token_ids = sample(logits, rows, positions + 1)
        state.last_token_ids.index_copy_(0, rows, token_ids.clamp(min=0))
        state.next_positions.index_add_(0, rows, (~is_padding).long())
        return token_ids, logits
