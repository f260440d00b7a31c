"""`AnswerFormat`: how one model is shown tools, and how its answers are read."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from engine.errors import ConfigError, RequestError
from engine.text.call_syntax import CallSyntax
from engine.text.chat_template import ChatTemplate
from engine.text.reasoning import (
    REASONING_MARKS,
    AnswerReader,
    ReasoningSplitter,
    check_reasoning_style,
    choose_reasoning,
)
from engine.text.tool_messages import fitted_messages
from engine.text.tool_parsers import TOOL_PARSERS, choose_tool_parser, make_tool_parser

# What templates call the switch for reasoning: Qwen3, SmolLM3, Gemma 4; Granite, DeepSeek V3.1.
_SWITCHES = ("enable_thinking", "thinking")
_MAX_REMEMBERED = 64
"""Formats that one engine remembers."""
_EFFORTS = ("low", "medium", "high")


class AnswerFormat:
    """The conventions of one chat template. Immutable; any thread may use it.

    Args:
        template: Of the model, or what the caller put in its place.
        model_type: As in the model's config.json.
        tool_parser: A key of `TOOL_PARSERS`, or "auto": chosen by template and model type.
        reasoning_parser: One of `REASONING_STYLES`, or "auto".

    Attributes:
        tool_parser: The parser's name.
        reasoning: The reasoning's style, "none" for a model without.
        markers: Control tokens that must stay in the text of answers, for them to be read.

    Raises:
        ConfigError: A name is unknown.
    """

    def __init__(
        self,
        template: ChatTemplate,
        model_type: str | None = None,
        *,
        tool_parser: str = "auto",
        reasoning_parser: str = "auto",
    ) -> None:
        self._template = template
        self._source = template.all_sources
        is_chosen = tool_parser == "auto"
        chosen = choose_tool_parser(self._source, model_type)
        self.tool_parser = chosen if is_chosen else make_tool_parser(tool_parser, None).name
        if reasoning_parser == "auto":
            self.reasoning = choose_reasoning(self._source)
        else:
            check_reasoning_style(reasoning_parser)
            self.reasoning = reasoning_parser
        self.markers: tuple[str, ...] = TOOL_PARSERS[self.tool_parser].markers
        self._marks = REASONING_MARKS.get(self.reasoning)
        self.markers += self._marks or ()
        self._opens: dict[str, bool] = {}

    # ---------------------------------------------------------------- what the model can do

    @functools.cached_property
    def template_shows_tools(self) -> bool:
        """Whether the model's own template has a place for tools."""
        return self._template.supports_tools

    @property
    def syntax(self) -> CallSyntax | None:
        """How a call is written, if its arguments are JSON."""
        return TOOL_PARSERS[self.tool_parser].syntax

    @property
    def has_reasoning(self) -> bool:
        """Whether the model may think before it answers."""
        return self.reasoning != "none"

    @property
    def effort_levels(self) -> tuple[str, ...]:
        """Efforts that `reasoning=` may name; empty for a model that takes none."""
        return _EFFORTS if "reasoning_effort" in self._template.variables else ()

    @functools.cached_property
    def default_effort(self) -> str | None:
        """The effort that prompts ask for where none is named; None where that is none of them."""
        messages = [{"role": "user", "content": "Hi"}]
        if not self.effort_levels:
            return None
        try:
            plain = self._template.render(messages)
            prompts = {
                effort: self._template.render(messages, reasoning_effort=effort)
                for effort in self.effort_levels
            }
        except RequestError:
            return None
        same = [effort for effort, prompt in prompts.items() if prompt == plain]
        return same[0] if len(same) == 1 else None

    @functools.cached_property
    def shows_late_system_messages(self) -> bool:
        """Whether a system message in the middle of a conversation is shown where it stands."""
        contents = ("first question", "first answer", "late instruction", "second question")
        roles = ("user", "assistant", "system", "user")
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
        try:
            prompt = self._template.render(messages)
        except RequestError:
            return False
        places = [prompt.rfind(content) for content in contents]
        return places[0] >= 0 and places == sorted(places)

    @property
    def reasoning_marks(self) -> tuple[str, str] | None:
        """What begins and what ends the reasoning, where marks do."""
        return self._marks

    def opens_reasoning(self, variables: Mapping[str, Any]) -> bool:
        """Whether prompts made with these template variables end inside the reasoning."""
        if self._marks is None:
            return False
        key = json.dumps(variables, sort_keys=True, default=str)
        known = self._opens.get(key)
        if known is None:
            prompt = self._template.render([{"role": "user", "content": "Hi"}], **variables)
            known = self._opens[key] = self.is_open(prompt)
        return known

    @property
    def needs_control_tokens(self) -> bool:
        """Whether every answer, also one without tools, is markup: gpt-oss."""
        return self.reasoning == "harmony"

    # ---------------------------------------------------------------- prompts

    def fitted(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """A conversation and its tools in the form this template can show.

        Where the template knows no tools, they are described in the system message, calls and
        results become text in the same notation. See `tool_messages`.

        Returns:
            Messages, and the tools to pass to the template; None for none.
        """
        return fitted_messages(
            messages,
            tools,
            source=self._source,
            shows_tools=self.template_shows_tools,
            shows_system=self._template.supports_system_role,
            syntax=self.syntax or TOOL_PARSERS["hermes"].syntax,
        )

    def reasoning_variables(self, reasoning: bool | str | None) -> dict[str, Any]:
        """Template variables that switch the reasoning as asked.

        Args:
            reasoning: True or False, an effort ("low", "medium", "high"), None for the default.

        Raises:
            RequestError: The model has no reasoning to switch on, or no such effort.
        """
        if reasoning is None:
            return {}
        variables = self._template.variables
        if isinstance(reasoning, str):
            if reasoning not in _EFFORTS or "reasoning_effort" not in variables:
                msg = (
                    f"reasoning={reasoning!r}: this model takes "
                    f"{_EFFORTS if 'reasoning_effort' in variables else 'True, False or None'}."
                )
                raise RequestError(msg)
            return {"reasoning_effort": reasoning}
        switch = next((name for name in _SWITCHES if name in variables), None)
        if switch is not None:
            return {switch: reasoning}
        if reasoning and not self.has_reasoning:
            msg = "reasoning=True, but this model's chat template knows no reasoning."
            raise RequestError(msg)
        return {}

    def closes_reasoning(self, reasoning: bool | str | None) -> bool:
        """Whether `closing_text` must end the prompt, because the template has no switch."""
        has_switch = any(name in self._template.variables for name in _SWITCHES)
        return reasoning is False and self.has_reasoning and not has_switch

    def is_open(self, prompt_end: str) -> bool:
        """Whether a prompt that ends so leaves the model inside its reasoning."""
        return self._marks is not None and prompt_end.rstrip().endswith(self._marks[0])

    def closing_text(self, prompt_end: str, *, with_tools: bool) -> str:
        """What to append to the prompt so that the answer begins without reasoning.

        Raises:
            RequestError: gpt-oss cannot call tools without reasoning.
        """
        if self.reasoning == "harmony":
            if with_tools:
                msg = (
                    "This model decides on tool calls in its reasoning: reasoning=False cannot be "
                    "combined with tools. Use reasoning='low'."
                )
                raise RequestError(msg)
            return "<|channel|>final<|message|>"
        assert self._marks is not None, "only called where there is reasoning"
        opener, closer = self._marks
        if prompt_end.rstrip().endswith(closer):
            return ""  # the template has ended it
        return f"\n{closer}\n\n" if self.is_open(prompt_end) else f"{opener}\n\n{closer}\n\n"

    # ---------------------------------------------------------------- answers

    def markers_are_text(self, special_tokens: Collection[str]) -> bool:
        """Whether the markers show in text that comes without control tokens."""
        return not any(marker in special_tokens for marker in self.markers)

    def other_control_tokens(self, special_tokens: Collection[str]) -> re.Pattern[str] | None:
        """Matches the control tokens that are no markers; None for none."""
        others = sorted(set(special_tokens).difference(self.markers), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, others))) if others else None

    def reader(
        self,
        tools: Mapping[str, Mapping[str, Any]] | None,
        *,
        is_open: bool = False,
        tool_parser: str | None = None,
        with_reasoning: bool = True,
    ) -> AnswerReader | None:
        """A reader for one answer; None where there is nothing but text.

        Args:
            tools: Name -> JSON schema of the arguments; None where no calls are expected.
            is_open: The answer begins inside the reasoning; see `is_open`.
            tool_parser: Another parser than the model's own, for this answer.
            with_reasoning: False where the prompt has ended the reasoning already.
        """
        name = tool_parser or self.tool_parser
        splitter = None
        if self._marks is not None and with_reasoning:
            splitter = ReasoningSplitter(self.reasoning, is_open=is_open)
        if tools is None and self.reasoning == "harmony" and with_reasoning:
            tools, name = {}, "harmony"
        if tools is None:
            return None if splitter is None else AnswerReader(splitter, None)
        return AnswerReader(splitter, make_tool_parser(name, tools))


