"""What the layers of one step share on the CPU: which keys to gather, in which groups and tiles.

Group lengths and tile borders depend on a sequence's own length and positions alone, which is what
makes `cpu_attention` blind to batch neighbours and chunk borders.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engine.kernels.metadata import AttentionMetadata

TILE = 64
# Gathered keys of one group of sequences. Of 0.5 to 4 MiB, 4 was the fastest for 64 sequences of
# 256 tokens (fewer calls); far more would fall out of the L3 cache between gather and product.
MAX_GROUP_BYTES = 4 * 2**20

# Scores of one product of a tile: beyond it the heads are taken in parts. Bounds the memory of long
# prompts (a part has one head at least) and is as fast as all heads at once.
MAX_SCORE_BYTES = 4 * 2**20

# Up to so many keys a group's heads are gathered one by one, straight to their place. Beyond it
# (from cold memory, and with more calls) whole tokens and a transposition are a quarter faster.
MAX_KEYS_BY_HEAD = 512

Int64Array = npt.NDArray[np.int64]


@dataclass(slots=True)
class DecodeGroup:
    """Decoding sequences whose padded lengths are equal. S sequences, P keys each.

    Attributes:
        rows: [S] int64, their rows in the batch.
        index: Where the keys lie: [S * P] int64, slots of whole tokens, or without `staged`
            [S * Hkv * P], rows of a cache seen as [slots * Hkv, D].
        staged: [S, Hkv, P, D] strided: room for whole tokens; None where heads come one by one.
        k: [S * Hkv, P, D], room for the keys.
        v: Likewise for the values.
        mask: [S, 1, 1, P], 0 or -inf.
        scale_index: [S * Hkv * P] int64, where the scales of 8-bit heads lie; None for plain ones.
    """

    rows: torch.Tensor
    index: torch.Tensor
    staged: torch.Tensor | None
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor
    scale_index: torch.Tensor | None


@dataclass(slots=True)
class Tile:
    """Queries of one sequence within one aligned tile of positions.

    Attributes:
        first_row: Row of q of the first query.
        num_rows: Queries of this step in the tile.
        offset: Place of the first one in the tile.
        keys: Keys of the tile, as a slice of those gathered for the sequence.
        mask: [TILE, number of keys], 0 or -inf.
    """

    first_row: int
    num_rows: int
    offset: int
    keys: slice
    mask: torch.Tensor

    @property
    def num_keys(self) -> int:
        """Keys of the tile."""
        return len(range(self.keys.start, self.keys.stop))


@dataclass(slots=True)
class PrefillSequence:
    """One prefilling sequence: `slots` [P] int64 of the keys it needs, and its tiles."""

    slots: torch.Tensor
    tiles: list[Tile]


@dataclass(slots=True)
class AttentionPlan:
    """What the layers of one step share.

    Attributes:
        decode_groups: Decoding sequences by padded length.
        prefills: Prefilling sequences.
        scores: [2, most scores of one product of a tile], room for scores and probabilities, which
            all tiles and layers share: 1024 keys take half the time that fresh memory makes them.
        is_uniform: One group holds all rows of q in order: no shuffling of q and out.
        has_padding: Some rows of q belong to no sequence, or to one of length 0.
    """

    decode_groups: list[DecodeGroup]
    prefills: list[PrefillSequence]
    scores: torch.Tensor
    is_uniform: bool
    has_padding: bool


def plan_attention(
    metadata: AttentionMetadata,
    q: torch.Tensor,
    num_kv_heads: int,
    block_size: int,
    sliding_window: int | None,
    chunk_size: int | None = None,
    has_scales: bool = False,
) -> AttentionPlan:
    """Group the step's sequences and look up where their keys lie.

    `chunk_size` is a multiple of `TILE`; `has_scales` is for caches of 8 bits.
    """
    table = metadata.block_table.numpy()
    seq_lens = metadata.seq_lens.numpy().astype(np.int64)
    query_lens = metadata.query_lens.numpy().astype(np.int64)
    num_decodes = metadata.num_decodes
    num_tokens, _, head_dim = q.shape
    head_bytes = num_kv_heads * head_dim * q.element_size()

    def slots_of(rows: Int64Array, low: Int64Array, first: Int64Array, num: int) -> torch.Tensor:
        """Slots of keys `first + [0, num)` of sequences `rows`, [S * num].

        Places before `low` or past the end stand for the nearest key that may be read: masked
        scores must be finite.
        """
        tokens = first[:, None] + np.arange(num)
        tokens = np.clip(tokens, low[:, None], seq_lens[rows, None] - 1)
        block_ids = table[rows[:, None], tokens // block_size].astype(np.int64)
        return torch.from_numpy((block_ids * block_size + tokens % block_size).reshape(-1))

    low = np.maximum(seq_lens - sliding_window, 0) if sliding_window else np.zeros_like(seq_lens)
    if chunk_size:
        low = np.maximum(low, (seq_lens - 1) // chunk_size * chunk_size)
    num_keys = (seq_lens - low)[:num_decodes]
    groups = list(_groups_of_equal_padding(num_keys, head_bytes))
    most_keys = max((len(rows) * padded_len for rows, padded_len in groups), default=0)
    # The groups of all layers share this room, one after the other.
    room = q.new_empty(3, most_keys * num_kv_heads * head_dim)
    decode_groups = []
    for rows, padded_len in groups:
        is_visible = np.arange(padded_len) < num_keys[rows, None]
        index = slots_of(rows, low[rows], low[rows], padded_len)
        staged, k, v = room[:, : len(index) * num_kv_heads * head_dim]
        is_by_head = len(index) <= MAX_KEYS_BY_HEAD
        heads = torch.arange(num_kv_heads)[None, :, None]
        scale_index = None
        if has_scales:
            slots = index.view(len(rows), 1, -1)
            scale_index = (slots // block_size * num_kv_heads + heads) * block_size
            scale_index = (scale_index + slots % block_size).flatten()
        if is_by_head:
            index = (index.view(len(rows), 1, -1) * num_kv_heads + heads).flatten()
        decode_groups.append(
            DecodeGroup(
                rows=torch.from_numpy(rows),
                index=index,
                staged=None
                if is_by_head
                else staged.view(len(rows), padded_len, num_kv_heads, head_dim).transpose(1, 2),
                k=k.view(-1, padded_len, head_dim),
                v=v.view(-1, padded_len, head_dim),
                mask=_mask(torch.from_numpy(is_visible), q.dtype)[:, None, None],
                scale_index=scale_index,
            )
        )

    prefills = []
    tile_mask = _tile_mask(int(seq_lens[num_decodes:].max(initial=0)), sliding_window, q.dtype)
    first_row = num_decodes
    for row in range(num_decodes, len(seq_lens)):
        seq_len, query_len = int(seq_lens[row]), int(query_lens[row])
        if seq_len:
            tiles = list(_tiles(first_row, seq_len, query_len, sliding_window, chunk_size))
            first_key = tiles[0][1].start
            lowest = max(0, seq_len - query_len - sliding_window + 1) if sliding_window else 0
            prefills.append(
                PrefillSequence(
                    slots=slots_of(
                        np.array([row]),
                        np.array([lowest]),
                        np.array([first_key]),
                        tiles[-1][1].stop - first_key,
                    ),
                    tiles=[
                        Tile(
                            *place,
                            keys=slice(keys.start - first_key, keys.stop - first_key),
                            mask=tile_mask[:, tile_mask.shape[1] - (keys.stop - keys.start) :],
                        )
                        for place, keys in tiles
                    ],
                )
            )
        first_row += query_len
    rows_per_head = TILE * (q.shape[1] // num_kv_heads)
    most_scores = max(
        (
            rows_per_head * tile.num_keys * heads_per_product(q, num_kv_heads, tile.num_keys)
            for sequence in prefills
            for tile in sequence.tiles
        ),
        default=0,
    )
    return AttentionPlan(
        decode_groups=decode_groups,
        prefills=prefills,
        scores=q.new_empty(2, most_scores),
        is_uniform=len(decode_groups) == 1 and len(decode_groups[0].rows) == num_tokens,
        has_padding=first_row < num_tokens or not bool((seq_lens > 0).all()),
    )


def heads_per_product(q: torch.Tensor, num_kv_heads: int, num_keys: int) -> int:
    """KV heads that one product of a prefill tile takes; the batch has no say in it."""
    bytes_per_head = TILE * (q.shape[1] // num_kv_heads) * num_keys * q.element_size()
    return min(num_kv_heads, max(1, MAX_SCORE_BYTES // bytes_per_head))


def _groups_of_equal_padding(
    num_keys: Int64Array, bytes_per_key: int
) -> Iterator[tuple[Int64Array, int]]:
    """(rows, padded length) of the sequences that share a padded length, in parts of bounded size.

    Sequences without keys (padding) are left out.
    """
    padded_lens = _padded_len(num_keys)
    for padded_len in np.unique(padded_lens[num_keys > 0]).tolist():
        rows = np.flatnonzero((padded_lens == padded_len) & (num_keys > 0))
        most = max(1, MAX_GROUP_BYTES // (padded_len * bytes_per_key))
        for start in range(0, len(rows), most):
            yield rows[start : start + most], padded_len


def _padded_len(num_keys: Int64Array) -> Int64Array:
    """Round up to 64 keys, and to an eighth of the next lower power of two above 512.

    Few different lengths make few groups; at most an eighth of the work is padding beyond 512.
    """
    exponent = np.ceil(np.log2(np.maximum(num_keys, 1))).astype(np.int64)
    step = np.maximum(TILE, 2 ** np.maximum(exponent - 4, 0))
    padded_lens: Int64Array = -(-num_keys // step) * step
    return padded_lens


def _tiles(
    first_row: int,
    seq_len: int,
    query_len: int,
    sliding_window: int | None,
    chunk_size: int | None,
) -> Iterator[tuple[tuple[int, int, int], slice]]:
    """((first row of q, rows, offset in the tile), keys) of each tile of one sequence's queries."""
    position = seq_len - query_len
    while position < seq_len:
        start = position - position % TILE
        end = min(start + TILE, seq_len)
        low = max(0, start - sliding_window + 1) if sliding_window else 0
        if chunk_size:
            low = max(low, start - start % chunk_size)
        yield (
            (first_row, end - position, position - start),
            slice(low - low % TILE, start + TILE),
        )
        first_row += end - position
        position = end


def _tile_mask(max_seq_len: int, sliding_window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """[TILE, longest keys of a tile]: a tile with n keys uses the last n columns.

    Counted from the tile's end, what a row sees is the same in every tile.
    """
    num_keys = -(-max_seq_len // TILE) * TILE
    i = torch.arange(num_keys - TILE, num_keys)[:, None]
    j = torch.arange(num_keys)[None, :]
    visible = j <= i
    if sliding_window:
        visible &= j > i - sliding_window
    return _mask(visible, dtype)


def _mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where visible, -inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
