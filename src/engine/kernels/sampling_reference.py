"""Tables, noise and the plain-torch twin of the sampling kernels.

Formula, for a row of logits x with temperature T and noise g(seed, position, token):

    x'  = x + bias, -inf where banned                       (logit_bias, min_tokens, bad_words)
    x'' = x' / r or x' * r if seen, - f * count - p * [count > 0]               (penalties)
    x'' = -inf where the row's mask has a 0                                      (constraints)
    S   = {x'' >= max + T ln(min_p)};  S = the top_k of S;  S = smallest top part of S with mass p
    id  = argmax over S of x'' / T + g,   or argmax of x'' when T is 0

All three filters keep a top part of the row, so S is {x'' >= t} for one threshold t. Ties at a
threshold are all kept: top_k may keep more than k tokens and top_p more than the smallest set
where the last value occurs several times (bf16 logits do that often). It makes the kept set a
function of the values alone, not of a sort's tie rule.

The draw is the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014): the argmax of log p + g with
g = -ln(E), E exponential, is a sample of p. E comes from Philox4x32-10 (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011), keyed by the seed, with a counter of position and
token. So the noise of a token depends on nothing else, least of all on the batch.

Values: NaN counts as -inf, finite values and +inf are clamped to ±`LARGEST_LOGIT` so that no later
product overflows. A row without any value above -inf gives token -1.

Letters: R rows of logits, V vocabulary, W entries of the sparse list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

WORD_INV_TEMPERATURE = 0
WORD_TOP_K = 1
WORD_TOP_P = 2
WORD_MIN_P_MARGIN = 3
WORD_REPETITION = 4
WORD_FREQUENCY = 5
WORD_PRESENCE = 6
WORD_HAS_PENALTIES = 7
WORD_SEED_LOW = 8
WORD_SEED_HIGH = 9
WORD_HAS_MASK = 10
NUM_SETTING_WORDS = 16
"""Words of 4 bytes per row of the settings: one 64-byte line, so that one row is one fetch."""

GREEDY, RANDOM, FILTERED = 0, 1, 2
"""What a row's draw needs: argmax, a random draw, or one after top_k, top_p or min_p."""

PROMPT_BIT = 1 << 14
COUNT_MASK = PROMPT_BIT - 1
LARGEST_LOGIT = 1e30
NOISE_LANES = 512
"""Philox gives four words per counter; word j of counter 512 b + i belongs to token
2048 b + 512 j + i. Four tokens 512 apart let a kernel load whole runs of the row."""

_WORD_MASK = 0xFFFFFFFF
_BELOW_ONE = 1.0 - 2.0**-24


@dataclass(slots=True)
class SamplingTables:
    """Per-row settings as tensors of one device, indexed by state index.

    Attributes:
        settings: [num_rows, NUM_SETTING_WORDS] int32; float words hold float32 bits. Inverse
            temperature (0 = greedy), top_k (0 = off), top_p (1 = off), min_p margin
            T ln(min_p) (-inf = off), the three penalties, 1 if any penalty is set, 64-bit seed,
            1 if `masks` counts for the row.
        sparse: [num_rows, 3, W] int32: token ids (-1 = empty), bias as float32 bits, and the
            position before which the token is banned (0 = never). No id twice in a row.
            None while no row has entries.
        counts: [num_rows, V] int16: times the token is in the answer (saturating at
            COUNT_MASK) plus PROMPT_BIT if it is in the prompt. None until a row has a penalty.
        masks: [num_rows, ceil(V / 32)] int32 in host memory (pinned where the device is a GPU): bit
            i % 32 of word i / 32 is set where token i is allowed. None until a row has a mask.
    """

    settings: torch.Tensor
    sparse: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    masks: torch.Tensor | None = None

    def floats(self) -> torch.Tensor:
        """`settings` read as float32, a view."""
        return self.settings.view(torch.float32)


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, ...]:
    """Four random 32-bit words of a 128-bit counter under a 64-bit key, ten rounds.

    Args:
        counter: Words in [0, 2^32): Python ints or int64 tensors of one shape.
        key: Two words, likewise.

    Returns:
        Four words of the counter's type. int64 products wrap, but their low 64 bits are right,
        and nothing else is used.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0 = c0 * 0xD2511F53
        product1 = c2 * 0xCD9E8D57
        high0, low0 = (product0 >> 32) & _WORD_MASK, product0 & _WORD_MASK
        high1, low1 = (product1 >> 32) & _WORD_MASK, product1 & _WORD_MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD_MASK, (k1 + 0xBB67AE85) & _WORD_MASK
    return c0, c1, c2, c3


def gumbel_noise(seed_words: tuple[int, int], position: int, vocab_size: int) -> torch.Tensor:
    """Gumbel noise of all tokens at one position: [V] float32, finite.

    Args:
        seed_words: Low and high 32 bits of the seed.
        position: Position of the new token, >= 0.
        vocab_size: V.
    """
    tile = 4 * NOISE_LANES
    num_counters = -(-vocab_size // tile) * NOISE_LANES
    index = torch.arange(num_counters, dtype=torch.int64)
    zero = torch.zeros_like(index)
    counter = (index, zero + position, zero, zero)
    words = torch.stack(philox4x32(counter, seed_words))
    ordered = words.view(4, -1, NOISE_LANES).transpose(0, 1).reshape(-1)[:vocab_size]
    # 1 - u is rounded for small u, where the largest noise comes from; Kahan's form of log1p
    # keeps the full precision there and needs no log1p of the compiler.
    u = (ordered.to(torch.float32) * 2.0**-32 + 2.0**-33).clamp(max=_BELOW_ONE)
    rest = 1.0 - u
    exponential = torch.where(rest == 1.0, u, -torch.log(rest) * (u / (1.0 - rest)))
    return -torch.log(exponential)


def clean_logits(logits: torch.Tensor) -> torch.Tensor:
    """`logits` as a new float32 tensor without NaN and with finite values bounded."""
    values = logits.to(torch.float32)
    bounded = values.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
    return torch.where(values.isnan() | (values == -torch.inf), -torch.inf, bounded)


def adjust_logits_reference(
    logits: torch.Tensor, tables: SamplingTables, rows: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Logits after bias, bans, penalties and masks.

    Args:
        logits: [R, V] of any float type.
        tables: Settings; `sparse`, `counts` and `masks` are applied where present.
        rows: [R] int64 state indices.
        positions: [R] int64 positions of the new tokens.

    Returns:
        New [R, V] float32 tensor.
    """
    adjusted = clean_logits(logits)
    floats = tables.floats()
    for i, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
        x = adjusted[i]
        if tables.sparse is not None:
            used = tables.sparse[row, 0] >= 0
            ids = tables.sparse[row, 0][used].long()
            bias = tables.sparse[row, 1][used].view(torch.float32)
            is_banned = position < tables.sparse[row, 2][used]
            x[ids] = torch.where(is_banned, -torch.inf, x[ids] + bias)
        if tables.counts is not None and tables.settings[row, WORD_HAS_PENALTIES] > 0:
            seen = tables.counts[row]
            repetition = floats[row, WORD_REPETITION]
            repeated = torch.where(x > 0, x / repetition, x * repetition)
            x = torch.where(seen > 0, repeated, x)
            count = (seen & COUNT_MASK).float()
            x = x - floats[row, WORD_FREQUENCY] * count
            adjusted[i] = x - floats[row, WORD_PRESENCE] * (count > 0).float()
        if tables.masks is not None and tables.settings[row, WORD_HAS_MASK] > 0:
            bits = tables.masks[row][:, None] >> torch.arange(32, dtype=torch.int32) & 1
            adjusted[i, bits.view(-1)[: adjusted.shape[1]] == 0] = -torch.inf
    return clean_logits(adjusted)


