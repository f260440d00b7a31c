"""Ragged batches over a paged cache, with everything that must not be read poisoned with NaN."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import torch

from engine.kernels.kv_cache import KVTensor, QuantisedCache, expand, quantise
from engine.kernels.metadata import AttentionMetadata, SharedPrefixes

# |got - want| <= atol + rtol |want|, `want` computed in float64 from the same rounded inputs whose
# values are of order 1.
#
# float32: sums of up to a few thousand products, each rounded to 2^-24 = 6e-8: 1e-5.
# bfloat16: three roundings of 2^-9 = 2e-3 (relative, half an ulp): the probabilities, the output,
#   and on the CPU's decode path the scores, of which |score| <= 4 gives 4 * 2^-9 in a probability;
#   these average out over the keys: 4 * 2^-9 + 2 * 2^-9 = 1.2e-2, relative to values of order 1.
# float16: the same three with 2^-12 = 2.4e-4: 1.5e-3.
TOLERANCE = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.bfloat16: {"atol": 1.2e-2, "rtol": 1.2e-2},
    torch.float16: {"atol": 1.5e-3, "rtol": 1.5e-3},
}

PADDING = (-1, 1)


@dataclass
class AttentionCase:
    """One step's inputs. `seqs` are (computed tokens, new tokens), decodes (n, 1) first."""

    q: torch.Tensor
    k_cache: KVTensor
    v_cache: KVTensor
    metadata: AttentionMetadata
    softmax_scale: float

    def arguments(self) -> tuple[torch.Tensor, KVTensor, KVTensor, AttentionMetadata]:
        return self.q, self.k_cache, self.v_cache, self.metadata

    def on(self, device: torch.device) -> AttentionCase:
        """The same case on another device."""
        return AttentionCase(
            self.q.to(device),
            cache_on(self.k_cache, device),
            cache_on(self.v_cache, device),
            metadata_on(self.metadata, device),
            self.softmax_scale,
        )

    def widened(self) -> AttentionCase:
        """The same case in float64, 8-bit caches as the numbers they stand for."""
        return dataclasses.replace(
            self,
            q=self.q.double(),
            k_cache=expand(self.k_cache, torch.float64),
            v_cache=expand(self.v_cache, torch.float64),
        )

    def quantised(self, dtype: torch.dtype) -> AttentionCase:
        """The same case over caches of 8 bits; where nothing may be read, scales are NaN."""
        return dataclasses.replace(
            self,
            k_cache=_quantised(self.k_cache, dtype),
            v_cache=_quantised(self.v_cache, dtype),
        )


def cache_on(cache: KVTensor, device: torch.device) -> KVTensor:
    """A copy on `device`."""
    if isinstance(cache, QuantisedCache):
        return QuantisedCache(cache.values.to(device), cache.scales.to(device))
    return cache.to(device)


def heads_first(cache: torch.Tensor) -> torch.Tensor:
    """The same numbers, the tokens that a head has in a block behind one another in memory."""
    return cache.transpose(1, 2).contiguous().transpose(1, 2)


def _quantised(cache: KVTensor, dtype: torch.dtype) -> QuantisedCache:
    assert isinstance(cache, torch.Tensor)
    is_poison = cache.isnan().any(-1)
    values, scales = quantise(cache.nan_to_num(), dtype)
    scales = scales.masked_fill(is_poison, float("nan"))
    return QuantisedCache(values, scales.transpose(1, 2).contiguous())


