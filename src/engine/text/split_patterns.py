"""How byte-level BPE tokenizers cut text into pieces, and what is known to mean the same.

Two descriptions exist of one thing. `tokenizer.json` holds a pre-tokenizer, a GGUF file a name
(`tokenizer.ggml.pre`). `split_rule` turns the first into a pattern for tiktoken, and
`gguf_pre_tokenizer` the second into the first. Both know a closed list and refuse everything else:
a nearly right split gives plausible text and silently worse answers.

The patterns are those of the models' own `tokenizer.json`; which GGUF name means which is from
ggml-org/llama.cpp, `src/llama-vocab.cpp`, at commit 00ad355e (MIT).
"""

from __future__ import annotations

import dataclasses
from typing import Any

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# GPT-2's split after every numeral was cut out. White space before a numeral ends its stretch of
# text, hence the `\p{N}` in the lookahead.
DIGITS_THEN_GPT2_SPLIT = (
    r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
)

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Every one of these matches any character, so cutting at its matches loses no text.
_KNOWN_SPLITS = frozenset(
    (GPT2_SPLIT, LLAMA3_SPLIT, QWEN2_SPLIT, QWEN35_SPLIT, TEKKEN_SPLIT, GPT4O_SPLIT)
)

# Numerals added to Unicode since 15.0. `Digits` asks Rust's standard library and a pattern the
# regex crate, and the two learn of new characters at different times.
RECENT_NUMERALS = (
    r"[\U00010D40-\U00010D49\U000116D0-\U000116E3\U00011BF0-\U00011BF9\U00011DE0-\U00011DE9"
    r"\U00011F50-\U00011F59\U00016D70-\U00016D79\U00016FF4-\U00016FF6\U0001CCF0-\U0001CCF9"
    r"\U0001D2C0-\U0001D2D3\U0001E4F0-\U0001E4F9\U0001E5F1-\U0001E5FA]"
)


@dataclasses.dataclass(frozen=True)
class SplitRule:
    """A pre-tokenizer as one pattern.

    Attributes:
        pattern: For tiktoken. Its matches are the pieces.
        excluded: Python pattern of characters on which pattern and pre-tokenizer may disagree;
            None if there are none.
    """

    pattern: str
    excluded: str | None = None


def split_rule(pre_tokenizer: dict[str, Any] | None) -> SplitRule | None:
    """The rule equal to a pre-tokenizer given as in `tokenizer.json`; None if none is known."""
    match _flattened(pre_tokenizer):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return SplitRule(GPT2_SPLIT)
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            return SplitRule(DIGITS_THEN_GPT2_SPLIT, excluded=RECENT_NUMERALS)
        case [
            {
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": behavior,
                "invert": invert,
            },
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if (behavior, invert) in (("Isolated", False), ("Removed", True)):
            return SplitRule(pattern) if pattern in _KNOWN_SPLITS else None
        case _:
            return None


def _flattened(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer.get("type") != "Sequence":
        return [pre_tokenizer]
    return [part for inner in pre_tokenizer["pretokenizers"] for part in _flattened(inner)]


@dataclasses.dataclass(frozen=True)
class GgufPreTokenizer:
    """What a GGUF file's `tokenizer.ggml.pre` stands for.

    Attributes:
        splits: Patterns applied one after the other, each to the pieces of the one before. None
            stands for `Digits(individual_digits=True)`.
        ignore_merges: A piece that is a token is taken whole, whatever the merges say.
        add_bos: Whether BOS is added where the file does not say.
        nfc: Text is brought to Unicode normal form C first, as these models' own tokenizers do.
    """

    splits: tuple[str | None, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


_GPT2 = GgufPreTokenizer((GPT2_SPLIT,))
_DIGITS_THEN_GPT2 = GgufPreTokenizer((None, GPT2_SPLIT))
_LLAMA3 = GgufPreTokenizer((LLAMA3_SPLIT,), ignore_merges=True, add_bos=True)
_LLAMA3_MERGED = GgufPreTokenizer((LLAMA3_SPLIT,))
_QWEN2 = GgufPreTokenizer((QWEN2_SPLIT,), nfc=True)
_GPT4O = GgufPreTokenizer((GPT4O_SPLIT,))

GGUF_PRE_TOKENIZERS: dict[str, GgufPreTokenizer] = {
    "chatglm-bpe": _LLAMA3_MERGED,
    "dbrx": _LLAMA3_MERGED,
    "deepseek-r1-qwen": _QWEN2,
    # llama.cpp's own invention for files that name no model's split.
    "default": GgufPreTokenizer(
        (r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]")
    ),
    "falcon-h1": _LLAMA3,
    "falcon3": _LLAMA3,
    "glm4": _LLAMA3_MERGED,
    "gpt-2": _GPT2,
    "gpt-4o": _GPT4O,
    "lfm2": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "llama4": _GPT4O,
    "phi-2": _GPT2,
    "qwen2": _QWEN2,
    "qwen35": GgufPreTokenizer((QWEN35_SPLIT,), nfc=True),
    "refact": _DIGITS_THEN_GPT2,
    "smollm": _DIGITS_THEN_GPT2,
    "starcoder": _DIGITS_THEN_GPT2,
    "tekken": GgufPreTokenizer((TEKKEN_SPLIT,), ignore_merges=True, add_bos=True),
}
