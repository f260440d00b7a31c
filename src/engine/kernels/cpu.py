"""The CPU path: few torch calls per layer, and results that no batch neighbour can change.

Batch invariance, bit for bit, is by construction and does not depend on the number of threads:

- *Decode.* A sequence's keys are gathered heads-first into a matrix whose length depends on the
  sequence's own length alone (`_padded_len`); sequences of equal padded length share one batched
  matrix product, which computes every matrix alike.
- *Prefill.* Queries are computed in tiles of `TILE` positions aligned to multiples of `TILE`, each
  over the keys up to the tile's end, so that neither neighbours nor chunk boundaries change a
  token. (A chunk of exactly one token is a decode and rounds like one.)
- *Linear, float32.* See `batch_invariant_linear`.

Why this shape: one thread of a Zen 4 core, 3 KV heads, group 3, head_dim 64, bf16, per sequence of
256 tokens in a batch of 32 (torch 2.13): flash SDPA 39 µs; two `bmm` and a softmax 12, and 12 to
24 more to gather the keys heads-first, cold, into buffers that the layers of a step share (fresh
ones would be mapped and cleared by the system every time: up to 100 µs). Flash SDPA packs K and V
for its inner products on every call, which three query rows never pay back; it wins from about 64
query rows on, so prefill uses it. On two threads its float32 result also depends on which thread
took the work (scratch of 3 rows is not 64-byte aligned; a tile's is). Because everything is
gathered, slots past a sequence's end are never read, whatever they hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from engine.kernels.metadata import AttentionMetadata
from engine.kernels.reference import act_mul

__all__ = [
    "act_mul",
    "add_rms_norm",
    "batch_invariant_linear",
    "paged_attention",
    "rms_norm",
    "rope_write_kv",
]

TILE = 64
# Gathered keys of one group of sequences. Of 0.5 to 4 MiB, 4 was the fastest for 64 sequences of
# 256 tokens (fewer calls); far more would fall out of the L3 cache between gather and product.
MAX_GROUP_BYTES = 4 * 2**20

Int64Array = npt.NDArray[np.int64]


@dataclass(slots=True)
class _DecodeGroup:
    """Decoding sequences whose padded lengths are equal. S sequences, P keys each.

    Attributes:
        rows: [S] int64, their rows in the batch.
        slots: [S * P] int64, where the keys lie in the cache.
        mask: [S, 1, 1, P], 0 or -inf.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor


@dataclass(slots=True)
class _Tile:
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


@dataclass(slots=True)
class _PrefillSequence:
    """One prefilling sequence: `slots` [P] int64 of the keys it needs, and its tiles."""

    slots: torch.Tensor
    tiles: list[_Tile]


