"""Grammars for answers that may hold tool calls: text is free, a call once begun is held to schema.

In the Lark dialect of llguidance, which `SamplingParams(grammar=…)` takes: a `[lazy]` terminal ends
as soon as it can, so the text before a call ends with the call's opener; `%json` embeds a schema;
`<[5]>` is a control token by its id, which no text can contain.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llm_connectors._schema import call_schema

if TYPE_CHECKING:
    from engine import CallSyntax

_TEXT = r"/(.|\n)*/"
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
Schemas = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class Thinking:
    """Reasoning that may come before what a grammar asks for.

    Attributes:
        opener: What begins it.
        closer: What ends it.
        is_open: The prompt has begun it, so it must be ended.
    """

    opener: str
    closer: str
    is_open: bool


def free_text_grammar(
    syntax: CallSyntax,
    schemas: Schemas,
    control_tokens: Mapping[str, int],
    *,
    at_most_one: bool,
    other_marks: tuple[str, ...] = (),
) -> str:
    """Text with calls in it: any text, and arguments that fit once a call has begun.

    Args:
        syntax: How the model writes calls; its calls are JSON objects.
        schemas: Name -> schema of the arguments.
        control_tokens: Of the tokenizer.
        at_most_one: The answer ends after a first call.
        other_marks: Marks, of reasoning for instance, that may be control tokens in the text.
    """
    rules = _Rules(control_tokens, other_marks, at_most_one=at_most_one)
    call = rules.call(syntax, schemas)
    start = f"{call} | text" if at_most_one else f"({call})* text"
    return rules.grammar(start)


def answer_grammar(
    schema: Mapping[str, Any], control_tokens: Mapping[str, int], thinking: Thinking
) -> str:
    """Reasoning, then JSON that fits `schema`."""
    return _Rules(control_tokens).grammar(_json(schema), thinking)


def forced_call_grammar(
    syntax: CallSyntax,
    schemas: Schemas,
    control_tokens: Mapping[str, int],
    thinking: Thinking,
    *,
    is_list: bool,
) -> str:
    """Reasoning, then a call to one of the tools, or one and more with `is_list`."""
    rules = _Rules(control_tokens, at_most_one=not is_list)
    call = rules.bare_call(syntax, schemas)
    many = is_list and not rules.is_list(syntax)
    return rules.grammar(f"{call} ({rules.space} {call})*" if many else call, thinking)


def call_or_answer_grammar(
    syntax: CallSyntax,
    schemas: Schemas,
    answer: Mapping[str, Any],
    control_tokens: Mapping[str, int],
    *,
    at_most_one: bool,
    thinking: Thinking | None = None,
) -> str:
    """Either tool calls or the final answer as JSON, nothing else but reasoning before it.

    Args:
        syntax: As in `free_text_grammar`, like the other arguments.
        schemas: Name -> schema of the arguments.
        answer: Schema of the final answer.
        control_tokens: Of the tokenizer.
        at_most_one: One call, or the answer.
        thinking: Reasoning that may come first.
    """
    rules = _Rules(control_tokens, at_most_one=at_most_one)
    call = rules.bare_call(syntax, schemas)
    calls = call if at_most_one or rules.is_list(syntax) else f"{call} ({rules.space} {call})*"
    return rules.grammar(f"({calls}) | {_json(answer)}", thinking)


class _Rules:
    """Puts a grammar together."""

    space = "SPACE?"

    def __init__(
        self,
        control_tokens: Mapping[str, int],
        other_marks: tuple[str, ...] = (),
        *,
        at_most_one: bool = False,
    ) -> None:
        self._ids = control_tokens
        self._at_most_one = at_most_one
        self._others = [
            f"<[{control_tokens[mark]}]>" for mark in other_marks if mark in control_tokens
        ]
        self._lines: list[str] = []

    def grammar(self, start: str, thinking: Thinking | None = None) -> str:
        """The whole text."""
        if thinking is not None:
            start = f"{self._thinking(thinking)} ({start})"
        others = "".join(f" | {other}" for other in self._others)
        text = f"(TEXT{others})*" if others else "TEXT"
        lines = [
            "%llguidance {}",
            f"start: {start}",
            f"text: {text}",
            f"TEXT: {_TEXT}",
            r"SPACE: /[ \n]{1,2}/",
            *self._lines,
        ]
        return "\n".join(lines) + "\n"

    @staticmethod
    def is_list(syntax: CallSyntax) -> bool:
        """Whether all calls of an answer stand in one JSON list."""
        return bool(syntax.begin)

    def call(self, syntax: CallSyntax, schemas: Schemas) -> str:
        """Text up to a call, and the call."""
        opener = syntax.opener.strip()
        if not opener:
            # Nothing marks a call but the way it begins.
            head = self._head(syntax.before_name)
            names = [
                f"{_quoted(name + syntax.after_name)} {_json(schema)}"
                for name, schema in schemas.items()
            ]
            return f"{head} ({' | '.join(names)}) {_quoted(syntax.after_arguments)}"
        return f"{self._head(opener)} {self._body(syntax, schemas)}"

    def bare_call(self, syntax: CallSyntax, schemas: Schemas) -> str:
        """A call without text before it."""
        opener = syntax.opener.strip()
        return f"{self._sequence(opener)} {self._body(syntax, schemas)}".strip()

    def _thinking(self, thinking: Thinking) -> str:
        """The reasoning up to its end, or nothing where it need not be."""
        closer = thinking.closer
        if closer in self._ids:
            end = f"TEXT <[{self._ids[closer]}]>"
        else:
            self._lines.append(f"thought[lazy]: TEXT {_quoted(closer)}")
            end = "thought"
        if thinking.is_open:
            return f"{end} {self.space}"
        return f"({self.space} {self._sequence(thinking.opener)} {end} {self.space})?"

    def _body(self, syntax: CallSyntax, schemas: Schemas) -> str:
        calls = call_schema(
            schemas,
            syntax.arguments_key,
            is_list=self.is_list(syntax),
            at_most_one=self._at_most_one,
        )
        closer = self._sequence(syntax.closer.strip())
        return f"{self.space} {_json(calls)} {self.space if closer else ''} {closer}".rstrip()

    def _head(self, opener: str) -> str:
        """Any text that ends with `opener`."""
        if opener in self._ids:
            return f"text <[{self._ids[opener]}]>"
        self._lines.append(f"head[lazy]: TEXT {_quoted(opener)}")
        others = "".join(f" | {other}" for other in self._others)
        return f"(TEXT{others})* head" if others else "head"

    def _sequence(self, text: str) -> str:
        """`text` with its control tokens as such."""
        if not text:
            return ""
        if text in self._ids:
            return f"<[{self._ids[text]}]>"
        return _quoted(text)


def _json(schema: Mapping[str, Any]) -> str:
    """JSON that fits `schema`."""
    return "%json " + json.dumps({**schema, "x-guidance": _SPACING}, ensure_ascii=False)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
