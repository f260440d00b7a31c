"""Runs a model over a paged KV cache without a scheduler: block bookkeeping for tests.

    driver = PagedDriver(decoder, num_blocks=32, block_size=16, seed=0)
    seq = driver.add(prompt_ids)
    logits = driver.step([(seq, 7)])[0]      # first 7 tokens of the prompt: [7, V]
    driver.step([(seq, None)])               # all the rest
    seq.token_ids.append(next_id)            # then one step decodes it

Physical blocks are handed out in random order. The cache starts out as NaN, so that a read of a
block or an offset that holds no token shows up in the logits.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from engine.kernels.kv_cache import KVCache, KVTensor, QuantisedCache, make_cache
from engine.kernels.metadata import AttentionMetadata


class PagedModel(Protocol):
    """What the driver needs; `engine.models.decoder.Decoder` is one."""

    device: torch.device
    dtype: torch.dtype

    def kv_cache_shape(self, num_blocks: int, block_size: int) -> tuple[int, int, int, int]: ...

    def forward(
        self,
        input_ids: torch.Tensor,
        kv_caches: Sequence[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor: ...

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


@dataclass(eq=False)
class DriverSeq:
    """One sequence: its tokens, how many of them have KV, and its blocks."""

    token_ids: list[int]
    num_computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)


def build_metadata(
    rows: Sequence[tuple[int, int, Sequence[int]]],
    block_size: int,
    device: torch.device | str = "cpu",
    *,
    num_padding_tokens: int = 0,
) -> AttentionMetadata:
    """Metadata of a batch from (num_computed_tokens, num_scheduled_tokens, block_ids) per sequence.

    Sequences with one scheduled token must come first. `num_padding_tokens` appends rows as a
    padded CUDA graph has them: slot -1, `seq_lens` 0.
    """
    positions, slots, seq_lens, query_lens = [], [], [], []
    for num_computed, num_scheduled, block_ids in rows:
        for position in range(num_computed, num_computed + num_scheduled):
            positions.append(position)
            slots.append(block_ids[position // block_size] * block_size + position % block_size)
        seq_lens.append(num_computed + num_scheduled)
        query_lens.append(num_scheduled)
    tables = [list(block_ids) for _, _, block_ids in rows]
    for _ in range(num_padding_tokens):
        positions.append(0)
        slots.append(-1)
        seq_lens.append(0)
        query_lens.append(1)
        tables.append([])
    num_decodes = next((i for i, n in enumerate(query_lens) if n > 1), len(query_lens))
    if 1 in query_lens[num_decodes:]:
        raise ValueError("sequences with one scheduled token must come first")
    width = max(1, max(map(len, tables)))
    starts = [0]
    for length in query_lens:
        starts.append(starts[-1] + length)

    def tensor(values: object, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return AttentionMetadata(
        positions=tensor(positions, torch.int64),
        slot_mapping=tensor(slots, torch.int64),
        block_table=tensor([row + [0] * (width - len(row)) for row in tables], torch.int32),
        seq_lens=tensor(seq_lens, torch.int32),
        query_lens=tensor(query_lens, torch.int32),
        query_start_loc=tensor(starts, torch.int32),
        num_decodes=num_decodes,
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        seq_lens_host=seq_lens,
        query_lens_host=query_lens,
        block_table_host=tables,
    )


def _poisoned(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> KVTensor:
    """A cache whose every number is NaN; in 8 bits by its scales."""
    cache = make_cache(shape, dtype, device)
    if isinstance(cache, QuantisedCache):
        cache.values.view(torch.int8).fill_(7)
        cache.scales.fill_(float("nan"))
    else:
        cache.fill_(float("nan"))
    return cache


class PagedDriver:
    """Owns a KV cache and free blocks for one model; block 0 is never handed out."""

    def __init__(
        self,
        model: PagedModel,
        *,
        num_blocks: int,
        block_size: int,
        num_layers: int,
        seed: int = 0,
        kv_cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.block_size = block_size
        self.free_blocks = list(range(1, num_blocks))
        random.Random(seed).shuffle(self.free_blocks)
        shape = model.kv_cache_shape(num_blocks, block_size)
        dtype = kv_cache_dtype or model.dtype
        self.kv_caches = [
            (_poisoned(shape, dtype, model.device), _poisoned(shape, dtype, model.device))
            for _ in range(num_layers)
        ]

    def add(self, token_ids: Sequence[int], *, prefix_of: DriverSeq | None = None) -> DriverSeq:
        """A new sequence; with `prefix_of` it shares that one's full blocks of equal tokens."""
        seq = DriverSeq(list(token_ids))
        if prefix_of is not None:
            size = self.block_size
            # The last token is always computed: its logits are wanted.
            limit = min(prefix_of.num_computed_tokens, len(seq.token_ids) - 1) // size
            for index in range(limit):
                span = slice(index * size, (index + 1) * size)
                if seq.token_ids[span] != prefix_of.token_ids[span]:
                    break
                seq.block_ids.append(prefix_of.block_ids[index])
                seq.num_computed_tokens += size
        return seq

    def step(
        self, batch: Sequence[tuple[DriverSeq, int | None]], *, num_padding_tokens: int = 0
    ) -> list[torch.Tensor]:
        """One forward over (sequence, tokens to run; None = all that are left).

        Returns:
            Per sequence, in the order given, the logits [tokens run, V] of every token.
        """
        counts = [
            len(seq.token_ids) - seq.num_computed_tokens if count is None else count
            for seq, count in batch
        ]
        order = sorted(range(len(batch)), key=lambda index: counts[index] > 1)
        rows, input_ids = [], []
        for index in order:
            seq, count = batch[index][0], counts[index]
            end = seq.num_computed_tokens + count
            while len(seq.block_ids) * self.block_size < end:
                seq.block_ids.append(self.free_blocks.pop())
            rows.append((seq.num_computed_tokens, count, seq.block_ids))
            input_ids += seq.token_ids[seq.num_computed_tokens : end]
            seq.num_computed_tokens = end
        metadata = build_metadata(
            rows, self.block_size, self.model.device, num_padding_tokens=num_padding_tokens
        )
        input_ids += [0] * num_padding_tokens
        ids = torch.tensor(input_ids, dtype=torch.int64, device=self.model.device)
        logits = self.model.compute_logits(self.model.forward(ids, self.kv_caches, metadata))
        pieces = logits[: len(input_ids) - num_padding_tokens].split([counts[i] for i in order])
        results: list[torch.Tensor] = [torch.empty(0)] * len(batch)
        for index, piece in zip(order, pieces, strict=True):
            results[index] = piece
        return results

    def generate(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Greedy continuation of one prompt: prefill in one step, then one token per step."""
        seq = self.add(prompt)
        for _ in range(num_tokens):
            logits = self.step([(seq, None)])[0]
            seq.token_ids.append(int(logits[-1].argmax()))
        return seq.token_ids[len(prompt) :]
