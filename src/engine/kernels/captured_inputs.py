"""What a captured step is told and what it derives: the slot's layout and the tensors beside it.

How they are filled, and by whom, is written down in `engine.kernels.captured_step`. No Triton here:
the host's side of the slots (`engine.runner.step_slots`) needs the layout, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.kernels.metadata import SharedPrefixes
from engine.kernels.sampling_reference import NUM_SETTING_WORDS

HEADER_WORDS = 16


@dataclass(frozen=True, slots=True)
class StepSlotLayout:
    """Where things stand in a slot of the parameters, in int32 words.

    Attributes:
        max_seqs: S, sequences of a step at most, and the index of the padding row.
        max_tokens: T at most.
        max_updates: U, changed block-table entries at most.
        max_groups: G, prefix groups at most.
    """

    max_seqs: int
    max_tokens: int
    max_updates: int
    max_groups: int

    @property
    def seqs(self) -> int:
        """First word of the five runs of S words that describe sequences."""
        return HEADER_WORDS

    @property
    def groups(self) -> int:
        """First word of the prefix groups: G lengths, G + 1 first members, S members."""
        return self.seqs + 5 * self.max_seqs

    @property
    def ids(self) -> int:
        """First word of the token ids."""
        return self.groups + 2 * self.max_groups + 1 + self.max_seqs

    @property
    def updates(self) -> int:
        """First word of the block table's changes: U indices, then U block ids."""
        return self.ids + self.max_tokens

    @property
    def settings(self) -> int:
        """First word of the changed settings: S rows, then S times their words."""
        return self.updates + 2 * self.max_updates

    @property
    def size(self) -> int:
        """Words of a slot."""
        return self.settings + self.max_seqs * (1 + NUM_SETTING_WORDS)


@dataclass(slots=True)
class CapturedStepState:
    """Device tensors that outlive a step, and the two pinned rings. See the module's tables.

    Attributes:
        layout: Of a slot.
        params: [num_slots, layout.size] int32, pinned.
        results: [num_slots, S] int64, pinned.
        launch_count: [1] int32.
        block_table: [S + 1, max_blocks] int32.
        settings: [S + 1, NUM_SETTING_WORDS] int32, the sampler's.
        last_token_ids: [S + 1] int64.
    """

    layout: StepSlotLayout
    params: torch.Tensor
    results: torch.Tensor
    launch_count: torch.Tensor
    block_table: torch.Tensor
    settings: torch.Tensor
    last_token_ids: torch.Tensor


@dataclass(slots=True)
class CapturedInputs:
    """What the first kernels derive, for B sequences and T tokens, padding included.

    Attributes:
        input_ids: [T] int64.
        positions: [T] int64; 0 for padding.
        slot_mapping: [T] int64; -1 for padding.
        seq_lens: [B] int32; 0 for padding.
        query_lens: [B] int32; 0 for padding.
        query_start_loc: [B + 1] int32.
        block_rows: [B] int64, state index; the padding row for padding.
        device_counts: [2] int32, (decoding, all) sequences.
        sampling_rows: [B] int64, state index where the sequence samples, else the padding row.
        sampling_positions: [B] int64, position of the token to be sampled.
        logits_indices: [B] int64, row of the sequence's last token in the flat batch.
        shared_prefixes: Prefix groups of the decoding sequences.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    seq_lens: torch.Tensor
    query_lens: torch.Tensor
    query_start_loc: torch.Tensor
    block_rows: torch.Tensor
    device_counts: torch.Tensor
    sampling_rows: torch.Tensor
    sampling_positions: torch.Tensor
    logits_indices: torch.Tensor
    shared_prefixes: SharedPrefixes

    @classmethod
    def zeros(
        cls, num_seqs: int, num_tokens: int, max_groups: int, device: torch.device
    ) -> CapturedInputs:
        """Tensors for B = `num_seqs` and T = `num_tokens`, as no step has written them yet."""

        def make(size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        return cls(
            input_ids=make(num_tokens, torch.int64),
            positions=make(num_tokens, torch.int64),
            slot_mapping=make(num_tokens, torch.int64),
            seq_lens=make(num_seqs, torch.int32),
            query_lens=make(num_seqs, torch.int32),
            query_start_loc=make(num_seqs + 1, torch.int32),
            block_rows=make(num_seqs, torch.int64),
            device_counts=make(2, torch.int32),
            sampling_rows=make(num_seqs, torch.int64),
            sampling_positions=make(num_seqs, torch.int64),
            logits_indices=make(num_seqs, torch.int64),
            shared_prefixes=SharedPrefixes(
                members=make(num_seqs, torch.int32),
                member_start=make(max_groups + 1, torch.int32),
                group_lens=make(max_groups, torch.int32),
                prefix_lens=make(num_seqs, torch.int32),
            ),
        )

    def narrow(self, num_seqs: int, num_tokens: int) -> CapturedInputs:
        """Views for a smaller size, at the same addresses."""
        return CapturedInputs(
            input_ids=self.input_ids[:num_tokens],
            positions=self.positions[:num_tokens],
            slot_mapping=self.slot_mapping[:num_tokens],
            seq_lens=self.seq_lens[:num_seqs],
            query_lens=self.query_lens[:num_seqs],
            query_start_loc=self.query_start_loc[: num_seqs + 1],
            block_rows=self.block_rows[:num_seqs],
            device_counts=self.device_counts,
            sampling_rows=self.sampling_rows[:num_seqs],
            sampling_positions=self.sampling_positions[:num_seqs],
            logits_indices=self.logits_indices[:num_seqs],
            shared_prefixes=SharedPrefixes(
                members=self.shared_prefixes.members[:num_seqs],
                member_start=self.shared_prefixes.member_start,
                group_lens=self.shared_prefixes.group_lens,
                prefix_lens=self.shared_prefixes.prefix_lens[:num_seqs],
            ),
        )