def make_metadata(
    seqs: list[tuple[int, int]], block_size: int, block_table: list[list[int]]
) -> AttentionMetadata:
    """Metadata on the CPU; `PADDING` stands for a padding row of a decode batch."""
    positions, slots = [], []
    for (computed, new), blocks in zip(seqs, block_table, strict=True):
        for position in range(computed, computed + new):
            positions.append(max(position, 0))
            slots.append(
                blocks[position // block_size] * block_size + position % block_size
                if blocks
                else -1
            )
    query_lens = [new for _, new in seqs]
    seq_lens = [computed + new for computed, new in seqs]
    width = max(1, *(len(blocks) for blocks in block_table))
    num_decodes = sum(1 for _ in itertools.takewhile(lambda seq: seq[1] == 1, seqs))
    return AttentionMetadata(
        positions=torch.tensor(positions),
        slot_mapping=torch.tensor(slots),
        block_table=torch.tensor(
            [blocks + [0] * (width - len(blocks)) for blocks in block_table], dtype=torch.int32
        ),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        query_lens=torch.tensor(query_lens, dtype=torch.int32),
        query_start_loc=torch.tensor([0, *itertools.accumulate(query_lens)], dtype=torch.int32),
        num_decodes=num_decodes,
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        seq_lens_host=seq_lens,
        query_lens_host=query_lens,
        block_table_host=[list(blocks) for blocks in block_table],
    )


def metadata_on(metadata: AttentionMetadata, device: torch.device) -> AttentionMetadata:
    """A copy with its tensors on `device`."""

    def moved(record: AttentionMetadata | SharedPrefixes) -> dict[str, torch.Tensor]:
        return {
            field.name: value.to(device)
            for field in dataclasses.fields(record)
            if isinstance(value := getattr(record, field.name), torch.Tensor)
        }

    shared = metadata.shared_prefixes
    if shared is not None:
        shared = dataclasses.replace(shared, **moved(shared))
    return dataclasses.replace(metadata, **moved(metadata), shared_prefixes=shared, step_cache=None)


def make_case(
    seqs: list[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.float32,
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    seed: int = 0,
    is_strided: bool = False,
) -> AttentionCase:
    """Random q, k, v in shuffled blocks; unused blocks and the tails of used ones hold NaN.

    Args:
        seqs: (computed tokens, new tokens) of each sequence, decodes first.
        dtype: Of q and the caches.
        num_q_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Entries per head.
        block_size: Tokens per block.
        seed: Of values and block order.
        is_strided: q is a slice of a wider tensor, as when it is part of a qkv projection.
    """
    random = torch.Generator().manual_seed(seed)
    counts = [-(-(computed + new) // block_size) for computed, new in seqs]
    num_blocks = sum(counts) + 3
    order = iter(torch.randperm(num_blocks, generator=random).tolist())
    block_table = [[next(order) for _ in range(count)] for count in counts]
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    k_cache, v_cache = (torch.full(shape, float("nan"), dtype=dtype) for _ in "kv")
    for (computed, new), blocks in zip(seqs, block_table, strict=True):
        for cache in (k_cache, v_cache):
            tokens = torch.randn(
                len(blocks) * block_size, num_kv_heads, head_dim, generator=random
            ).to(dtype)
            tokens[computed + new :] = float("nan")
            cache[blocks] = tokens.view(len(blocks), *shape[1:])
    num_tokens = sum(new for _, new in seqs)
    q = torch.randn(num_tokens, num_q_heads + 3, head_dim, generator=random).to(dtype)
    q = q[:, :num_q_heads] if is_strided else q[:, :num_q_heads].contiguous()
    return AttentionCase(
        q, k_cache, v_cache, make_metadata(seqs, block_size, block_table), head_dim**-0.5
    )


def only_sequence(case: AttentionCase, row: int) -> AttentionCase:
    """The same sequence with the same cache, alone in its batch."""
    full = case.metadata
    start, end = full.query_start_loc[row : row + 2].tolist()
    is_decode = row < full.num_decodes
    return AttentionCase(
        q=case.q[start:end].contiguous(),
        k_cache=case.k_cache,
        v_cache=case.v_cache,
        metadata=AttentionMetadata(
            positions=full.positions[start:end],
            slot_mapping=full.slot_mapping[start:end],
            block_table=full.block_table[row : row + 1],
            seq_lens=full.seq_lens[row : row + 1],
            query_lens=full.query_lens[row : row + 1],
            query_start_loc=torch.tensor(
                [0, end - start], dtype=torch.int32, device=full.seq_lens.device
            ),
            num_decodes=int(is_decode),
            max_query_len=end - start,
            max_seq_len=int(full.seq_lens[row]),
        ),
        softmax_scale=case.softmax_scale,
    )
