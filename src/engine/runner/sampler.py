"""`Sampler`: logits of a batch -> token ids, every row under its own options.

Order of operations, as in vLLM: raw logits, `logit_bias`, ban of stop ids below `min_tokens`, ban
of bad words, repetition, frequency and presence penalty, mask of a constraint, temperature, then
`min_p`, `top_k` and `top_p`, each over what the one before kept, then the draw. Formula, ties and
noise are written down in `engine.kernels.sampling_reference`.

On CUDA the Triton kernels of `engine.kernels.sampling` run, elsewhere NumPy
(`engine.runner.sampling_cpu`). Both read the tables of `engine.runner.sampling_tables`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.core.batch import ScheduledBatch
from engine.core.state import SequenceTable
from engine.kernels.sampling_reference import SamplingTables
from engine.runner.sampling_cpu import sample_on_cpu
from engine.runner.sampling_logprobs import gather_logprobs
from engine.runner.sampling_rules import check_params, needs_host_sync
from engine.runner.sampling_tables import SamplerVariant, SamplingState, banned_tokens
from engine.sampling_params import SamplingParams

__all__ = [
    "Sampler",
    "SamplerVariant",
    "banned_tokens",
    "check_params",
    "gather_logprobs",
    "needs_host_sync",
]


class Sampler:
    """Draws tokens and keeps what the draws depend on. Owned and called by the engine thread.

    Per step: `set_row` for rows (re)admitted, `update_banned` for those with bad words of several
    tokens, `flush` once, `fill_masks`, then `sample`, directly or in a CUDA graph captured for
    `variant(rows)`.
    Steps may be launched ahead: penalty counts follow the sampled tokens on the device.

    A row whose logits are all NaN or -inf samples -1; NaN among finite values counts as -inf.
    Neither touches other rows. The engine ends such a request with a `StepError`.
    """

    def __init__(self, vocab_size: int, max_num_seqs: int, device: torch.device | str) -> None:
        """Allocate the per-row tables.

        Args:
            vocab_size: V, width of the logits.
            max_num_seqs: State indices 0 … max_num_seqs - 1; one more is the dummy row.
            device: Where the logits are.
        """
        self._device = torch.device(device)
        self._state = SamplingState(vocab_size, max_num_seqs, self._device)

    @property
    def dummy_row(self) -> int:
        """State index for rows of padding: greedy and without side effects, any number of times."""
        return self._state.dummy_row

    @property
    def tables(self) -> SamplingTables:
        """The device tables, as the kernels read them."""
        return self._state.tables

    @property
    def greedy_variant(self) -> SamplerVariant:
        """The variant of a batch that is all argmax, for warming up."""
        return self._state.variant(np.empty(0, np.int64))

    def set_row(
        self,
        row: int,
        params: SamplingParams,
        *,
        seed: int,
        prompt_token_ids: Sequence[int] = (),
        output_token_ids: Sequence[int] = (),
        stop_token_ids: Iterable[int] = (),
        bad_words_ids: Sequence[Sequence[int]] = (),
        is_constrained: bool = False,
    ) -> None:
        """Load the options of a sequence that starts, or starts again after preemption.

        Args:
            row: Its state index.
            params: Its options, checked by `check_params`.
            seed: Of this answer, taken modulo 2^64; see `engine.core.request.answer_seed`.
            prompt_token_ids: For the repetition penalty and to count from for `min_tokens`.
            output_token_ids: New tokens so far.
            stop_token_ids: Never sampled before `min_tokens`; ids beyond V are skipped.
            bad_words_ids: Token ids of each bad word. Words of one token are banned for good;
                for longer ones see `update_banned`.
            is_constrained: Only tokens of the row's mask are sampled; see `fill_masks`.
        """
        self._state.set_row(
            row,
            params,
            seed=seed,
            prompt_token_ids=prompt_token_ids,
            output_token_ids=output_token_ids,
            stop_token_ids=stop_token_ids,
            bad_words_ids=bad_words_ids,
            is_constrained=is_constrained,
        )

    def fill_masks(self, batch: ScheduledBatch, table: SequenceTable) -> None:
        """Make the masks of the constrained sequences that sample in `batch`; see `TokenMasks`."""
        if table.num_constrained and self._state.masks is not None:
            self._state.masks.fill(batch, table)

    def update_banned(self, row: int, banned_ids: Iterable[int]) -> None:
        """Replace the bans that depend on the last tokens.

        For sequences where `needs_host_sync(bad_words_ids)`: call before each step with
        `banned_tokens(bad_words_ids, output_token_ids)`. Bans from `set_row` stay.
        """
        self._state.update_banned(row, banned_ids)

    def free_row(self, row: int) -> None:
        """Forget a row's options, lists and counts; it is then like the dummy row."""
        self._state.free_row(row)

    def variant(self, rows: npt.NDArray[np.integer]) -> SamplerVariant:
        """Which kernels a batch of these state indices needs; host data only.

        Args:
            rows: [B] state indices; padding need not be among them.
        """
        return self._state.variant(rows)

    def live_variant(self) -> SamplerVariant:
        """The variant that serves any batch of the rows set so far; cheap while none changes."""
        return self._state.live_variant()

    def flush(self) -> None:
        """Send rows changed since the last call to the device, on the current stream."""
        self._state.flush()

    def flush_lists(self) -> None:
        """Send changed lists and counts only; see `take_changed_settings`."""
        self._state.flush_lists()

    def take_changed_settings(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Changed rows of `tables.settings` for the caller to bring to the device.

        Returns:
            State indices [R] int32 and their words [R, 16] int32. They count as sent.
        """
        return self._state.take_changed_settings()

    def sample(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        variant: SamplerVariant,
    ) -> torch.Tensor:
        """One token per row, and the counts of rows with penalties updated.

        On CUDA there is no host sync and all shapes follow from R and V, so that the call can be
        captured in a CUDA graph after one warm-up call of the same variant.

        Args:
            logits: [R, V] bf16, fp16 or fp32 with unit stride along V; not changed, but where the
                variant has masks and does not keep logits.
            rows: [R] int64 on the device, state indices; `dummy_row` for padding. A row with
                penalties stands there once.
            positions: [R] int64 on the device, position in its sequence of the token to be
                sampled: the first new token has the prompt's length. In [0, 2^32).
            variant: From `variant` for these rows.

        Returns:
            New [R] int64 tensor on the device; -1 for rows without a value above -inf.
        """
        assert logits.shape == (rows.shape[0], self._state.vocab_size), (
            f"logits must be [{rows.shape[0]}, {self._state.vocab_size}], got {logits.shape}"
        )
        if self._device.type != "cuda":
            return sample_on_cpu(logits, self._state, rows, positions, variant)
        # Triton exists on Linux only, so it is imported where a GPU is already in use.
        from engine.kernels.sampling import sample_tokens

        return sample_tokens(
            logits,
            self._state.tables,
            rows,
            positions,
            draw=variant.draw,
            use_sparse=variant.sparse_width > 0,
            use_penalties=variant.has_penalties,
            use_masks=variant.has_masks,
            keeps_logits=variant.keeps_logits,
        )

    def gather_logprobs(
        self, logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `engine.runner.sampling_logprobs.gather_logprobs`."""
        return gather_logprobs(logits, token_ids, num_top)