@dataclass(slots=True)
class _AttentionPlan:
    """What the layers of one step share.

    Attributes:
        decode_groups: Decoding sequences by padded length.
        gathered: [3, Hkv * D * most keys of a group]: room for tokens as they lie in the cache,
            then for keys and for values heads-first.
        prefills: Prefilling sequences.
        is_uniform: One group holds all rows of q in order: no shuffling of q and out.
        has_padding: Some rows of q belong to no sequence, or to one of length 0.
    """

    decode_groups: list[_DecodeGroup]
    gathered: torch.Tensor
    prefills: list[_PrefillSequence]
    is_uniform: bool
    has_padding: bool


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0
) -> torch.Tensor:
    """See `reference.rms_norm`; the same rounding with half the calls."""
    if weight_offset:
        normed = torch.rms_norm(x.float(), x.shape[-1:], None, eps)
        return normed.mul_(weight.float() + weight_offset).to(x.dtype)
    normed = torch.rms_norm(x, x.shape[-1:], None, eps)
    return normed.mul_(weight) if weight.dtype == x.dtype else (normed * weight).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.add_rms_norm`."""
    residual.add_(x)
    return rms_norm(residual, weight, eps, weight_offset), residual


def batch_invariant_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """See `reference.batch_invariant_linear`; a row's bits do not depend on the other rows.

    oneDNN's bf16 and fp16 products hold this as they are. MKL's float32 product computes the last
    `M mod 4` rows of a thread's share by another kernel (seen with 1 to 16 threads), so M is
    padded to a multiple of 4.
    """
    missing = -(x.numel() // x.shape[-1]) % 4
    if x.dtype != torch.float32 or not missing:
        plain: torch.Tensor = F.linear(x, weight, bias)
        return plain
    rows = x.reshape(-1, x.shape[-1])
    padded: torch.Tensor = F.linear(F.pad(rows, (0, 0, 0, missing)), weight, bias)
    return padded[: rows.shape[0]].view(*x.shape[:-1], -1)


def rope_write_kv(
    qkv: torch.Tensor,
    metadata: AttentionMetadata,
    cos_sin: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_weight_offset: float = 0.0,
) -> torch.Tensor:
    """See `reference.rope_write_kv`. The caches must be contiguous."""
    heads: torch.Tensor = qkv.unflatten(-1, (num_q_heads + 2 * num_kv_heads, head_dim))
    q_and_k = heads[:, : num_q_heads + num_kv_heads]
    v = heads[:, num_q_heads + num_kv_heads :]
    if q_norm_weight is not None or k_norm_weight is not None:
        q, k = q_and_k[:, :num_q_heads], q_and_k[:, num_q_heads:]
        if q_norm_weight is not None:
            q = rms_norm(q, q_norm_weight, norm_eps, norm_weight_offset)
        if k_norm_weight is not None:
            k = rms_norm(k, k_norm_weight, norm_eps, norm_weight_offset)
        q_and_k = torch.cat((q, k), dim=1)
    if cos_sin is not None:
        q_and_k = _rotate(q_and_k, metadata, cos_sin)
    q, k = q_and_k[:, :num_q_heads], q_and_k[:, num_q_heads:]

    slots, is_real = metadata.once_per_step("slots", lambda: _real_slots(metadata.slot_mapping))
    if is_real is not None:
        k, v = k[is_real], v[is_real]
    k_cache.view(-1, num_kv_heads, head_dim).index_copy_(0, slots, k.to(k_cache.dtype))
    v_cache.view(-1, num_kv_heads, head_dim).index_copy_(0, slots, v.to(v_cache.dtype))
    return q.contiguous()


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    metadata: AttentionMetadata,
    *,
    softmax_scale: float,
    sliding_window: int | None = None,
    logit_softcap: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `reference.paged_attention`. The caches must be contiguous.

    Decode rounds scores and probabilities to q's dtype (as Hugging Face's eager attention does
    with scores), prefill probabilities only.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    block_size = k_cache.shape[1]
    plan = metadata.once_per_step(
        ("attention", sliding_window, num_kv_heads, head_dim, block_size, q.dtype, num_tokens),
        lambda: _plan_attention(metadata, q, num_kv_heads, block_size, sliding_window),
    )
    if out is None and plan.is_uniform:
        mixed = _decode(
            q, k_cache, v_cache, plan.decode_groups[0], plan.gathered, softmax_scale, logit_softcap
        )
        return mixed.view(num_tokens, num_q_heads * head_dim)
    if out is None:
        out = q.new_empty(num_tokens, num_q_heads * head_dim)
    if plan.has_padding:
        out.zero_()
    for group in plan.decode_groups:
        mixed = _decode(
            q.index_select(0, group.rows),
            k_cache,
            v_cache,
            group,
            plan.gathered,
            softmax_scale,
            logit_softcap,
        )
        out.index_copy_(0, group.rows, mixed.view(-1, num_q_heads * head_dim))
    for sequence in plan.prefills:
        k, v = (
            cache.flatten(0, 1).index_select(0, sequence.slots).transpose(0, 1).contiguous()
            for cache in (k_cache, v_cache)
        )
        for tile in sequence.tiles:
            rows = slice(tile.first_row, tile.first_row + tile.num_rows)
            mixed = _prefill_tile(
                q[rows], k[:, tile.keys], v[:, tile.keys], tile, softmax_scale, logit_softcap
            )
            out[rows].view(tile.num_rows, num_q_heads, head_dim).copy_(mixed)
    return out


def _decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    group: _DecodeGroup,
    gathered: torch.Tensor,
    softmax_scale: float,
    logit_softcap: float,
) -> torch.Tensor:
    """Attention of one group: q [S, Hq, D] -> [S * Hkv, Hq / Hkv, D]."""
    num_seqs, num_q_heads, head_dim = q.shape
    num_kv_heads, num_keys = k_cache.shape[2], group.mask.shape[-1]
    heads_per_kv = num_q_heads // num_kv_heads
    width = num_kv_heads * head_dim
    tokens, *heads_first = gathered[:, : num_seqs * num_keys * width]
    for cache, matrices in zip((k_cache, v_cache), heads_first, strict=True):
        # Whole tokens first, heads apart second: from cold memory a third faster than head by head.
        torch.index_select(cache.view(-1, width), 0, group.slots, out=tokens.view(-1, width))
        shape = (num_seqs, num_keys, num_kv_heads, head_dim)
        transposed = tokens.view(shape).transpose(1, 2)
        matrices.view(transposed.shape).copy_(transposed)
    k, v = (matrices.view(-1, num_keys, head_dim) for matrices in heads_first)
    return _masked_attention(
        q.reshape(-1, heads_per_kv, head_dim),
        k,
        v,
        group.mask,
        (num_seqs, num_kv_heads, heads_per_kv, num_keys),
        softmax_scale,
        logit_softcap,
    )


def _prefill_tile(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tile: _Tile,
    softmax_scale: float,
    logit_softcap: float,
) -> torch.Tensor:
    """Attention of one tile: q [rows, Hq, D], k and v [Hkv, keys, D] -> [rows, Hq, D]."""
    if tile.num_rows < TILE:
        # Always a full tile: the shape of the product decides its rounding.
        full = q.new_zeros(TILE, *q.shape[1:])
        full[tile.offset : tile.offset + tile.num_rows] = q
        q = full
    heads_first = q.transpose(0, 1)
    if logit_softcap:
        num_kv_heads, num_keys, head_dim = k.shape
        mixed = _masked_attention(
            heads_first.reshape(num_kv_heads, -1, head_dim),
            k,
            v,
            tile.mask,
            (num_kv_heads, -1, TILE, num_keys),
            softmax_scale,
            logit_softcap,
        ).view(-1, TILE, head_dim)
    else:
        mixed = F.scaled_dot_product_attention(
            heads_first[None],
            k[None],
            v[None],
            attn_mask=tile.mask,
            scale=softmax_scale,
            enable_gqa=True,
        )[0]
    return mixed[:, tile.offset : tile.offset + tile.num_rows].transpose(0, 1)


def _masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    score_shape: tuple[int, ...],
    softmax_scale: float,
    logit_softcap: float,
) -> torch.Tensor:
    """Softmax attention of X matrices: q [X, M, D], k and v [X, P, D] -> [X, M, D].

    `score_shape` is a view of [X, M, P] that `mask` broadcasts to.
    """
    scores = torch.bmm(q, k.transpose(1, 2))
    if logit_softcap:
        scores = scores.float().mul_(softmax_scale / logit_softcap).tanh_()
        softmax_scale = logit_softcap
    scores = torch.add(mask, scores.view(score_shape), alpha=softmax_scale)
    probs = scores.softmax(-1).to(v.dtype)
    return torch.bmm(probs.view(q.shape[0], q.shape[1], -1), v)


def _rotate(x: torch.Tensor, metadata: AttentionMetadata, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotate [T, heads, D]: `x cos + swap_halves(x) (-sin, sin)`, float32 inside."""
    cos, sin = metadata.once_per_step(
        ("rope", cos_sin.data_ptr(), cos_sin.shape),
        lambda: _cos_sin_of_step(metadata.positions, cos_sin),
    )
    rot_dim = cos.shape[-1]
    part = x if rot_dim == x.shape[-1] else x[..., :rot_dim]
    rotated = (part * cos).addcmul_(torch.roll(part, rot_dim // 2, -1), sin).to(x.dtype)
    return rotated if part is x else torch.cat((rotated, x[..., rot_dim:]), dim=-1)


def _cos_sin_of_step(
    positions: torch.Tensor, cos_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, cos) and (-sin, sin) of each token, [T, 1, rot_dim] float32."""
    cos, sin = cos_sin.index_select(0, positions)[:, :, None].unbind(1)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _real_slots(slot_mapping: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Slots that are written, and which tokens those are (None: all of them)."""
    is_real = slot_mapping >= 0
    if bool(is_real.all()):
        return slot_mapping, None
    return slot_mapping[is_real], is_real


def _plan_attention(
    metadata: AttentionMetadata,
    q: torch.Tensor,
    num_kv_heads: int,
    block_size: int,
    sliding_window: int | None,
) -> _AttentionPlan:
    """Group the step's sequences and look up where their keys lie."""
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

    decode_groups = []
    low = np.maximum(seq_lens - sliding_window, 0) if sliding_window else np.zeros_like(seq_lens)
    for rows, padded_len in _groups_of_equal_padding((seq_lens - low)[:num_decodes], head_bytes):
        num_keys = (seq_lens - low)[rows]
        is_visible = np.arange(padded_len) < num_keys[:, None]
        decode_groups.append(
            _DecodeGroup(
                rows=torch.from_numpy(rows),
                slots=slots_of(rows, low[rows], low[rows], padded_len),
                mask=_mask(torch.from_numpy(is_visible), q.dtype)[:, None, None],
            )
        )

    prefills = []
    tile_mask = _tile_mask(int(seq_lens[num_decodes:].max(initial=0)), sliding_window, q.dtype)
    first_row = num_decodes
    for row in range(num_decodes, len(seq_lens)):
        seq_len, query_len = int(seq_lens[row]), int(query_lens[row])
        if seq_len:
            tiles = list(_tiles(first_row, seq_len, query_len, sliding_window))
            first_key = tiles[0][1].start
            lowest = max(0, seq_len - query_len - sliding_window + 1) if sliding_window else 0
            prefills.append(
                _PrefillSequence(
                    slots=slots_of(
                        np.array([row]),
                        np.array([lowest]),
                        np.array([first_key]),
                        tiles[-1][1].stop - first_key,
                    ),
                    tiles=[
                        _Tile(
                            *place,
                            keys=slice(keys.start - first_key, keys.stop - first_key),
                            mask=tile_mask[:, tile_mask.shape[1] - (keys.stop - keys.start) :],
                        )
                        for place, keys in tiles
                    ],
                )
            )
        first_row += query_len
    most_keys = max((len(group.slots) for group in decode_groups), default=0)
    return _AttentionPlan(
        decode_groups=decode_groups,
        gathered=q.new_empty(3, most_keys * num_kv_heads * head_dim),
        prefills=prefills,
        is_uniform=len(decode_groups) == 1 and len(decode_groups[0].rows) == num_tokens,
        has_padding=first_row < num_tokens or not bool((seq_lens > 0).all()),
    )


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
    first_row: int, seq_len: int, query_len: int, sliding_window: int | None
) -> Iterator[tuple[tuple[int, int, int], slice]]:
    """((first row of q, rows, offset in the tile), keys) of each tile of one sequence's queries."""
    position = seq_len - query_len
    while position < seq_len:
        start = position - position % TILE
        end = min(start + TILE, seq_len)
        low = max(0, start - sliding_window + 1) if sliding_window else 0
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
