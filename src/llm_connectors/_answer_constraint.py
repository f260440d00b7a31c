"""`AnswerConstraint`: what a `ToolRequest` holds a model's answers to. Made once, remembered."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llm_connectors._call_grammar import (
    Thinking,
    answer_grammar,
    call_or_answer_grammar,
    forced_call_grammar,
    free_text_grammar,
)
from llm_connectors._schema import call_or_answer_schema, call_schema, schema_text
from llm_connectors._tool_request import ToolRequest

if TYPE_CHECKING:
    from engine import AnswerFormat, CallSyntax

_MAX_REMEMBERED = 256


@dataclasses.dataclass(frozen=True, slots=True)
class AnswerConstraint:
    """How an answer is made to fit.

    Attributes:
        fields: Of `SamplingParams`; empty where the answer is free.
        opening: What the prompt has begun of a forced call.
        closing: What is left of it once the model has written its part.
        parser_name: Another tool parser than the model's own reads the answer.
        ends_reasoning: The prompt must end the reasoning, because the answer starts at once.
    """

    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    opening: str = ""
    closing: str = ""
    parser_name: str | None = None
    ends_reasoning: bool = False


FREE = AnswerConstraint()
"""The constraint of an answer that may be anything."""

_lock = threading.Lock()
_known: OrderedDict[Any, tuple[Any, AnswerConstraint]] = OrderedDict()


def answer_constraint(
    form: AnswerFormat,
    control_tokens: Mapping[str, int],
    request: ToolRequest,
    *,
    reasoning: bool,
    thinking: Thinking | None,
) -> AnswerConstraint:
    """The constraint of a request, for a model.

    Args:
        form: How the model writes calls.
        control_tokens: Of its tokenizer.
        request: Tools and format.
        reasoning: It was asked to think, so a forced call comes after its thoughts.
        thinking: Reasoning that may come first; None where there is none.

    Raises:
        ConstraintError: A schema is no JSON.
    """
    key = (id(form), id(request), reasoning, thinking)
    with _lock:
        entry = _known.get(key)
    if entry is not None:
        return entry[1]
    made = _Maker(form, control_tokens, request, thinking).make(reasoning=reasoning)
    with _lock:
        # The objects are kept, so that their ids cannot become others'.
        _known[key] = ((form, request), made)
        if len(_known) > _MAX_REMEMBERED:
            _known.popitem(last=False)
    return made


class _Maker:
    """Makes one constraint."""

    def __init__(
        self,
        form: AnswerFormat,
        control_tokens: Mapping[str, int],
        request: ToolRequest,
        thinking: Thinking | None,
    ) -> None:
        self._form = form
        self._control_tokens = control_tokens
        self._request = request
        self._thinking = thinking
        syntax = form.syntax
        self._objects = syntax if syntax is not None and syntax.is_object else None

    def make(self, *, reasoning: bool) -> AnswerConstraint:
        if self._request.choice == "forced":
            return self._forced_call(self._thinking if reasoning else None)
        if self._request.answer_schema is not None:
            return self._final_answer(self._request.answer_schema)
        return self._free_text()

    def _free_text(self) -> AnswerConstraint:
        """Text with calls in it, whose arguments must fit."""
        if self._objects is None or self._request.strict is False or not self._request.tools:
            return FREE
        grammar = free_text_grammar(
            self._objects,
            self._request.schemas,
            self._control_tokens,
            at_most_one=self._request.parallel is False,
            other_marks=self._form.reasoning_marks or (),
        )
        return AnswerConstraint({"grammar": grammar})

    def _final_answer(self, schema: Mapping[str, Any]) -> AnswerConstraint:
        """JSON in a schema, or a call where there are tools."""
        has_tools = bool(self._request.tools)
        if has_tools and self._objects is not None:
            grammar = call_or_answer_grammar(
                self._objects,
                self._request.schemas,
                schema,
                self._control_tokens,
                at_most_one=self._request.parallel is False,
                thinking=self._thinking,
            )
            return AnswerConstraint({"grammar": grammar}, ends_reasoning=self._thinking is None)
        if self._thinking is not None and not has_tools:
            grammar = answer_grammar(schema, self._control_tokens, self._thinking)
            return AnswerConstraint({"grammar": grammar})
        if has_tools:
            # A call without markup, so that both are JSON.
            schema = call_or_answer_schema(self._request.schemas, schema)
        text = schema_text(schema, "The schema of response_format")
        parser_name = "json" if has_tools else None
        return AnswerConstraint({"json_schema": text}, parser_name=parser_name, ends_reasoning=True)

    def _forced_call(self, thinking: Thinking | None) -> AnswerConstraint:
        schemas, is_list = self._request.forced_schemas, bool(self._request.parallel)
        if thinking is not None and self._objects is not None:
            grammar = forced_call_grammar(
                self._objects, schemas, self._control_tokens, thinking, is_list=is_list
            )
            return AnswerConstraint({"grammar": grammar})
        syntax = self._form.syntax
        if len(schemas) == 1 and not is_list and syntax is not None:
            ((name, schema),) = schemas.items()
            return AnswerConstraint(
                {"json_schema": schema_text(schema, f"The schema of tool {name!r}")},
                opening=syntax.trigger + name + syntax.after_name,
                closing=syntax.after_arguments + syntax.end,
                ends_reasoning=True,
            )
        if self._objects is not None:
            opening, closing = _around(self._objects, is_list=is_list)
            key, parser_name = self._objects.arguments_key, None
        else:
            # The family writes no JSON: the call is forced into a form that is read as well.
            opening = "<|channel|>final<|message|>" if self._form.needs_control_tokens else ""
            closing, key, parser_name = "", "arguments", "json"
        text = schema_text(call_schema(schemas, key, is_list=is_list), "The schema of the tools")
        return AnswerConstraint({"json_schema": text}, opening, closing, parser_name, True)


def _around(syntax: CallSyntax, *, is_list: bool) -> tuple[str, str]:
    """What stands before and behind the JSON of one call, or of a list of them."""
    if is_list or not syntax.begin:
        return syntax.opener, syntax.closer
    return syntax.opener + "[", "]" + syntax.closer
