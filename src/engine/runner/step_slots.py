"""`StepSlots`: the pinned memory through which host and captured steps talk to each other.

Layout and protocol are written down in `engine.kernels.captured_step`. The host's side is NumPy
on that memory alone: no call into torch or CUDA, so no hand-over of the GIL.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.core.batch import BlockUpdate, ScheduledBatch
from engine.core.pieces import joined, pieces
from engine.core.prefix_groups import MAX_GROUPS
from engine.core.state import SequenceTable
from engine.kernels.captured_inputs import CapturedStepState, StepSlotLayout
from engine.kernels.sampling_reference import NUM_SETTING_WORDS

NUM_SLOTS = 64
"""A power of two, so that the launch count may wrap; twice what may be in flight."""
_MAX_UPDATES = 16384
_TAG_MASK = 0x7FFFFFFF

Int32Array = npt.NDArray[np.int32]


class StepSlots:
    """Writes the parameters of captured steps and reads their results.

    Args:
        max_num_seqs: S, sequences of a step at most.
        max_num_tokens: T at most.
        max_blocks: Width of the block table.
        block_size: Tokens per KV block.
        settings: [S + 1, words] int32, the sampler's table on the device.
        device: A CUDA device.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_num_tokens: int,
        max_blocks: int,
        block_size: int,
        settings: torch.Tensor,
        device: torch.device,
    ) -> None:
        layout = StepSlotLayout(max_num_seqs, max_num_tokens, _MAX_UPDATES, MAX_GROUPS)
        is_cuda = device.type == "cuda"
        params = torch.zeros((NUM_SLOTS, layout.size), dtype=torch.int32, pin_memory=is_cuda)
        results = torch.zeros((NUM_SLOTS, max_num_seqs), dtype=torch.int64, pin_memory=is_cuda)
        self.state = CapturedStepState(
            layout=layout,
            params=params,
            results=results,
            launch_count=torch.zeros(1, dtype=torch.int32, device=device),
            block_table=torch.zeros(
                (max_num_seqs + 1, max_blocks), dtype=torch.int32, device=device
            ),
            settings=settings,
            last_token_ids=torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device),
        )
        self._params: Int32Array = params.numpy()
        self._results: npt.NDArray[np.int64] = results.numpy()
        self._max_blocks = max_blocks
        self._block_size = block_size
        self._launch_count = 0
        # State indices whose newest token is not in `last_token_ids`: new owners, and prompts that
        # are not finished.
        self._rows_without_token: set[int] = set()
        self._iota = np.arange(max_blocks, dtype=np.int32)

    def write_empty(self) -> None:
        """Parameters of a step without sequences, for the launch that comes next."""
        self._params[self._launch_count % NUM_SLOTS, : self.state.layout.seqs] = 0

    def write(
        self,
        batch: ScheduledBatch,
        table: SequenceTable,
        settings_rows: Int32Array,
        settings_words: Int32Array,
    ) -> bool:
        """Parameters of the launch that comes next, which has to follow.

        Args:
            batch: The step.
            table: For its token ids and new block ids.
            settings_rows: [R] state indices whose sampler settings changed.
            settings_words: [R, words] their settings.

        Returns:
            False where the block table changed in more places than a slot holds: the caller must
            then `apply_updates` before the launch.
        """
        layout = self.state.layout
        slot = self._params[self._launch_count % NUM_SLOTS]
        num_seqs, size = batch.num_seqs, layout.max_seqs
        at = layout.seqs
        columns: tuple[npt.NDArray[Any], ...] = (
            batch.rows,
            batch.num_scheduled_tokens,
            batch.num_computed_tokens,
            batch.is_sampling,
        )
        for piece in pieces(num_seqs):
            for place, column in enumerate(columns):
                start = at + place * size
                slot[start + piece.start : start + piece.stop] = column[piece]
        num_decodes = batch.num_decodes
        # In the steady state every input is what its row sampled last, and is on the device.
        needs_ids = num_decodes < num_seqs or bool(self._rows_without_token)
        if batch.prefix_groups:
            self._write_groups(slot, batch)
        if needs_ids:
            self._write_ids(slot[layout.ids : layout.updates], batch, table, num_decodes)
        num_updates = self._write_updates(slot[layout.updates :], batch, table)
        num_settings = len(settings_rows)
        at = layout.settings
        slot[at : at + num_settings] = settings_rows
        at += size
        slot[at : at + num_settings * NUM_SETTING_WORDS].data[:] = settings_words.reshape(-1).data
        slot[0] = num_seqs
        slot[1] = num_decodes
        slot[2] = batch.num_tokens
        slot[3] = max(num_updates, 0)
        slot[4] = num_settings
        slot[5] = batch.num_tokens if needs_ids else 0
        slot[6] = len(batch.prefix_groups)
        if self._rows_without_token:
            for piece in pieces(num_seqs):
                self.note_sampled(batch.rows[piece][batch.is_sampling[piece]].tolist())
        return num_updates >= 0

    def apply_updates(self, updates: list[BlockUpdate]) -> None:
        """Bring changes of the block table to the device without a slot, before the next launch."""
        if not updates:
            return
        counts = [len(update.block_ids) for update in updates]
        rows = np.repeat([update.row for update in updates], counts)
        columns = np.concatenate(
            [np.arange(update.start, update.start + len(update.block_ids)) for update in updates]
        )
        block_ids = np.concatenate([np.asarray(update.block_ids) for update in updates])
        table = self.state.block_table
        on_device = torch.from_numpy(np.stack([rows, columns, block_ids])).to(table.device)
        table.index_put_((on_device[0], on_device[1]), on_device[2].to(torch.int32))

    def note_new(self, rows: list[int]) -> None:
        """`rows` have new owners: what they sampled last is somebody else's."""
        self._rows_without_token.update(rows)

    def note_sampled(self, rows: list[int]) -> None:
        """A launched step brings the newest tokens of `rows` into `last_token_ids`."""
        self._rows_without_token.difference_update(rows)

    def count_launch(self) -> StepTicket:
        """Note that the step has been launched; its results come under the ticket."""
        slot = self._launch_count % NUM_SLOTS
        self._launch_count = (self._launch_count + 1) & _TAG_MASK
        return StepTicket(self._results[slot], self._launch_count)

    def follow_device(self) -> None:
        """Count on from where the device is, after a launch that failed half way.

        Nothing may be in flight.
        """
        self._launch_count = int(self.state.launch_count.item())

    def _write_groups(self, slot: Int32Array, batch: ScheduledBatch) -> None:
        layout, block_size = self.state.layout, self._block_size
        prefix_lens = slot[layout.seqs + 4 * layout.max_seqs : layout.groups]
        prefix_lens[: batch.num_seqs] = 0
        starts_at = layout.groups + layout.max_groups
        members_at = starts_at + layout.max_groups + 1
        place = 0
        slot[starts_at] = 0
        for index, group in enumerate(batch.prefix_groups):
            num_tokens = group.num_blocks * block_size
            prefix_lens[group.members] = num_tokens
            slot[layout.groups + index] = num_tokens
            end = place + len(group.members)
            slot[members_at + place : members_at + end] = group.members
            slot[starts_at + index + 1] = end
            place = end

    def _write_ids(
        self, ids: Int32Array, batch: ScheduledBatch, table: SequenceTable, num_decodes: int
    ) -> None:
        rows, starts = batch.rows, batch.num_computed_tokens
        # By places in the flat table: NumPy gives up the GIL for pairs of indices.
        tokens, width = table.token_ids.reshape(-1), table.token_ids.shape[1]
        for piece in pieces(num_decodes):
            ids[piece] = tokens[rows[piece] * width + starts[piece]]
        place = num_decodes
        for row, start, count in zip(
            rows[num_decodes:].tolist(),
            starts[num_decodes:].tolist(),
            batch.num_scheduled_tokens[num_decodes:].tolist(),
            strict=True,
        ):
            # As memory: a long copy between arrays gives up the GIL.
            ids[place : place + count].data[:] = table.token_ids[row, start : start + count].data
            place += count

    def _write_updates(self, words: Int32Array, batch: ScheduledBatch, table: SequenceTable) -> int:
        """Write the changed table entries; their number, or -1 where there is no room."""
        room = self.state.layout.max_updates
        place = 0
        for update in batch.block_updates:
            count = len(update.block_ids)
            end = place + count
            if end > room:
                return -1
            index = words[place:end]
            index[...] = self._iota[:count]
            index += update.row * self._max_blocks + update.start
            words[room + place : room + end] = table.block_table[
                update.row, update.start : update.start + count
            ]
            place = end
        return place


class StepTicket:
    """The results of one launched step, when they are there.

    Args:
        results: [S] int64, the slot's place in pinned memory.
        tag: What marks this step's entries.
    """

    __slots__ = ("_results", "_tag")

    def __init__(self, results: npt.NDArray[np.int64], tag: int) -> None:
        self._results = results
        self._tag = tag

    def is_done(self, num_seqs: int) -> bool:
        """Whether the first `num_seqs` results have arrived. Keeps the GIL."""
        return all(
            bool(((self._results[piece] >> 32) == self._tag).all()) for piece in pieces(num_seqs)
        )

    def token_ids(self, num_seqs: int) -> npt.NDArray[np.int64]:
        """The sampled ids, new [num_seqs] int64; -1 where nothing could be sampled."""
        parts = [self._results[piece] for piece in pieces(num_seqs)]
        return joined([part.astype(np.int32).astype(np.int64) for part in parts])
