"""`ConstraintCompiler`: from a request's options to a compiled constraint, or a typed error.

Runs in the thread of whoever submits, never in the engine's. The grammars themselves, Earley
parser, lexer and masks, are the work of llguidance (MIT; see docs/CONSTRAINTS.md for why this
library and not another).
"""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine.constraints.closing import ClosingSearch
from engine.constraints.schema_paths import (
    find_culprit,
    pointer,
    with_discriminators,
    with_json_blocks,
    without_unknown_formats,
)
from engine.constraints.schema_rewriting import rewritten
from engine.constraints.sequence import SequenceConstraint
from engine.constraints.spec import ConstraintSpec
from engine.constraints.vocabulary import GrammarVocabulary
from engine.errors import ConstraintError
from engine.sampling_params import SamplingParams
from engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

_CACHE_ENTRIES = 256
_MOST_LEXERS = 8
_ANSWERS_PER_LEXER = 4
_LONGEST_COMPILATION_S = 0.02
"""Constraints that take longer are not compiled again."""
_LONGEST_WAY_TOKENS = 4096
_KNOWN_FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"}
    | {"uri", "unknown"}
)
_PICTURE = re.compile(r"\s*\d+ \| .*|[\s^]*")
_WHITESPACE: dict[str, dict[str, Any]] = {
    "spaced": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    "compact": {"whitespace_flexible": False},
    "flexible": {"whitespace_pattern": r"[ \n\r\t]{1,20}"},
}


class CompiledConstraint:
    """A constraint that can be enforced. Immutable; shared by all requests that ask for the same.

    Copies of a matcher share its lexer, which knows the states that any of them has met, behind a
    lock. So that masks of many answers can be made side by side, the constraint may be compiled
    several times, once for every 4 answers that were asked for.

    Args:
        spec: What was asked for.
        matcher: At the start; copied for each answer.
        vocabulary: Of the model.
        search: Of the vocabulary.
        most_lexers: How often it is compiled at most.
    """

    def __init__(
        self,
        spec: ConstraintSpec,
        matcher: LLMatcher,
        vocabulary: GrammarVocabulary,
        search: ClosingSearch,
        most_lexers: int = 1,
    ) -> None:
        self.spec = spec
        self._matcher = matcher
        self._matchers = [matcher]
        self._most_lexers = most_lexers
        self._start_numbers = itertools.count()
        self._vocabulary = vocabulary
        self._search = search
        self._way = search.find(matcher, _LONGEST_WAY_TOKENS)

    def check_room(self, max_tokens: int) -> None:
        """Refuse an answer that is too short to be complete.

        Raises:
            ConstraintError: No complete answer of at most `max_tokens` tokens was found.
        """
        if self._way is not None and len(self._way) <= max_tokens:
            return
        if self._search.find(self._matcher, max_tokens) is not None:
            return
        name = self.spec.kind
        if self._way is None:
            msg = (
                f"No answer of at most {_LONGEST_WAY_TOKENS} tokens that satisfies {name} was "
                "found: it asks for something endless, such as an object that requires itself, or "
                "for what no text can be."
            )
        else:
            msg = (
                f"max_tokens={max_tokens} leaves no room for an answer that satisfies {name}: the "
                f"shortest one found has {len(self._way)} tokens. Raise max_tokens."
            )
        raise ConstraintError(msg)

    def start(self, params: SamplingParams, max_tokens: int) -> SequenceConstraint:
        """What follows one answer.

        Args:
            params: Of the request.
            max_tokens: The answer may have, the context's limit included.
        """
        way = self._way
        if way is None or len(way) > max_tokens:
            way = self._search.find(self._matcher, max_tokens)
        lexer = next(self._start_numbers) // _ANSWERS_PER_LEXER % self._most_lexers
        while lexer >= len(self._matchers):
            # Two threads may both add one; there is then one more than need be.
            self._matchers.append(_new_matcher(self.spec, self._vocabulary))
        matcher = self._matchers[lexer]
        return SequenceConstraint(
            matcher.deep_copy(),
            self._vocabulary,
            self._search,
            way,
            num_left=max_tokens,
            bars_early_end=params.ignore_eos,
            may_jump=_may_jump(params),
            may_guess=_may_guess(params),
            lexer=id(matcher),
        )


