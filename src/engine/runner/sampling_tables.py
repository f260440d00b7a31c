"""`SamplingState`: the settings of every running sequence, on the host and on the device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engine.kernels import sampling_reference as layout
from engine.kernels.sampling_reference import FILTERED, GREEDY, RANDOM, SamplingTables
from engine.runner.token_masks import TokenMasks
from engine.sampling_params import SamplingParams

MIN_TEMPERATURE = 1e-5
"""Lower temperatures are greedy: logits divided by them would leave the range of float32 sums."""

_ALWAYS = 2**31 - 1
_MIN_SPARSE_WIDTH = 8


@dataclass(frozen=True, slots=True)
class SamplerVariant:
    """Which kernels a batch needs. Hashable: one whole-step CUDA graph per variant.

    Attributes:
        draw: `GREEDY`, `RANDOM` or `FILTERED`, the most that any row needs.
        sparse_width: Width of the bias and ban lists, 0 where no row has any. Part of the key,
            because wider lists are a new tensor at a new address; it only ever grows, in powers
            of two, so graphs of a narrower one are never asked for again.
        has_penalties: Some row has a presence, frequency or repetition penalty.
        has_masks: Some row is constrained to a mask of tokens.
        keeps_logits: Masks must not be written into the logits, which are wanted afterwards.
    """

    draw: int
    sparse_width: int
    has_penalties: bool
    has_masks: bool = False
    keeps_logits: bool = False

    @property
    def is_greedy(self) -> bool:
        """True where the batch is an argmax of the logits as they came."""
        is_adjusted = self.sparse_width > 0 or self.has_penalties or self.has_masks
        return self.draw == GREEDY and not is_adjusted


class SamplingState:
    """Settings by state index. Engine thread only.

    On a CPU the device tables are the host arrays themselves. On CUDA, changed rows are gathered
    in pinned memory and sent by `flush`, ordered on the current stream after the steps that still
    use the old values. The pinned blocks come from torch's caching host allocator, which does not
    hand one out again before its copy is done.

    Bytes on the device, for N = max_num_seqs + 1: settings 64 N, lists 12 N W, and from the first
    penalty on counts 2 N V (78 MB for 256 sequences of a 152k vocabulary).

    Attributes:
        vocab_size: V.
        dummy_row: State index for rows of padding; greedy, without penalties.
        settings: Host form of `SamplingTables.settings`, [N, 16] int32.
        sparse: Host form of `SamplingTables.sparse`, [N, 3, W] int32, or None.
        counts: [N, V] int16 on a CPU device; None on CUDA, where only the device has them.
        masks: Of constrained rows; None until there is one.
    """

    def __init__(self, vocab_size: int, max_num_seqs: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.dummy_row = max_num_seqs
        self._num_rows = max_num_seqs + 1
        self._device = device
        self._is_cpu = device.type == "cpu"
        self.settings = np.zeros((self._num_rows, layout.NUM_SETTING_WORDS), np.int32)
        self.sparse: npt.NDArray[np.int32] | None = None
        self.counts: npt.NDArray[np.int16] | None = None
        self.masks: TokenMasks | None = None
        self._floats = self.settings.view(np.float32)
        self._unsigned = self.settings.view(np.uint32)
        for row in range(self._num_rows):
            self._reset_settings(row)
        self._draws = np.full(self._num_rows, GREEDY, np.uint8)
        self._has_sparse = np.zeros(self._num_rows, np.bool_)
        self._has_penalties = np.zeros(self._num_rows, np.bool_)
        self._has_mask = np.zeros(self._num_rows, np.bool_)
        self._wants_logits = np.zeros(self._num_rows, np.bool_)
        self._live_variant: SamplerVariant | None = None
        self._fixed_entries: dict[int, dict[int, tuple[float, int]]] = {}
        self._changed_settings: set[int] = set()
        self._changed_sparse: set[int] = set()
        self._changed_counts: dict[int, npt.NDArray[np.int16]] = {}
        host_settings = torch.from_numpy(self.settings)
        self.tables = SamplingTables(host_settings if self._is_cpu else host_settings.to(device))

    def set_row(
        self,
        row: int,
        params: SamplingParams,
        *,
        seed: int,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
        stop_token_ids: Iterable[int],
        bad_words_ids: Sequence[Sequence[int]],
        is_constrained: bool,
    ) -> None:
        """See `Sampler.set_row`."""
        self._live_variant = None
        self._reset_settings(row)
        floats, words = self._floats[row], self.settings[row]
        temperature = params.temperature
        draw = GREEDY
        if temperature >= MIN_TEMPERATURE:
            floats[layout.WORD_INV_TEMPERATURE] = 1.0 / temperature
            if 0 < params.top_k < self.vocab_size:
                words[layout.WORD_TOP_K] = params.top_k
            floats[layout.WORD_TOP_P] = params.top_p
            if params.min_p > 0:
                floats[layout.WORD_MIN_P_MARGIN] = temperature * math.log(params.min_p)
            has_filter = words[layout.WORD_TOP_K] > 0 or params.top_p < 1 or params.min_p > 0
            draw = FILTERED if has_filter else RANDOM
        self._unsigned[row, layout.WORD_SEED_LOW] = seed & 0xFFFFFFFF
        self._unsigned[row, layout.WORD_SEED_HIGH] = (seed >> 32) & 0xFFFFFFFF
        self._draws[row] = draw
        self._has_penalties[row] = params.has_penalties
        if params.has_penalties:
            floats[layout.WORD_REPETITION] = params.repetition_penalty
            floats[layout.WORD_FREQUENCY] = params.frequency_penalty
            floats[layout.WORD_PRESENCE] = params.presence_penalty
            words[layout.WORD_HAS_PENALTIES] = 1
            self._set_counts(row, prompt_token_ids, output_token_ids)
        self._has_mask[row] = is_constrained
        self._wants_logits[row] = params.logprobs is not None
        if is_constrained:
            words[layout.WORD_HAS_MASK] = 1
            self._need_masks()
        self._changed_settings.add(row)

        single_words = [word for word in bad_words_ids if len(word) == 1]
        longer_words = [word for word in bad_words_ids if len(word) > 1]
        fixed = self._build_fixed_entries(
            params, stop_token_ids, single_words, len(prompt_token_ids)
        )
        self._fixed_entries[row] = fixed
        # Room for all longer words at once, so that bans never widen the lists between steps.
        self._grow_sparse(len(fixed) + len(longer_words))
        self._write_sparse(row, banned_tokens(longer_words, output_token_ids))

    def update_banned(self, row: int, banned_ids: Iterable[int]) -> None:
        """See `Sampler.update_banned`."""
        self._write_sparse(row, banned_ids)

    def free_row(self, row: int) -> None:
        """See `Sampler.free_row`."""
        self._live_variant = None
        self._reset_settings(row)
        self._draws[row] = GREEDY
        self._has_penalties[row] = False
        self._has_mask[row] = self._wants_logits[row] = False
        self._changed_counts.pop(row, None)
        self._changed_settings.add(row)
        self._fixed_entries.pop(row, None)
        self._write_sparse(row, ())
        if self.counts is not None:
            self.counts[row] = 0

    def variant(self, rows: npt.NDArray[np.integer]) -> SamplerVariant:
        """See `Sampler.variant`."""
        if len(rows) == 0:
            return SamplerVariant(GREEDY, 0, has_penalties=False)
        has_sparse = self.sparse is not None and bool(self._has_sparse[rows].any())
        has_masks = bool(self._has_mask[rows].any())
        return SamplerVariant(
            draw=int(self._draws[rows].max()),
            sparse_width=self.sparse.shape[2] if has_sparse and self.sparse is not None else 0,
            has_penalties=bool(self._has_penalties[rows].any()),
            has_masks=has_masks,
            keeps_logits=has_masks and bool(self._wants_logits[rows].any()),
        )

    def live_variant(self) -> SamplerVariant:
        """The variant of all rows together, whoever of them is in the batch.

        Worked out anew only after a row has changed, and without giving up the GIL.
        """
        if self._live_variant is None:
            # As bytes: NumPy gives up the GIL for more than 500 rows, even to count them.
            draws = self._draws.tobytes()
            has_sparse = True in self._has_sparse.tobytes()
            has_masks = True in self._has_mask.tobytes()
            self._live_variant = SamplerVariant(
                draw=next((draw for draw in (FILTERED, RANDOM) if draw in draws), GREEDY),
                sparse_width=self.sparse.shape[2] if has_sparse and self.sparse is not None else 0,
                has_penalties=True in self._has_penalties.tobytes(),
                has_masks=has_masks,
                keeps_logits=has_masks and True in self._wants_logits.tobytes(),
            )
        return self._live_variant

    def flush(self) -> None:
        """Send changed rows to the device; nothing to do on a CPU."""
        if not self._is_cpu:
            self._upload(self.tables.settings, self.settings, self._changed_settings)
        self._changed_settings.clear()
        self.flush_lists()

    def flush_lists(self) -> None:
        """Send changed lists and counts, which few requests have, but not the settings."""
        if not self._changed_sparse and not self._changed_counts:
            return
        if not self._is_cpu:
            if self.tables.sparse is not None and self.sparse is not None:
                self._upload(self.tables.sparse, self.sparse, self._changed_sparse)
            for row, row_counts in self._changed_counts.items():
                assert self.tables.counts is not None, "counts are allocated with the first penalty"
                pinned = torch.from_numpy(row_counts).pin_memory()
                self.tables.counts[row].copy_(pinned, non_blocking=True)
        self._changed_sparse.clear()
        self._changed_counts.clear()

    def take_changed_settings(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """State indices [R] with new settings and their words [R, 16]; they count as sent."""
        rows = np.fromiter(self._changed_settings, np.int32, len(self._changed_settings))
        self._changed_settings.clear()
        if not len(rows):
            return rows, self.settings[:0]
        # Row by row: NumPy gives up the GIL for an array of indices into rows, however few.
        words = np.concatenate([self.settings[row] for row in rows.tolist()])
        return rows, words.reshape(len(rows), layout.NUM_SETTING_WORDS)

    def _upload(
        self, table: torch.Tensor, host: npt.NDArray[np.int32], changed_rows: set[int]
    ) -> None:
        if not changed_rows:
            return
        rows = np.fromiter(changed_rows, np.int32, len(changed_rows))
        flat = host.reshape(self._num_rows, -1)
        pinned = torch.empty((len(rows), 1 + flat.shape[1]), dtype=torch.int32, pin_memory=True)
        staging = pinned.numpy()
        staging[:, 0] = rows
        staging[:, 1:] = flat[rows]
        sent = pinned.to(self._device, non_blocking=True)
        table.view(self._num_rows, -1).index_copy_(0, sent[:, 0].long(), sent[:, 1:])

    def _reset_settings(self, row: int) -> None:
        self.settings[row] = 0
        self._floats[row, layout.WORD_TOP_P] = 1.0
        self._floats[row, layout.WORD_MIN_P_MARGIN] = -np.inf
        self._floats[row, layout.WORD_REPETITION] = 1.0

    def _need_masks(self) -> None:
        if self.masks is None:
            self.masks = TokenMasks(self._num_rows, self.vocab_size, is_pinned=not self._is_cpu)
            self.tables.masks = self.masks.tensor

    def _set_counts(
        self, row: int, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int]
    ) -> None:
        if self.tables.counts is None:
            shape = (self._num_rows, self.vocab_size)
            if self._is_cpu:
                self.counts = np.zeros(shape, np.int16)
                self.tables.counts = torch.from_numpy(self.counts)
            else:
                self.tables.counts = torch.zeros(shape, dtype=torch.int16, device=self._device)
        output = _known_ids(output_token_ids, self.vocab_size)
        times = np.bincount(output, minlength=self.vocab_size)
        row_counts = np.minimum(times, layout.COUNT_MASK).astype(np.int16)
        row_counts[_known_ids(prompt_token_ids, self.vocab_size)] |= np.int16(layout.PROMPT_BIT)
        if self.counts is not None:
            self.counts[row] = row_counts
        else:
            self._changed_counts[row] = row_counts

    def _build_fixed_entries(
        self,
        params: SamplingParams,
        stop_token_ids: Iterable[int],
        single_words: Iterable[Sequence[int]],
        num_prompt_tokens: int,
    ) -> dict[int, tuple[float, int]]:
        """Token id -> (bias, position before which it is banned)."""
        biases: Mapping[int, float] = params.logit_bias or {}
        largest = layout.LARGEST_LOGIT
        entries = {
            token_id: (min(max(bias, -largest), largest) if bias != -math.inf else bias, 0)
            for token_id, bias in biases.items()
        }
        if params.min_tokens > 0:
            for token_id in stop_token_ids:
                bias = entries.get(token_id, (0.0, 0))[0]
                entries[token_id] = (bias, num_prompt_tokens + params.min_tokens)
        for word in single_words:
            entries[word[0]] = (0.0, _ALWAYS)
        # A tokenizer may know ids that the model has no logits for; those are never sampled.
        return {key: value for key, value in entries.items() if 0 <= key < self.vocab_size}

    def _grow_sparse(self, num_entries: int) -> None:
        width = 0 if self.sparse is None else self.sparse.shape[2]
        if num_entries <= width:
            return
        new_width = max(_MIN_SPARSE_WIDTH, 1 << (num_entries - 1).bit_length())
        wider = np.zeros((self._num_rows, 3, new_width), np.int32)
        wider[:, 0] = -1
        if self.sparse is not None:
            wider[:, :, :width] = self.sparse
        self.sparse = wider
        host = torch.from_numpy(wider)
        self._live_variant = None
        # A new tensor, never a resized one: steps in flight still read the old.
        self.tables.sparse = host if self._is_cpu else host.to(self._device)

    def _write_sparse(self, row: int, banned_ids: Iterable[int]) -> None:
        entries = dict(self._fixed_entries.get(row, {}))
        entries.update({i: (0.0, _ALWAYS) for i in banned_ids if 0 <= i < self.vocab_size})
        if not entries and not self._has_sparse[row]:
            return
        self._grow_sparse(len(entries))
        assert self.sparse is not None, "lists exist once a row has an entry"
        lists = self.sparse[row]
        lists[0], lists[1:] = -1, 0
        for slot, (token_id, (bias, banned_before)) in enumerate(entries.items()):
            lists[0, slot] = token_id
            lists[1].view(np.float32)[slot] = bias
            lists[2, slot] = banned_before
        if self._has_sparse[row] != bool(entries):
            self._live_variant = None
            self._has_sparse[row] = bool(entries)
        self._changed_sparse.add(row)


def banned_tokens(
    bad_words_ids: Sequence[Sequence[int]], output_token_ids: Sequence[int]
) -> list[int]:
    """Ids that would complete a bad word now.

    Args:
        bad_words_ids: Token ids of each word; a word may appear in several tokenizations.
        output_token_ids: The answer so far. The prompt does not count: the promise is about
            what the answer contains.

    Returns:
        Sorted ids; words of one token are always among them.
    """
    banned = set()
    for word in bad_words_ids:
        num_before = len(word) - 1
        if num_before < 0 or num_before > len(output_token_ids):
            continue
        tail = output_token_ids[len(output_token_ids) - num_before :]
        if list(tail) == list(word[:-1]):
            banned.add(word[-1])
    return sorted(banned)


def _known_ids(token_ids: Sequence[int], vocab_size: int) -> npt.NDArray[np.int64]:
    ids = np.asarray(token_ids, np.int64)
    return ids[(ids >= 0) & (ids < vocab_size)]
