"""Attention on the CPU, the same bits for a sequence whatever its batch.

By construction, and seen with 1 to 8 threads:

- *Decode.* A sequence's keys are gathered heads-first into a matrix whose length depends on the
  sequence's own length alone (`cpu_plan`); sequences of equal padded length share one batched
  matrix product, which computes every matrix alike.
- *Prefill.* Queries are computed in tiles of `TILE` positions aligned to multiples of `TILE`, each
  over the keys up to the tile's end, so that neither neighbours nor chunk boundaries change a
  token. (A chunk of exactly one token is a decode and rounds like one.)

Why this shape: one thread of a Zen 4 core, 3 KV heads, group 3, head_dim 64, bf16, per sequence of
256 tokens in a batch of 32 (torch 2.13): flash SDPA 39 µs; two `bmm` and a softmax 12, and 12 to
24 more to gather the keys heads-first, cold, into buffers that the layers of a step share (fresh
ones would be mapped and cleared by the system every time: up to 100 µs). A tile of 64 queries takes
585 µs over 256 keys and 2.3 ms over 1024 in flash SDPA, 359 µs and 1.3 ms in two `bmm` whose scores
lie in shared memory. (In fresh memory: 2.6 ms.) The query heads of a KV head are rows of one
matrix, so that its keys are brought into the product's order once. Because everything is gathered,
slots past a sequence's end are never read, whatever they hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.kernels.cpu_plan import TILE, DecodeGroup, Tile, heads_per_product, plan_attention
from engine.kernels.kv_cache import KVTensor, QuantisedCache
from engine.kernels.metadata import AttentionMetadata


@dataclass(frozen=True, slots=True)
class Scoring:
    """How scores are made: `softcap * tanh(q k * scale / softcap)`, and `sinks` [Hkv, G, 1]."""

    scale: float
    softcap: float
    sinks: torch.Tensor | None


def paged_attention(
    q: torch.Tensor,
    k_cache: KVTensor,
    v_cache: KVTensor,
    metadata: AttentionMetadata,
    *,
    softmax_scale: float,
    sliding_window: int | None = None,
    logit_softcap: float = 0.0,
    batch_invariant: bool = False,
    sinks: torch.Tensor | None = None,
    chunk_size: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `reference.paged_attention`. The caches must be contiguous.

    Scores and probabilities are rounded to q's dtype (as Hugging Face's eager attention does), and
    so are keys and values of 8-bit caches as they are gathered.
    """
    assert metadata.block_rows is None, "the CPU path reads row b of the table for sequence b"
    assert metadata.device_counts is None, "the CPU path needs exact counts on the host"
    assert not (chunk_size or 0) % TILE, "a tile of queries lies within one chunk"
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    block_size = k_cache.shape[1]
    has_scales = isinstance(k_cache, QuantisedCache)
    plan = metadata.once_per_step(
        (
            "attention",
            sliding_window,
            chunk_size,
            num_kv_heads,
            head_dim,
            block_size,
            q.dtype,
            num_tokens,
            has_scales,
        ),
        lambda: plan_attention(
            metadata,
            q,
            num_kv_heads,
            block_size,
            sliding_window,
            chunk_size,
            has_scales,
        ),
    )
    by_kv_head = None if sinks is None else sinks.float().view(num_kv_heads, -1, 1)
    scoring = Scoring(softmax_scale, logit_softcap, by_kv_head)
    if out is None and plan.is_uniform:
        mixed = _decode(q, k_cache, v_cache, plan.decode_groups[0], scoring)
        return mixed.view(num_tokens, num_q_heads * head_dim)
    if out is None:
        out = q.new_empty(num_tokens, num_q_heads * head_dim)
    if plan.has_padding:
        out.zero_()
    for group in plan.decode_groups:
        queries = q.index_select(0, group.rows)
        mixed = _decode(queries, k_cache, v_cache, group, scoring)
        out.index_copy_(0, group.rows, mixed.view(-1, num_q_heads * head_dim))
    for sequence in plan.prefills:
        k, v = (_gather_tokens(cache, sequence.slots, q.dtype) for cache in (k_cache, v_cache))
        for tile in sequence.tiles:
            rows = slice(tile.first_row, tile.first_row + tile.num_rows)
            mixed = _prefill_tile(
                q[rows],
                k[:, tile.keys],
                v[:, tile.keys],
                tile,
                plan.scores,
                scoring,
            )
            out[rows].view(tile.num_rows, num_q_heads, head_dim).copy_(mixed)
    return out


def _decode(
    q: torch.Tensor,
    k_cache: KVTensor,
    v_cache: KVTensor,
    group: DecodeGroup,
    scoring: Scoring,
) -> torch.Tensor:
    """Attention of one group: q [S, Hq, D] -> [S * Hkv, Hq / Hkv, D]."""
    num_seqs, num_q_heads, head_dim = q.shape
    num_kv_heads, num_keys = k_cache.shape[2], group.mask.shape[-1]
    for cache, gathered in ((k_cache, group.k), (v_cache, group.v)):
        _gather_heads_first(cache, group, gathered)
    heads_per_kv = num_q_heads // num_kv_heads
    sinks = None if scoring.sinks is None else scoring.sinks.repeat(num_seqs, 1, 1)
    return _masked_attention(
        q.reshape(-1, heads_per_kv, head_dim),
        group.k,
        group.v,
        group.mask,
        (num_seqs, num_kv_heads, heads_per_kv, num_keys),
        scoring,
        sinks,
    )


