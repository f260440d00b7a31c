"""Host-side rules of sampling: checks at submit, seeds of answers, needs of bad words."""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import RequestError
from engine.sampling_params import SamplingParams

MAX_LOGIT_BIAS = 4096
"""Most entries of one `logit_bias`; bounds the per-row table, which is as wide as the widest."""


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


def needs_host_sync(bad_words_ids: Sequence[Sequence[int]]) -> bool:
    """True where bans depend on the last tokens, so that the host must know them every step."""
    return any(len(word) > 1 for word in bad_words_ids)
