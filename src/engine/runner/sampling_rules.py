"""Host-side rules of sampling: checks at submit, seeds of answers, needs of bad words."""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import RequestError
from engine.sampling_params import SamplingParams

MAX_LOGIT_BIAS = 4096
"""Most entries of one `logit_bias`; bounds the per-row table, which is as wide as the widest."""

_WORD64 = (1 << 64) - 1


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """Refuse options that name tokens the model does not have. Called when a request is submitted.

    Args:
        params: The request's options.
        vocab_size: V, width of the model's logits.

    Raises:
        RequestError: A `logit_bias` or `stop_token_ids` id is not below `vocab_size`, or
            `logit_bias` has more than `MAX_LOGIT_BIAS` entries.
    """
    bias_ids = tuple(params.logit_bias or ())
    for name, token_ids in (
        ("logit_bias", bias_ids),
        ("stop_token_ids", tuple(params.stop_token_ids or ())),
    ):
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                msg = (
                    f"{name} names token id {token_id}, but this model's ids go from 0 to "
                    f"{vocab_size - 1}. Take ids from this model's own tokenizer."
                )
                raise RequestError(msg)
    if len(bias_ids) > MAX_LOGIT_BIAS:
        msg = (
            f"logit_bias has {len(bias_ids)} entries; at most {MAX_LOGIT_BIAS} are allowed. "
            "Keep those with the largest effect."
        )
        raise RequestError(msg)


def answer_seed(seed: int, index: int) -> int:
    """64-bit seed of answer `index` of a request, so that answers differ under one seed.

    The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) over the seed advanced by its
    golden-ratio step.

    Args:
        seed: The request's seed; negative ones count modulo 2^64.
        index: Which of the `n` answers, >= 0.
    """
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _WORD64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD64
    return z ^ (z >> 31)


def needs_host_sync(bad_words_ids: Sequence[Sequence[int]]) -> bool:
    """True where bans depend on the last tokens, so that the host must know them every step."""
    return any(len(word) > 1 for word in bad_words_ids)