class AnswerFormats:
    """The formats of one model, remembered. Any thread.

    Args:
        model_type: As in `AnswerFormat`.
    """

    def __init__(self, model_type: str | None) -> None:
        self._model_type = model_type
        self._known: dict[tuple[str | None, str, str], AnswerFormat] = {}

    def get(
        self,
        make_template: Callable[[str | None], ChatTemplate],
        chat_template: str | None,
        tool_parser: str,
        reasoning_parser: str,
    ) -> AnswerFormat:
        """The format of a template, made once.

        Args:
            make_template: The chat template of a source; None stands for the model's own.
            chat_template: The source.
            tool_parser: As in `AnswerFormat`.
            reasoning_parser: As in `AnswerFormat`.

        Raises:
            ConfigError: A parser's name is unknown.
            RequestError: There is no chat template.
        """
        key = (chat_template, tool_parser, reasoning_parser)
        known = self._known.get(key)
        if known is None:
            known = AnswerFormat(
                make_template(chat_template),
                self._model_type,
                tool_parser=tool_parser,
                reasoning_parser=reasoning_parser,
            )
            if len(self._known) < _MAX_REMEMBERED:
                self._known[key] = known
        return known


def check_parser_names(tool_parser: str, reasoning_parser: str) -> None:
    """Refuse names that nobody knows, before a model is loaded.

    Raises:
        ConfigError: One of them is unknown.
    """
    if not isinstance(tool_parser, str) or not isinstance(reasoning_parser, str):
        msg = f"tool_parser and reasoning_parser are names, got {(tool_parser, reasoning_parser)}."
        raise ConfigError(msg)
    if tool_parser != "auto":
        make_tool_parser(tool_parser, None)
    if reasoning_parser != "auto":
        check_reasoning_style(reasoning_parser)
