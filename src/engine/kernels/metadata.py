"""`AttentionMetadata`: what every layer's attention needs to know of the ragged batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")


@dataclass(slots=True)
class SharedPrefixes:
    """Groups of decoding sequences whose leading KV blocks are the same, read once per group.

    All tensors live on the model's device. Letters: G groups (an upper bound, under CUDA graphs a
    fixed one), B sequences. A sequence is in one group at most; a prefix is whole blocks and
    shorter than the shortest of its members.

    Attributes:
        members: [B] int32, indices of decoding sequences, group after group; entries past
            `member_start[G]` are not read.
        member_start: [G+1] int32, running sum of the groups' sizes; equal ends mark unused groups,
            which come last.
        group_lens: [G] int32, tokens of each group's prefix, a multiple of block_size; 0 if unused.
        prefix_lens: [B] int32, tokens of each sequence's prefix that its group reads; 0 without.
    """

    members: torch.Tensor
    member_start: torch.Tensor
    group_lens: torch.Tensor
    prefix_lens: torch.Tensor


@dataclass(slots=True)
class AttentionMetadata:
    """Layout of one step's flat token batch. Letters: T tokens, B sequences.

    Sequences that decode (query_len 1) come first, so that rows `[0, num_decodes)` of every
    tensor go to the decode kernel and the rest to the prefill kernel. All tensors live on the
    model's device and are contiguous. Rows of padding (CUDA graphs) have `seq_lens` 0 and slot -1.

    A captured step fits many batches: shapes are then upper bounds, and `device_counts` has the
    numbers of the batch at hand. Sequences from `device_counts[1]` on and tokens past the last
    sequence are padding; their outputs are arbitrary.

    Attributes:
        positions: [T] int64, position of each token in its sequence.
        slot_mapping: [T] int64, block_id * block_size + offset of each new token; -1 marks padding
            and writes nothing.
        block_table: [B, max_blocks] int32, logical to physical block ids; entries past a
            sequence's length are arbitrary valid ids (0 by convention) and never read.
        seq_lens: [B] int32, KV length after this step.
        query_lens: [B] int32, new tokens in this step.
        query_start_loc: [B+1] int32, running sum of `query_lens`.
        num_decodes: Leading sequences with query_len 1; with `device_counts` an upper bound.
        max_query_len: Largest entry of `query_lens`, on the host (bounds the grid).
        max_seq_len: Largest entry of `seq_lens`, on the host; under CUDA graphs an upper bound.
        block_rows: [B] int64, row of `block_table` of each sequence, so that the table of all
            running sequences serves without a copy; None: sequence b has row b.
        device_counts: [2] int32, (decoding sequences, all sequences) of this batch; None where
            `num_decodes` and the shapes are exact.
        max_prefills: With `device_counts`, an upper bound on the prefilling sequences.
        shared_prefixes: Decoding sequences that share blocks; None: nobody does, or nobody looked.
        side_stream: CUDA stream on which prefills are computed beside the decodes of the same
            layer; None: after them.
        seq_lens_host: `seq_lens` as a list for the plain-torch path; None under CUDA graphs.
        query_lens_host: `query_lens` as a list, likewise.
        block_table_host: Per sequence the list of its block ids (only those in use), likewise.
        step_cache: What the kernels derived from the fields above, shared by the layers of one
            forward. Owned by `dispatch`; None until `dispatch.begin_step` opens it.
    """

    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_lens: torch.Tensor
    query_start_loc: torch.Tensor
    num_decodes: int
    max_query_len: int
    max_seq_len: int
    block_rows: torch.Tensor | None = None
    device_counts: torch.Tensor | None = None
    max_prefills: int = 0
    shared_prefixes: SharedPrefixes | None = None
    side_stream: torch.cuda.Stream | None = None
    seq_lens_host: list[int] | None = None
    query_lens_host: list[int] | None = None
    block_table_host: list[list[int]] | None = None
    step_cache: dict[Any, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def num_seqs(self) -> int:
        """Sequences in the batch, padding rows included."""
        return self.seq_lens.shape[0]

    def once_per_step(self, key: object, make: Callable[[], _T]) -> _T:
        """`make()`, or what it returned for this key earlier in the step.

        Without `dispatch.begin_step` nothing is kept: a stale answer would be worse than a slow
        one, and only the forward knows when its step begins.
        """
        if self.step_cache is None:
            return make()
        if key not in self.step_cache:
            self.step_cache[key] = make()
        value: _T = self.step_cache[key]
        return value
