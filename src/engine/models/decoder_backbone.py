"""`DecoderBackbone`: a decoder that only reads, one whole text a sequence, nothing kept.

The decoder's attention reads keys and values from paged blocks. A layer's are needed until the
next layer begins, so all layers share one cache that is as long as the step, not as the context.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.kernels.kv_cache import KVCache
from engine.kernels.metadata import AttentionMetadata
from engine.kernels.packed_texts import PackedTexts
from engine.models.decoder import Decoder

_BLOCK_SIZE = 64


class DecoderBackbone:
    """Hidden states of whole texts; see `models.pooled_model.Backbone`.

    Args:
        decoder: With its weights loaded.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._cache: KVCache | None = None

    def forward(
        self, input_ids: torch.Tensor, token_types: torch.Tensor, texts: PackedTexts
    ) -> torch.Tensor:
        """Hidden states after the final norm, new [T, H]; decoders know no token types."""
        metadata = _metadata(texts)
        num_blocks = 1 + sum(-(-length // _BLOCK_SIZE) for length in texts.lens_host)
        cache = self._cache_of(num_blocks)
        return self._decoder.forward(input_ids, [cache] * len(self._decoder.layers), metadata)

    def _cache_of(self, num_blocks: int) -> KVCache:
        """Room for one layer's keys and values; kept for the next step, grown when it must."""
        if self._cache is None or self._cache[0].shape[0] < num_blocks:
            self._cache = None
            shape = self._decoder.kv_cache_shape(num_blocks, _BLOCK_SIZE)
            device, dtype = self._decoder.device, self._decoder.dtype
            k_cache, v_cache = (torch.zeros(shape, device=device, dtype=dtype) for _ in "kv")
            self._cache = (k_cache, v_cache)
        return self._cache


def _metadata(texts: PackedTexts) -> AttentionMetadata:
    """Every text a new sequence with consecutive blocks; block 0 stays padding's."""
    lens = np.array(texts.lens_host, dtype=np.int32)
    num_blocks = -(-lens // _BLOCK_SIZE)
    first_blocks = 1 + np.cumsum(num_blocks) - num_blocks
    table = first_blocks[:, None] + np.arange(num_blocks.max())
    table = np.where(np.arange(num_blocks.max()) < num_blocks[:, None], table, 0)
    starts = np.cumsum(lens) - lens
    slots = np.arange(int(lens.sum())) + np.repeat(first_blocks * _BLOCK_SIZE - starts, lens)

    def device(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(array).to(texts.device, dtype, non_blocking=True)

    lens_on_device = device(lens, torch.int32)
    return AttentionMetadata(
        positions=texts.positions,
        slot_mapping=device(slots, torch.int64),
        block_table=device(table, torch.int32),
        seq_lens=lens_on_device,
        query_lens=lens_on_device,
        query_start_loc=texts.starts,
        num_decodes=int(np.count_nonzero(lens == 1)),
        max_query_len=texts.max_len,
        max_seq_len=texts.max_len,
        seq_lens_host=texts.lens_host,
        query_lens_host=texts.lens_host,
        block_table_host=[
            row[:count].tolist() for row, count in zip(table, num_blocks, strict=True)
        ],
    )