class ConstraintCompiler:
    """Compiles constraints for one model and keeps the last 256. Thread-safe.

    Args:
        tokenizer: None for models without one, which cannot be constrained.
        vocab_size: V, width of the logits.
        eos_token_ids: Ids that end an answer.
        has_many_threads: Masks are made by several threads, as for a GPU.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        *,
        has_many_threads: bool = False,
    ) -> None:
        self._most_lexers = _MOST_LEXERS if has_many_threads else 1
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._vocabulary: GrammarVocabulary | None = None
        self._search: ClosingSearch | None = None
        self._vocabulary_lock = threading.Lock()
        self._compiled: OrderedDict[ConstraintSpec, CompiledConstraint] = OrderedDict()
        self._compiled_lock = threading.Lock()

    def compile(self, params: SamplingParams) -> CompiledConstraint | None:
        """The constraint that `params` ask for, or None for free text.

        Raises:
            ConstraintError: It cannot be enforced; for a schema, names the JSON path.
        """
        spec = params.constraint
        if spec is None:
            return None
        with self._compiled_lock:
            found = self._compiled.get(spec)
            if found is not None:
                self._compiled.move_to_end(spec)
                return found
        vocabulary, search = self._shared_parts()
        started_s = time.perf_counter()
        matcher = _new_matcher(spec, vocabulary)
        is_slow = time.perf_counter() - started_s > _LONGEST_COMPILATION_S
        most_lexers = 1 if is_slow else self._most_lexers
        compiled = CompiledConstraint(spec, matcher, vocabulary, search, most_lexers)
        with self._compiled_lock:
            self._compiled[spec] = compiled
            if len(self._compiled) > _CACHE_ENTRIES:
                self._compiled.popitem(last=False)
        return compiled

    def _shared_parts(self) -> tuple[GrammarVocabulary, ClosingSearch]:
        if self._tokenizer is None:
            msg = "This model has no tokenizer, so its answers cannot be constrained."
            raise ConstraintError(msg)
        with self._vocabulary_lock:
            if self._vocabulary is None or self._search is None:
                self._vocabulary = GrammarVocabulary(
                    self._tokenizer, self._vocab_size, self._eos_token_ids
                )
                self._search = ClosingSearch(self._vocabulary)
            return self._vocabulary, self._search


def _may_jump(params: SamplingParams) -> bool:
    """Whether nothing but the mask has a say in a forced token, and nobody looks at its logits."""
    return not (
        params.has_penalties
        or params.logit_bias
        or params.bad_words
        or params.stop
        or params.stop_token_ids
        or params.logprobs is not None
    )


def _may_guess(params: SamplingParams) -> bool:
    """Whether an allowed token is the same with and without the mask: nothing is cut off first."""
    is_whole = params.top_p == 1 and params.top_k <= 0 and params.min_p == 0
    return (is_whole or params.temperature == 0) and _may_jump(params)


def _new_matcher(spec: ConstraintSpec, vocabulary: GrammarVocabulary) -> LLMatcher:
    try:
        if spec.kind == "json_schema":
            return _schema_matcher(spec, vocabulary)
        from llguidance import LLMatcher, regex_to_lark

        if spec.kind == "regex":
            # With "d", \d means the ten ASCII digits, as whoever asks for a number expects.
            pattern = regex_to_lark(spec.source, "d")
            grammar = LLMatcher.grammar_from_lark(f"start: /{pattern}/")
        elif spec.kind == "choice":
            # One alternation of literals: a hundred times as fast as alternatives of a grammar.
            alternatives = map(re.escape, json.loads(spec.source))
            grammar = LLMatcher.grammar_from_regex("|".join(alternatives))
        else:
            return _grammar_matcher(_as_lark(spec.source), vocabulary)
    except RecursionError:
        msg = f"{spec.kind} is nested too deeply."
        raise ConstraintError(msg) from None
    matcher, error = _try_matcher(grammar, vocabulary)
    if error:
        msg = f"{spec.kind} cannot be enforced: {error}"
        raise ConstraintError(msg)
    return matcher


def _grammar_matcher(source: str, vocabulary: GrammarVocabulary) -> LLMatcher:
    from llguidance import LLMatcher

    source = with_json_blocks(source, _prepared)
    matcher, error = _try_matcher(LLMatcher.grammar_from_lark(source), vocabulary)
    if error:
        other = with_json_blocks(source, _rewritten_if_sound)
        if other != source:
            matcher, error = _try_matcher(LLMatcher.grammar_from_lark(other), vocabulary)
    if error:
        msg = f"grammar cannot be enforced: {error}"
        raise ConstraintError(msg)
    return matcher


def _prepared(schema: Any) -> Any:
    """`schema` without what constrains nothing, and with what is meant besides."""
    return with_discriminators(without_unknown_formats(schema, _KNOWN_FORMATS))


def _rewritten_if_sound(schema: Any) -> Any:
    """`rewritten`, or `schema` itself where it is malformed, for the library to name that."""
    try:
        return rewritten(schema)
    except (TypeError, ValueError, AttributeError):
        return schema


def _schema_matcher(spec: ConstraintSpec, vocabulary: GrammarVocabulary) -> LLMatcher:
    from llguidance import LLMatcher

    def attempt(part: Any) -> tuple[LLMatcher | None, str]:
        if part is False:
            return None, "The schema false allows nothing."
        part = _prepared({} if part is True else part)
        matcher, error = attempt_as_is(part)
        if matcher is not None and not error:
            return matcher, ""
        other = _rewritten_if_sound(part)
        return (matcher, error) if other == part else attempt_as_is(other)

    def attempt_as_is(part: Any) -> tuple[LLMatcher | None, str]:
        text = json.dumps(part, ensure_ascii=False)
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                text, overrides=_WHITESPACE[spec.json_whitespace]
            )
        except ValueError as error:
            return None, _one_line(str(error))
        return _try_matcher(grammar, vocabulary)

    schema = json.loads(spec.source)
    if isinstance(schema, dict) and "x-guidance" in schema:
        msg = "json_schema: $['x-guidance'] is not a keyword here. Use json_whitespace."
        raise ConstraintError(msg)
    matcher, error = attempt(schema)
    if matcher is None or error:
        path, error = find_culprit(schema, lambda part: attempt(part)[1])
        msg = (
            f"json_schema cannot be enforced at {pointer(path)}: {error} Leave the keyword out and "
            "check the answer for it, or write the schema in another way."
        )
        raise ConstraintError(msg)
    return matcher


def _try_matcher(grammar: str, vocabulary: GrammarVocabulary) -> tuple[LLMatcher, str]:
    """A matcher that has made its first mask, and what is wrong with it, or an empty string."""
    from llguidance import LLMatcher, LLParserLimits

    matcher = LLMatcher(
        vocabulary.tokenizer,
        grammar,
        log_level=0,
        limits=LLParserLimits(verbose_errors=False),
    )
    if not matcher.is_error():
        # Builds what the first mask needs here, in the caller's thread, and finds out what is
        # too much for the parser.
        matcher.compute_bitmask()
    if not matcher.is_error():
        return matcher, ""
    return matcher, _one_line(matcher.get_error())


def _one_line(error: str) -> str:
    """The library's message without its picture of the place, as one short sentence."""
    lines = [line for line in error.splitlines() if not _PICTURE.fullmatch(line)]
    text = " ".join(" ".join(lines).split())
    text = text if len(text) <= 400 else text[:397] + "..."
    return text if text.endswith(".") else text + "."


def _as_lark(source: str) -> str:
    """`source` in Lark syntax; EBNF as llama.cpp writes it (GBNF, `root ::= …`) is translated."""
    if "::=" not in source:
        return source
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        lark: str = any_to_lark(source)
    except RecursionError:
        raise
    except Exception as error:  # the translator raises bare exceptions as well as its own
        msg = f'grammar cannot be enforced: {error}. Write rules as in `root ::= "yes" | "no"`.'
        raise ConstraintError(msg) from error
    return lark
