"""Log probabilities of sampled and prompt tokens, from raw logits."""

from __future__ import annotations

import torch

_CHUNK_ELEMENTS = 1 << 25


def gather_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log probabilities of given tokens and of the likeliest ones. No host sync.

    The softmax runs in float32 over at most 2^25 logits at a time (128 MiB), so that a long
    prompt's positions never need a float32 copy of all their logits. Capturable in a CUDA graph.

    Args:
        logits: [R, V] of any float type, before bias, penalties and temperature.
        token_ids: [R] int64; -1 (nothing sampled) is read as token 0.
        num_top: K, likeliest tokens to report, 0 <= K; more than V gives V.

    Returns:
        ids [R, K+1] int64 with the given token first, then the top K in falling order;
        logprobs [R, K+1] float32 of these; ranks [R] int64 of the given tokens, 1 = likeliest,
        tied tokens sharing the best rank.
    """
    num_rows, vocab_size = logits.shape
    num_top = min(num_top, vocab_size)
    chosen = token_ids.clamp(min=0).unsqueeze(1)
    ids = torch.empty((num_rows, num_top + 1), dtype=torch.int64, device=logits.device)
    logprobs = torch.empty((num_rows, num_top + 1), dtype=torch.float32, device=logits.device)
    ranks = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    chunk_rows = max(1, _CHUNK_ELEMENTS // vocab_size)
    for start in range(0, num_rows, chunk_rows):
        part = slice(start, min(start + chunk_rows, num_rows))
        values = torch.log_softmax(logits[part], dim=-1, dtype=torch.float32)
        own = values.gather(1, chosen[part])
        ranks[part] = (values > own).sum(dim=1) + 1
        ids[part, :1] = chosen[part]
        logprobs[part, :1] = own
        if num_top > 0:
            top = values.topk(num_top, dim=1)
            ids[part, 1:] = top.indices
            logprobs[part, 1:] = top.values
    return ids, logprobs, ranks
