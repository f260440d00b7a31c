"""Attention of a mixed batch on a GPU: decodes to one kernel, prefills to the other, at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from engine.kernels.decode_attention import decode_attention
from engine.kernels.kv_cache import KVTensor
from engine.kernels.metadata import AttentionMetadata
from engine.kernels.prefill_attention import prefill_attention


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
    """See `reference.paged_attention`. Both caches have equal strides, 1 along head_dim.

    Rows of q past the last sequence are untouched in a given `out`. In a new one they are zero, or
    with `device_counts` (captured steps, which nobody reads there) whatever the memory held.
    """
    if q.stride(2) != 1:
        q = q.contiguous()
    num_tokens, num_q_heads, head_dim = q.shape
    num_decodes = metadata.num_decodes
    is_captured = metadata.device_counts is not None
    if out is None:
        # With the lists on the host every row belongs to a sequence and is written.
        may_have_spare_rows = (
            num_tokens > num_decodes and metadata.query_lens_host is None and not is_captured
        )
        make = torch.zeros if may_have_spare_rows else torch.empty
        out = make((num_tokens, num_q_heads * head_dim), dtype=q.dtype, device=q.device)
    options: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "sliding_window": sliding_window,
        "logit_softcap": logit_softcap,
        "sinks": sinks,
        "chunk_size": chunk_size,
    }
    # Where the device knows the counts, `num_decodes` is a bound: prefills may start before it.
    has_prefills = metadata.max_prefills > 0 if is_captured else metadata.num_seqs > num_decodes

    def decodes() -> None:
        decode_attention(
            q[:num_decodes],
            k_cache,
            v_cache,
            metadata,
            out[:num_decodes],
            batch_invariant=batch_invariant,
            **options,
        )

    def prefills() -> None:
        prefill_attention(q, k_cache, v_cache, metadata, out, **options)

    if num_decodes and has_prefills and metadata.side_stream is not None:
        _side_by_side(decodes, prefills, metadata.side_stream)
    else:
        if num_decodes:
            decodes()
        if has_prefills:
            prefills()
    return out


def _side_by_side(
    first: Callable[[], None], second: Callable[[], None], side: torch.cuda.Stream
) -> None:
    """Launch `second` on `side`, where it waits for what came before `first`, but not for `first`.

    What follows on the current stream waits for both. Decodes go first: they wait for memory, and
    prefills multiply in between and on the multiprocessors where decodes end early.
    """
    main = torch.cuda.current_stream(side.device)
    side.wait_stream(main)
    first()
    with torch.cuda.stream(side):
        second()
    main.wait_stream(side)
