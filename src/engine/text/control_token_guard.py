"""Keeps control tokens that a caller writes in a message from becoming control tokens.

A rendered chat is one string: the template's `<|im_end|>` and one that a user typed look alike. So
before rendering, each of the user's is replaced by a run of digits that occurs nowhere else; after
rendering, whatever control token is found is the template's own, and the digits turn back to text.
Digits, because templates trim, change case, escape as JSON and split, and digits survive that.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from typing import Any

from engine.errors import RequestError
from engine.text.added_tokens import any_of

_NONCE_DIGITS = 24
_INDEX_DIGITS = 6


class ControlTokenGuard:
    """Finds control tokens in a caller's strings. Immutable, one per tokenizer.

    Attributes:
        nonce: Digits drawn at random, which begin every stand-in.
        stand_in: Pattern of a stand-in; its group is an index.

    Args:
        control_tokens: The tokenizer's control tokens.
    """

    def __init__(self, control_tokens: Iterable[str]) -> None:
        tokens = list(control_tokens)
        self._whole = any_of(tokens)
        # A token that starts at the end of one string could be completed by what the template
        # writes next. Words are left alone: templates compare them ("tool", "function").
        beginnings = {
            token[:length]
            for token in tokens
            if not token[:1].isalnum()
            for length in range(1, len(token))
        }
        self._beginnings = frozenset(beginnings)
        self._last_chars = frozenset(beginning[-1] for beginning in beginnings)
        self._max_beginning_chars = max(map(len, beginnings), default=0)
        # Unknown to callers. Who knew it could at most repeat another text of the same chat.
        self.nonce = f"{secrets.randbelow(10**_NONCE_DIGITS):0{_NONCE_DIGITS}d}"
        self.stand_in = re.compile(rf"{self.nonce}([0-9]{{{_INDEX_DIGITS}}})")

    def split_off_beginning(self, text: str) -> tuple[str, str]:
        """`text` cut before the longest end of it that begins a control token."""
        if text[-1:] not in self._last_chars:
            return text, ""
        for length in range(min(self._max_beginning_chars, len(text)), 0, -1):
            if text[-length:] in self._beginnings:
                return text[:-length], text[-length:]
        return text, ""

    def cover(self) -> ControlTokenCover:
        """A fresh cover for the strings of one chat."""
        return ControlTokenCover(self, self._whole)


class ControlTokenCover:
    """The control tokens hidden in the strings of one chat."""

    def __init__(self, guard: ControlTokenGuard, whole: re.Pattern[str] | None) -> None:
        self._guard = guard
        self._whole = whole
        self._nonce = guard.nonce
        self._hidden: dict[str, int] = {}

    def unused_text(self) -> str:
        """Digits that occur in none of the caller's strings and are no stand-in."""
        return self._nonce[::-1] + self._nonce

    def hide(self, value: Any) -> Any:
        """`value` (plain JSON data) with the control tokens in all its strings hidden."""
        if isinstance(value, str):
            return self.hide_in_text(value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide(item) for item in value]
        return value

    def hide_in_text(self, text: str) -> str:
        """`text` with a stand-in for each control token, and for the start of one at its end."""
        if self._whole is None:
            return text
        covered = self._whole.sub(lambda match: self._stand_in_for(match.group()), text)
        kept, beginning = self._guard.split_off_beginning(covered)
        return kept + self._stand_in_for(beginning) if beginning else covered

    def is_needed_in(self, rendered: str) -> bool:
        """Whether `rendered` holds a stand-in, or a piece of one."""
        return bool(self._hidden) and self._nonce[: _NONCE_DIGITS // 2] in rendered

    def reveal(self, rendered: str) -> str:
        """`rendered` with the caller's own words instead of stand-ins.

        Raises:
            RequestError: The template cut a stand-in in two.
        """
        if not self._hidden:
            return rendered
        originals = dict(enumerate(self._hidden))
        revealed = self._guard.stand_in.sub(
            lambda match: originals.get(int(match.group(1)), match.group()), rendered
        )
        if self._nonce[: _NONCE_DIGITS // 2] in revealed:
            msg = (
                "The chat template cuts messages apart inside a control token "
                f"({', '.join(map(repr, list(self._hidden)[:5]))}). Remove it from the messages."
            )
            raise RequestError(msg)
        return revealed

    def _stand_in_for(self, text: str) -> str:
        index = self._hidden.setdefault(text, len(self._hidden))
        return f"{self._nonce}{index:0{_INDEX_DIGITS}d}"
