"""`SequenceConstraint`: where one answer is in its constraint, and which tokens may come next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from engine.constraints.closing import ClosingSearch
from engine.constraints.vocabulary import GrammarVocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

_FEW_TOKENS = 64
"""Growth of the way to the end that one token may cause, beside twice the way from the start."""
_STEADY_GROWTH = 8
"""Far from the end, 1 + the growth per token that is reckoned with between two checks."""


class SequenceConstraint:
    """Follows one answer token by token. Host state of the sequence; engine thread only.

    Budget: the constraint knows a way to its end (`ClosingSearch`). Where hardly more tokens are
    left than the way is long, each new token must leave a way that fits into what is left: one that
    does not is taken back, and from then on the way is followed token by token. Where many more are
    left, the way is looked for anew now and then, more often the fewer there are. So an answer that
    had room for a complete document at its start ends with one, unless the way grows, unlooked at,
    by more than 7 tokens for each token, or at once by more than twice its first length and 64.

    Args:
        matcher: At the start of an answer; this object's own.
        vocabulary: Of the model.
        search: Of the vocabulary.
        way: From the start to the end; None where none is known, and then nothing is promised.
        num_left: Tokens the answer may have.
        bars_early_end: No end-of-sequence id for as long as something else may follow
            (`ignore_eos`).
        may_jump: Forced tokens may be appended without running the model for each.

    Attributes:
        is_complete: Satisfied, and nothing more can follow.
        error: Why the library gave up; empty while all is well.
    """

    __slots__ = (
        "_checks_from",
        "_follows_way",
        "_is_way_current",
        "_margin",
        "_search",
        "_vocabulary",
        "_way",
        "bars_early_end",
        "error",
        "is_complete",
        "matcher",
        "may_jump",
    )

    def __init__(
        self,
        matcher: LLMatcher,
        vocabulary: GrammarVocabulary,
        search: ClosingSearch,
        way: Sequence[int] | None,
        *,
        num_left: int,
        bars_early_end: bool,
        may_jump: bool,
    ) -> None:
        self.matcher = matcher
        self.bars_early_end = bars_early_end
        self.may_jump = may_jump
        self.is_complete = False
        self.error = ""
        self._vocabulary = vocabulary
        self._search = search
        self._way: list[int] | None = None if way is None else list(way)
        self._is_way_current = True
        self._margin = _FEW_TOKENS if way is None else 2 * len(way) + _FEW_TOKENS
        self._follows_way = False
        self._checks_from = 0
        self._plan_checks(num_left)

    @property
    def has_own_mask(self) -> bool:
        """The mask is not the matcher's: the next token on the way to the end is allowed alone."""
        return self._follows_way

    def accept(self, token_id: int, num_left: int) -> bool:
        """Take in a sampled token.

        Args:
            token_id: Allowed by the last mask.
            num_left: Tokens that may still follow it, >= 0.

        Returns:
            False where the token would leave no room for the rest: it does not count, and another
            one has to be sampled in its place.
        """
        if not self._consume(token_id):
            return True
        if self._follows_way:
            self._way = (self._way or [])[1:]
            self._plan_checks(num_left)
        elif self._way is not None:
            if num_left <= self._checks_from:
                return self._keeps_room(num_left)
            self._is_way_current = False
        return True

    def take_forced(self, num_left: int) -> list[int]:
        """The tokens that follow without a choice, taken in; at most `num_left`.

        Exactly those that step by step would be sampled: where the library names forced tokens, its
        mask allows the next of them alone.
        """
        taken: list[int] = []
        if not self.may_jump or self.is_complete or num_left <= 0:
            return taken
        forced = (self._way or []) if self._follows_way else self.matcher.compute_ff_tokens()
        for token_id in forced[:num_left]:
            num_left -= 1
            if not self.accept(token_id, num_left):
                break
            taken.append(token_id)
            if self.error:
                break
        return taken

    def write_mask(self, words: npt.NDArray[np.int32]) -> None:
        """The mask of a sequence with `has_own_mask`.

        Args:
            words: [num_mask_words], written.
        """
        words[...] = 0
        # Where the way is empty the answer is complete, and the token that was taken back would
        # have begun something that there is no room for.
        for token_id in (self._way or [])[:1] or self._vocabulary.eos_token_ids:
            words.view(np.uint32)[token_id >> 5] |= np.uint32(1 << (token_id & 31))

    def bar_early_end(self, words: npt.NDArray[np.int32]) -> None:
        """Take the end-of-sequence ids out of a mask that allows others."""
        kept = words.copy()
        for token_id in self._vocabulary.eos_token_ids:
            kept.view(np.uint32)[token_id >> 5] &= np.uint32(~(1 << (token_id & 31)) & 0xFFFFFFFF)
        if kept.any():
            words[...] = kept

    def _consume(self, token_id: int) -> bool:
        if not self.matcher.consume_token(token_id):
            self.error = self.matcher.get_error() or f"token {token_id} was not allowed"
            return False
        self.is_complete = self.matcher.is_stopped()
        if self.is_complete and self.matcher.is_error():
            self.error = self.matcher.get_error()
            return False
        return True

    def _keeps_room(self, num_left: int) -> bool:
        way = self._search.find(self.matcher, num_left, self._way or ())
        if way is not None:
            self._way, self._is_way_current = way, True
            self._plan_checks(num_left)
            return True
        if not self._is_way_current:
            self._way = None
            return True
        if not self.matcher.rollback(1):
            self.error = "a token could not be taken back"
            return True
        self.is_complete = False
        self._follows_way = True
        return False

    def _plan_checks(self, num_left: int) -> None:
        """Say from how many tokens left on the way is looked at again, and whether to follow it."""
        if self._way is None:
            return
        # Nothing but the way fits any more. At its end, what follows is free again.
        num_spare = num_left - len(self._way)
        self._follows_way = num_spare <= 0 and bool(self._way)
        is_near = num_spare <= self._margin
        self._checks_from = num_left if is_near else num_left - num_spare // _STEADY_GROWTH
