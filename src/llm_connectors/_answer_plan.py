"""`AnswerPlan`: from one call's wishes to prompts, sampling parameters and the reading of answers.

    ToolRequest + AnswerFormat ──┬─► prompts      tools shown, reasoning switched, forced call begun
                                 ├─► params       the constraint that forces the call or the format
                                 └─► AnswerStream reads text, reasoning and calls while they come

A forced call is begun in the prompt: its markup, and the name where only one tool is possible. The
model then writes what is left, under a JSON schema, and the markup is read as if it had written it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine import CallEnd, RequestError, SamplingParams
from llm_connectors._answer_constraint import FREE, AnswerConstraint, answer_constraint
from llm_connectors._call_grammar import Thinking
from llm_connectors._overflow import Conversation, prompt_room, shortened_conversation
from llm_connectors._tool_request import ToolRequest

if TYPE_CHECKING:
    from engine import AnswerFormat, AnswerReader, Engine, Piece

_CONSTRAINTS = ("json_schema", "regex", "choice", "grammar")
_NUM_END_TOKENS = 24
"""Tokens at a prompt's end that are looked at for an opened reasoning block."""


@dataclasses.dataclass(frozen=True, slots=True)
class AnswerOptions:
    """How one call wants its prompts made and its answers read.

    Attributes:
        chat_template: Jinja source instead of the model's own.
        template_kwargs: Variables of the template.
        tool_parser: As in `engine.AnswerFormat`.
        reasoning_parser: As in `engine.AnswerFormat`.
        reasoning: True, False, an effort, or None for the template's default.
        request: Tools and format; None for plain text.
        on_overflow: One of `OVERFLOW_POLICIES`.
    """

    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    reasoning: bool | str | None = None
    request: ToolRequest | None = None
    on_overflow: str = "error"


