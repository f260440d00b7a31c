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
_MOST_MASKED = 16
"""Tokens that are masked before a guess is dared again, where guesses keep failing."""


class SequenceConstraint:
    """Follows one answer token by token. Host state of the sequence; engine thread only.

    Budget: the constraint knows a way to its end (`ClosingSearch`). Where hardly more tokens are
    left than the way is long, each new token must leave a way that fits into what is left: one that
    does not is taken back, and from then on the way is followed token by token. Where many more are
    left, the way is looked for anew now and then, more often the fewer there are. So an answer that
    had room for a complete document at its start ends with one, unless the way grows, unlooked at,
    by more than 7 tokens for each token, or at once by more than twice its first length and 64.

    Guesses: inside free text nearly every token is allowed, so that none is masked there and the
    one that comes is looked at instead. Where it is not allowed it is taken back, and the next is
    sampled under the mask. For draws that take the likeliest token, or the likeliest after adding
    noise of its own to each, an allowed one is the very token that the mask would have left.

    Args:
        matcher: At the start of an answer; this object's own.
        vocabulary: Of the model.
        search: Of the vocabulary.
        way: From the start to the end; None where none is known, and then nothing is promised.
        num_left: Tokens the answer may have.
        bars_early_end: No end-of-sequence id for as long as something else may follow
            (`ignore_eos`).
        may_jump: Forced tokens may be appended without running the model for each.
        may_guess: The tokens are drawn in one of those two ways, and nothing else watches them.
        lexer: Number of the lexer that `matcher` shares with others; masks of one are made one
            after the other.

    Attributes:
        is_complete: Satisfied, and nothing more can follow.
        guesses: The next token needs no mask, and may be sampled before the last one is known.
        error: Why the library gave up; empty while all is well.
    """

    __slots__ = (
        "_checks_from",
        "_follows_way",
        "_is_way_current",
        "_margin",
        "_num_masked_left",
        "_num_masked_next",
        "_search",
        "_vocabulary",
        "_way",
        "bars_early_end",
        "error",
        "guesses",
        "is_complete",
        "lexer",
        "matcher",
        "may_guess",
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
        may_guess: bool = False,
        lexer: int = 0,
    ) -> None:
        self.matcher = matcher
        self.bars_early_end = bars_early_end
        self.may_jump = may_jump
        self.lexer = lexer
        self.may_guess = may_guess and len(vocabulary.text_probes) > 1
        self.is_complete = self.guesses = False
        self.error = ""
        self._vocabulary = vocabulary
        self._search = search
        self._way: list[int] | None = None if way is None else list(way)
        self._is_way_current = True
        self._margin = _FEW_TOKENS if way is None else 2 * len(way) + _FEW_TOKENS
        self._follows_way = False
        self._checks_from = 0
        self._num_masked_left, self._num_masked_next = 0, 1
        self._plan_checks(num_left)

    @property
    def has_own_mask(self) -> bool:
        """The mask is not the matcher's: the next token on the way to the end is allowed alone."""
        return self._follows_way

    @property
    def is_plain(self) -> npt.NDArray[np.bool_]:
        """[V] bool, see `GrammarVocabulary`."""
        return self._vocabulary.is_plain

    def accept(self, token_id: int, num_left: int) -> bool:
        """Take in a sampled token.

        Args:
            token_id: Allowed by the last mask, or guessed.
            num_left: Tokens that may still follow it, >= 0.

        Returns:
            False where the token would leave no room for the rest, or was guessed and is not
            allowed: it does not count, and another one has to be sampled in its place. What was
            sampled behind it meanwhile must not be shown to this object.
        """
        if not self.may_guess or self._num_masked_left:
            self._num_masked_left = max(0, self._num_masked_left - 1)
            return self._take(token_id, num_left)
        is_barred = self.bars_early_end and token_id in self._vocabulary.eos_token_ids
        if is_barred or not self.matcher.try_consume_tokens([token_id]):
            self.guesses = False
            self._num_masked_left = self._num_masked_next
            self._num_masked_next = min(2 * self._num_masked_next, _MOST_MASKED)
            return False
        self._num_masked_next = max(1, self._num_masked_next - 1)
        return not self._note_state(True, token_id) or self._looks_ahead(num_left)

    def _take(self, token_id: int, num_left: int) -> bool:
        """`accept` of a token that the mask allows."""
        return not self._consume(token_id) or self._looks_ahead(num_left)

    def _looks_ahead(self, num_left: int) -> bool:
        """Follow the way, or see whether one is left; False where the last token was taken back."""
        if self._follows_way:
            self._way = (self._way or [])[1:]
            self._plan_checks(num_left)
        elif self._way is not None:
            if num_left <= self._checks_from:
                return self._keeps_room(num_left)
            self._is_way_current = False
        return True

    def take_forced(self, num_left: int) -> list[int]:
        """The tokens that follow without a choice, taken in; at most `num_left`. Sets `guesses`.

        Exactly those that step by step would be sampled: where the library names forced tokens, its
        mask allows the next of them alone.
        """
        if self.is_complete or num_left <= 0:
            self.guesses = False
            return []
        if self.guesses and self._is_in_text(self._vocabulary.text_probes[:1]):
            return []
        taken = self._jump(num_left) if self.may_jump else []
        self.guesses = not self.is_complete and self._is_in_text(self._vocabulary.text_probes)
        return taken

    def _jump(self, num_left: int) -> list[int]:
        if not self._follows_way:
            forced: list[int] = self.matcher.compute_ff_tokens()[:num_left]
            if not forced:
                return forced
            if self._way is None or num_left - len(forced) > self._checks_from:
                # Nobody asks for their room one by one.
                self._is_way_current = False
                self._note_state(self.matcher.consume_tokens(forced), forced)
                return forced
        else:
            forced = (self._way or [])[:num_left]
        taken: list[int] = []
        for token_id in forced:
            num_left -= 1
            if not self._take(token_id, num_left):
                break
            taken.append(token_id)
            if self.error:
                break
        return taken

    def _is_in_text(self, probes: Sequence[list[int]]) -> bool:
        """Whether a guess is worth while: each of `probes` may come next."""
        if not self.may_guess or self._num_masked_left or self._follows_way or self.error:
            return False
        return all(map(self.matcher.validate_tokens, probes))

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
        ids = self._vocabulary.eos_token_ids
        if not any(words.item(token_id >> 5) >> (token_id & 31) & 1 for token_id in ids):
            return
        kept = words.copy()
        for token_id in ids:
            kept.view(np.uint32)[token_id >> 5] &= np.uint32(~(1 << (token_id & 31)) & 0xFFFFFFFF)
        if kept.any():
            words[...] = kept

    def _consume(self, token_id: int) -> bool:
        return self._note_state(self.matcher.consume_token(token_id), token_id)

    def _note_state(self, is_allowed: bool, tokens: int | list[int]) -> bool:
        """What showing `tokens` to the matcher led to; False where it has given up."""
        if not is_allowed:
            self.error = self.matcher.get_error() or f"of the tokens {tokens}, one was not allowed"
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
