"""Added tokens: strings that become one token wherever they occur, before any BPE.

Control tokens ("special") mark structure, such as `<|im_end|>`; the others, such as Qwen3's
`<think>`, are ordinary text that happens to be a single token.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator


@dataclasses.dataclass(frozen=True)
class AddedTokenInfo:
    """One added token, with the flags of the `tokenizers` library.

    Attributes:
        content: The text that is matched.
        token_id: Its id.
        special: A control token: text only becomes this token where control tokens are parsed.
        normalized: Matched in the normalised text instead of the raw one.
        lstrip: Swallows the white space to its left.
        rstrip: Swallows the white space to its right.
        single_word: Matches only between non-word characters.
    """

    content: str
    token_id: int
    special: bool
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


def any_of(strings: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern for the leftmost, then longest, of `strings`; None if there are none."""
    longest_first = sorted(set(strings), key=lambda string: (-len(string), string))
    if not longest_first:
        return None
    return re.compile("|".join(map(re.escape, longest_first)))


class AddedTokenSplitter:
    """Cuts text at added tokens exactly as the `tokenizers` library does.

    Leftmost, then longest match over control and other added tokens together. Where control
    tokens are not parsed, a match of one still consumes its text (another added token that
    overlaps it is not looked for), but the text stays text.

    Args:
        tokens: Tokens without `lstrip`, `rstrip` or `single_word`, all matched in the same text.
    """

    def __init__(self, tokens: Iterable[AddedTokenInfo]) -> None:
        by_content = {token.content: token for token in tokens}
        self._ids = {content: token.token_id for content, token in by_content.items()}
        self._plain = {
            content: token.token_id for content, token in by_content.items() if not token.special
        }
        self._pattern = any_of(by_content)

    def split(self, text: str, *, parse_special: bool) -> Iterator[str | int]:
        """Alternating stretches of text (never empty) and ids of added tokens."""
        matched_ids = self._ids if parse_special else self._plain
        if self._pattern is None or not matched_ids:
            if text:
                yield text
            return
        start = 0
        for match in self._pattern.finditer(text):
            token_id = matched_ids.get(match.group())
            if token_id is None:
                continue
            if match.start() > start:
                yield text[start : match.start()]
            yield token_id
            start = match.end()
        if start < len(text):
            yield text[start:]
