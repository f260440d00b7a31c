"""Values of 4-bit codes by table, four columns' codes at once, for the kernels written in Gluon.

A table of 16 float16 is eight words: `table_words[4 b + i]` has byte b of entries 4 i to 4 i + 3.
`prmt` picks four of eight bytes by three bits each, which is half a table for the codes of four
strips of a word; the fourth bit chooses between two of them. So a code costs about five
instructions where selections in `quantised_unpack.table_entries` cost fifteen.
"""

# Kernels annotate their compile-time parameters only; the rest are Gluon values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _pick_bytes(low, high, selectors):
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selectors], gl.int32, True, 1
    )


@gluon.jit
def _byte_of_entries(words_ptr, selectors, is_upper):
    """A byte of the entries of four codes: all bits of a byte of `is_upper` say which half."""
    lower = _pick_bytes(gl.load(words_ptr), gl.load(words_ptr + 1), selectors)
    upper = _pick_bytes(gl.load(words_ptr + 2), gl.load(words_ptr + 3), selectors)
    return lower ^ ((lower ^ upper) & is_upper)


@gluon.jit
def look_up(words, table_words_ptr, HALF: gl.constexpr):
    """(lower bytes, upper bytes) of the entries of strips 4 HALF to 4 HALF + 3 of int32 words."""
    codes = words >> (16 * HALF)
    selectors = codes & 0x7777
    is_upper = _pick_bytes(0xFF00, 0, (codes >> 3) & 0x1111)
    return (
        _byte_of_entries(table_words_ptr, selectors, is_upper),
        _byte_of_entries(table_words_ptr + 4, selectors, is_upper),
    )


@gluon.jit
def entry_of(both, AT: gl.constexpr):
    """The entry number AT of `look_up`'s four, fp32."""
    lower, upper = both
    halves = _pick_bytes(lower, upper, AT + 16 * (4 + AT))
    return halves.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