class AnswerPlan:
    """One call's way through one engine. Immutable; any thread may use it.

    Args:
        engine: Who will answer.
        options: What the call asks for.
        params: Its sampling parameters, without what this plan adds.

    Attributes:
        params: What to submit with.

    Raises:
        RequestError: The wishes contradict each other, or the model cannot fulfil one.
    """

    def __init__(self, engine: Engine, options: AnswerOptions, params: SamplingParams) -> None:
        self._engine = engine
        self._options = options
        self._form: AnswerFormat = engine.answer_format(
            options.chat_template, options.tool_parser, options.reasoning_parser
        )
        self._variables = {
            **self._form.reasoning_variables(options.reasoning),
            **options.template_kwargs,
        }
        self._constraint = self._made_constraint(params)
        self._ends_reasoning = self._form.closes_reasoning(options.reasoning) or (
            self._form.has_reasoning and self._constraint.ends_reasoning
        )
        self.params = self._constrained(params)

    # ---------------------------------------------------------------- prompts

    def encodes_like(self, other: AnswerPlan) -> bool:
        """Whether both make the same prompts, so that one can encode for both."""
        return self is other or (
            self._engine is other._engine
            and self._options == other._options
            and self._constraint.opening == other._constraint.opening
            and self._ends_reasoning == other._ends_reasoning
            and (
                self._options.on_overflow == "error"
                or self.params.max_tokens == other.params.max_tokens
            )
        )

    def encode(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """Token ids of conversations, ready to submit; encoded together.

        Raises:
            RequestError: Messages are malformed, or the template refuses them.
        """
        prompts = self._encode(conversations)
        if self._options.on_overflow == "error":
            return prompts
        room = prompt_room(self._engine, self.params.max_tokens)
        return [
            prompt
            if len(prompt) <= room
            else shortened_conversation(messages, room, lambda kept: self._encode([kept])[0])
            for prompt, messages in zip(prompts, conversations, strict=True)
        ]

    def _encode(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        request = self._options.request
        tools = list(request.tools) if request is not None else None
        shown_tools: Any = None
        fitted: list[Any] = []
        for messages in conversations:
            if tools or any(_has_tools(message) for message in messages):
                messages, shown = self._form.fitted(messages, tools)
                shown_tools = shown or shown_tools
            fitted.append(messages)
        prompts = self._engine.apply_chat_template_batch(
            fitted, tools=shown_tools, chat_template=self._options.chat_template, **self._variables
        )
        if self._ends_reasoning or self._constraint.opening:
            prompts = [prompt + self._begun(prompt) for prompt in prompts]
        return prompts

    def _begun(self, prompt: Sequence[int]) -> list[int]:
        """Tokens of what is already written of the answer."""
        text = self._constraint.opening
        if self._ends_reasoning and not (self._form.needs_control_tokens and text):
            end = self._engine.detokenize(prompt[-_NUM_END_TOKENS:], skip_special_tokens=False)
            request = self._options.request
            text = self._form.closing_text(end, with_tools=self._expects_calls(request)) + text
        return self._engine.tokenize(text, add_special_tokens=False, parse_special=True)

    @staticmethod
    def _expects_calls(request: ToolRequest | None) -> bool:
        return request is not None and bool(request.tools) and request.answer_schema is None

    # ---------------------------------------------------------------- constraints

    def _made_constraint(self, params: SamplingParams) -> AnswerConstraint:
        request = self._options.request
        if request is None or not (request.tools or request.answer_schema is not None):
            return FREE
        given = [name for name in _CONSTRAINTS if getattr(params, name) is not None]
        if given:
            if request.choice != "forced" and request.answer_schema is None:
                return FREE
            msg = (
                f"{given[0]}=… and {'tool_choice' if request.forced else 'response_format'} both "
                "constrain the answer. Give one."
            )
            raise RequestError(msg)
        return answer_constraint(
            self._form,
            self._engine.tokenizer.special_tokens,
            request,
            reasoning=bool(self._options.reasoning),
            thinking=self._thinking(),
        )

    def _thinking(self) -> Thinking | None:
        """The reasoning that may come before what is constrained."""
        marks = self._form.reasoning_marks
        if marks is None or self._options.reasoning is False:
            return None
        variables = {
            name: value
            for name, value in self._variables.items()
            if name != "continue_final_message"
        }
        return Thinking(*marks, is_open=self._form.opens_reasoning(variables))

    def _constrained(self, params: SamplingParams) -> SamplingParams:
        changes: dict[str, Any] = dict(self._constraint.fields)
        if params.skip_special_tokens and self._marks_in_text() and self._needs_reader():
            changes["skip_special_tokens"] = False
        return params.replace(**changes) if changes else params

    # ---------------------------------------------------------------- answers

    def stream(self, prompt_token_ids: Sequence[int]) -> AnswerStream | None:
        """A reader for one answer; None where the answer is plain text.

        Args:
            prompt_token_ids: What the model saw: it may end inside a reasoning block.
        """
        if not self._needs_reader():
            return None
        is_open = False
        if self._form.has_reasoning and not self._ends_reasoning:
            end = self._engine.detokenize(
                prompt_token_ids[-_NUM_END_TOKENS:], skip_special_tokens=False
            )
            is_open = self._form.is_open(end)
        request = self._options.request
        reader = self._form.reader(
            request.schemas if request is not None and request.tools else None,
            is_open=is_open,
            tool_parser=self._constraint.parser_name,
            with_reasoning=not self._ends_reasoning,
        )
        if reader is None:
            return None
        constraint = self._constraint
        opening = constraint.opening if constraint.parser_name is None else ""
        at_most_one = request is not None and request.parallel is False
        return AnswerStream(
            reader, opening, constraint.closing, self._unwanted_tokens(), at_most_one=at_most_one
        )

    def count_tokens(self, text: str) -> int:
        """Tokens of `text` alone."""
        return len(self._engine.tokenize(text, add_special_tokens=False)) if text else 0

    @property
    def cached_block_size(self) -> int | None:
        """Tokens per block of the prefix cache; None where it is off."""
        resolved = self._engine.resolved_config
        return resolved.block_size if resolved.enable_prefix_caching else None

    def _needs_reader(self) -> bool:
        request = self._options.request
        has_tools = request is not None and bool(request.tools)
        return has_tools or (self._form.has_reasoning and not self._ends_reasoning)

    def _marks_in_text(self) -> bool:
        """Whether a mark the reader looks for is a control token, which texts come without."""
        return not self._form.markers_are_text(self._engine.tokenizer.special_tokens)

    def _unwanted_tokens(self) -> re.Pattern[str] | None:
        """Control tokens that came into the text together with the marks."""
        if self.params.skip_special_tokens:
            return None
        return self._form.other_control_tokens(self._engine.tokenizer.special_tokens)


class AnswerStream:
    """Reads one answer, with what the prompt had begun of it. Not thread-safe.

    Args:
        reader: Reads it.
        opening: What the prompt had begun of a call.
        closing: What is left of it once the model has written its part.
        unwanted: Control tokens to leave out of the text.
        at_most_one: Whatever follows a first call is left out.
    """

    def __init__(
        self,
        reader: AnswerReader,
        opening: str,
        closing: str,
        unwanted: re.Pattern[str] | None,
        *,
        at_most_one: bool = False,
    ) -> None:
        self._reader = reader
        self._opening = opening
        self._closing = closing
        self._unwanted = unwanted
        self._at_most_one = at_most_one
        self._has_call = False

    def feed(self, text: str) -> list[Piece]:
        """What the answer's next part makes certain."""
        if self._unwanted is not None:
            text = self._unwanted.sub("", text)
        text, self._opening = self._opening + text, ""
        return self._kept(self._reader.feed(text)) if text else []

    def finish(self, *, is_complete: bool) -> list[Piece]:
        """The rest.

        Args:
            is_complete: The model ended it. Otherwise it was cut off, and a call with it.
        """
        pieces = self.feed(self._closing if is_complete else "")
        return pieces + self._kept(self._reader.finish())

    def _kept(self, pieces: list[Piece]) -> list[Piece]:
        if not self._at_most_one:
            return pieces
        kept: list[Piece] = []
        for piece in pieces:
            if self._has_call:
                break
            kept.append(piece)
            self._has_call = isinstance(piece, CallEnd)
        return kept


def _has_tools(message: Mapping[str, Any]) -> bool:
    return message.get("role") == "tool" or bool(message.get("tool_calls"))