def filter_thresholds_reference(
    adjusted: torch.Tensor, tables: SamplingTables, rows: torch.Tensor
) -> torch.Tensor:
    """Smallest value each row keeps, found by sorting in float64.

    Args:
        adjusted: [R, V] float32 from `adjust_logits_reference`.
        tables: Settings.
        rows: [R] int64 state indices.

    Returns:
        [R] float32; -LARGEST_LOGIT, which keeps all, where the row has no filter.
    """
    floats = tables.floats()
    thresholds = []
    for x, row in zip(adjusted, rows.tolist(), strict=True):
        inv_temperature = floats[row, WORD_INV_TEMPERATURE].double()
        top_k = int(tables.settings[row, WORD_TOP_K])
        top_p = floats[row, WORD_TOP_P].double()
        margin = floats[row, WORD_MIN_P_MARGIN].double()
        ordered = x.double().sort(descending=True).values
        kept = ordered[ordered >= ordered[0] + margin] if margin > -torch.inf else ordered
        kept = kept[kept > -torch.inf]
        if inv_temperature == 0 or len(kept) == 0:
            thresholds.append(torch.tensor(-LARGEST_LOGIT))
            continue
        if 0 < top_k < len(kept):
            kept = kept[kept >= kept[top_k - 1]]
        if top_p < 1:
            mass = ((kept - kept[0]) * inv_temperature).exp().cumsum(0)
            reaches = torch.searchsorted(mass, top_p * mass[-1])
            kept = kept[: int(reaches) + 1]
        is_filtered = top_k > 0 or top_p < 1 or margin > -torch.inf
        thresholds.append(kept[-1].float() if is_filtered else torch.tensor(-LARGEST_LOGIT))
    return torch.stack(thresholds)


def sample_tokens_reference(
    logits: torch.Tensor, tables: SamplingTables, rows: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """One token per row, as the kernels draw it.

    Args:
        logits: [R, V] of any float type.
        tables: Settings; `counts` of rows with penalties is updated in place.
        rows: [R] int64 state indices.
        positions: [R] int64 positions of the new tokens.

    Returns:
        New [R] int64 tensor, -1 for rows without a value above -inf.
    """
    adjusted = adjust_logits_reference(logits, tables, rows, positions)
    thresholds = filter_thresholds_reference(adjusted, tables, rows)
    token_ids = torch.empty(len(rows), dtype=torch.int64)
    for i, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
        scores = adjusted[i]
        inv_temperature = tables.floats()[row, WORD_INV_TEMPERATURE]
        if inv_temperature > 0:
            low, high = tables.settings[row, WORD_SEED_LOW : WORD_SEED_HIGH + 1].tolist()
            seed_words = (low & _WORD_MASK, high & _WORD_MASK)
            noise = gumbel_noise(seed_words, position, scores.shape[0])
            scores = scores.where(scores >= thresholds[i], -torch.inf) * inv_temperature + noise
        best = int(scores.argmax())
        token_ids[i] = best if scores[best] > -torch.inf else -1
        has_penalties = bool(tables.settings[row, WORD_HAS_PENALTIES] > 0)
        if has_penalties and tables.counts is not None and token_ids[i] >= 0:
            seen = int(tables.counts[row, best])
            tables.counts[row, best] = seen + (1 if (seen & COUNT_MASK) < COUNT_MASK else 0)
    return token_ids
