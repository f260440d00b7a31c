"""Triton kernel that bars the tokens which a constraint does not allow.

    x[i] = -inf where bit i % 32 of mask word i / 32 is 0,   for rows whose settings say so

| argument        | shape, dtype                  | duty                                           |
|-----------------|-------------------------------|------------------------------------------------|
| logits_ptr      | [R, V] bf16, fp16 or fp32     | stride 1 along V; written in place             |
| settings_ptr    | [num_rows, 16] int32          | `SamplingTables.settings`                      |
| masks_ptr       | [num_rows, W] int32           | `SamplingTables.masks`, pinned host memory     |
| rows_ptr        | [R] int64                     | state indices                                  |

Grid (R, W / WORDS): one program bars tokens of 32 WORDS columns of one row, and does nothing for
a row without a mask, so such rows cost an empty program each. The words come over the bus, once
each: 6 KB a row for V = 49,152. Nothing is rounded. Offsets that multiply a stride are int64.
WORDS = 64 (2,048 tokens) as in the other sampling kernels.

The packed form is that of XGrammar's and llguidance's own kernels; reading it from host memory
without a copy, and leaving rows by their settings, are ours.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels import sampling_reference as layout
from engine.kernels.compile_ahead import launchable
from engine.kernels.sampling_reference import SamplingTables

_NUM_SETTING_WORDS = tl.constexpr(layout.NUM_SETTING_WORDS)
_HAS_MASK = tl.constexpr(layout.WORD_HAS_MASK)
_WORDS = 64


@launchable
@triton.jit
def _mask_kernel(
    logits_ptr,
    stride_logits,
    settings_ptr,
    masks_ptr,
    rows_ptr,
    vocab_size,
    num_words,
    WORDS: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + index)
    if tl.load(settings_ptr + row * _NUM_SETTING_WORDS + _HAS_MASK) > 0:
        word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
        bits = tl.load(masks_ptr + row * num_words + word, mask=word < num_words, other=0)
        bit = tl.arange(0, 32)
        token = word[:, None] * 32 + bit[None, :]
        is_barred = ((bits[:, None] >> bit[None, :]) & 1) == 0
        barred = tl.full([WORDS, 32], -float("inf"), tl.float32)
        logits_row = logits_ptr + index * stride_logits
        tl.store(logits_row + token, barred, mask=is_barred & (token < vocab_size))


def apply_token_masks(logits: torch.Tensor, tables: SamplingTables, rows: torch.Tensor) -> None:
    """Write -inf over the logits of tokens that the masks of their rows do not allow.

    Args:
        logits: [R, V] bf16, fp16 or fp32 with unit stride along V; changed in place.
        tables: `settings` on the device of `logits`, `masks` in host memory it can read.
        rows: [R] int64 state indices.
    """
    assert tables.masks is not None, "a row with a mask comes with masks"
    assert logits.stride(1) == 1, "logits must have unit stride along the vocabulary"
    num_rows, vocab_size = logits.shape
    num_words = tables.masks.shape[1]
    _mask_kernel[(num_rows, triton.cdiv(num_words, _WORDS))](
        logits,
        logits.stride(0),
        tables.settings,
        tables.masks,
        rows,
        vocab_size,
        num_words,
        WORDS=_WORDS,
        num_warps=4,
    )