def _gather_tokens(cache: KVTensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tokens in slots [P] of a cache, new [Hkv, P, D] of `dtype`."""
    if not isinstance(cache, QuantisedCache):
        return cache.flatten(0, 1).index_select(0, slots).transpose(0, 1).contiguous()
    # torch moves the bytes of float8 numbers, but does not index them.
    stored = cache.values.view(torch.int8).flatten(0, 1).index_select(0, slots)
    block_size = cache.shape[1]
    scales = cache.scales[slots // block_size, :, slots % block_size]
    wide = stored.view(cache.values.dtype).float() * scales[..., None]
    return wide.transpose(0, 1).to(dtype).contiguous()


def _gather_heads_first(cache: KVTensor, group: DecodeGroup, out: torch.Tensor) -> None:
    """Copy a group's part of a cache to `out` [S * Hkv, P, D]."""
    num_kv_heads, head_dim = cache.shape[2:]
    if isinstance(cache, QuantisedCache):
        assert group.scale_index is not None, "planned for a plain cache"
        stored = cache.values.view(torch.int8)
        if group.staged is None:
            rows = stored.view(-1, head_dim).index_select(0, group.index)
        else:
            tokens = stored.view(-1, num_kv_heads * head_dim).index_select(0, group.index)
            num_keys = out.shape[1]
            rows = tokens.view(-1, num_keys, num_kv_heads, head_dim).transpose(1, 2)
        scales = cache.scales.view(-1).index_select(0, group.scale_index)
        wide = rows.reshape(out.shape).view(cache.values.dtype).float()
        torch.mul(wide, scales.view(*out.shape[:2], 1), out=out)
        return
    if group.staged is None:
        rows = cache.view(-1, head_dim)
        torch.index_select(rows, 0, group.index, out=out.view(-1, head_dim))
        return
    width = num_kv_heads * head_dim
    tokens = group.staged.transpose(1, 2).view(-1, width)
    torch.index_select(cache.view(-1, width), 0, group.index, out=tokens)
    out.view(group.staged.shape).copy_(group.staged)


def _prefill_tile(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tile: Tile,
    room: torch.Tensor,
    scoring: Scoring,
) -> torch.Tensor:
    """Attention of one tile: q [rows, Hq, D], k and v [Hkv, keys, D] -> [rows, Hq, D]."""
    if tile.num_rows < TILE:
        # Always a full tile: the shape of the product decides its rounding.
        full = q.new_zeros(TILE, *q.shape[1:])
        full[tile.offset : tile.offset + tile.num_rows] = q
        q = full
    num_kv_heads, num_keys, head_dim = k.shape
    heads_first = q.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)
    step = heads_per_product(q, num_kv_heads, num_keys)
    sinks = None if scoring.sinks is None else scoring.sinks.repeat_interleave(TILE, dim=1)
    parts = [
        _masked_attention(
            heads_first[start : start + step],
            k[start : start + step],
            v[start : start + step],
            tile.mask,
            (min(step, num_kv_heads - start), -1, TILE, num_keys),
            scoring,
            None if sinks is None else sinks[start : start + step],
            room,
        )
        for start in range(0, num_kv_heads, step)
    ]
    mixed = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(-1, TILE, head_dim)
    return mixed[:, tile.offset : tile.offset + tile.num_rows].transpose(0, 1)


def _masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    score_shape: tuple[int, ...],
    scoring: Scoring,
    sinks: torch.Tensor | None,
    room: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of X matrices: q [X, M, D], k and v [X, P, D] -> [X, M, D].

    `score_shape` is a view of [X, M, P] that `mask` broadcasts to. `room` [2, X * M * P or more]
    takes scores and probabilities. `sinks` [X, M, 1] are the sinks' scores.
    """
    softmax_scale, logit_softcap = scoring.scale, scoring.softcap
    shape = (q.shape[0], q.shape[1], k.shape[1])
    scores_room, probs_room = None, None
    if room is not None:
        scores_room, probs_room = room[:, : shape[0] * shape[1] * shape[2]].view(2, *shape)
    scores = torch.bmm(q, k.transpose(1, 2), out=scores_room)
    if logit_softcap:
        # In float32, as the bound flattens large scores.
        scores = scores.float().mul_(softmax_scale / logit_softcap).tanh_()
        softmax_scale, scores_room, probs_room = logit_softcap, None, None
    if scores_room is not None:
        scores_room = scores_room.view(score_shape)
    scores = torch.add(mask, scores.view(score_shape), alpha=softmax_scale, out=scores_room)
    if sinks is not None:
        with_sinks = torch.cat((scores.view(shape), sinks.to(scores.dtype)), -1)
        return torch.bmm(torch.softmax(with_sinks, -1)[..., :-1].to(v.dtype), v)
    probs = torch.softmax(scores.view(shape), -1, out=probs_room).to(v.dtype)
    return torch.bmm(probs, v)
