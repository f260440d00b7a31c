"""Tools and structured output of `ChatLocal`: bound once, checked, and cheap to bind again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from pydantic import BaseModel
from typing_extensions import override

from engine import RequestError
from llm_connectors._answer_plan import AnswerOptions
from llm_connectors._tool_request import ToolRequest, tool_request
from llm_connectors.langchain._chat_streams import ChatStreams
from llm_connectors.langchain._tools import openai_tools
from llm_connectors.langchain.errors import LANGCHAIN_ERRORS
from llm_connectors.langchain.structured_output import (
    RawAndParsed,
    check_method,
    parser_of_answer,
    parser_of_call,
    response_format,
    traced_schema,
)

_REQUEST_NAMES = ("tools", "tool_choice", "parallel_tool_calls", "response_format", "strict")
_OLD_NAMES = {"functions": "tools", "function_call": "tool_choice"}


class ChatTools(ChatStreams):
    """`bind_tools` and `with_structured_output`, and what calls make of them."""

    @override
    def _answer_options(self, given: dict[str, Any], own: Mapping[str, Any]) -> AnswerOptions:
        for name, newer in _OLD_NAMES.items():
            if given.pop(name, None) is not None:
                msg = f"{name}=… is the name of an API that is gone. Use {newer}=…."
                raise RequestError(msg)
        asked = {name: given.pop(name) for name in _REQUEST_NAMES if name in given}
        return AnswerOptions(
            chat_template=own["chat_template"],
            template_kwargs=own["chat_template_kwargs"],
            tool_parser=own["tool_parser"],
            reasoning_parser=own["reasoning_parser"],
            reasoning=own["reasoning"],
            request=_request(asked) if asked else None,
            on_overflow=own["on_overflow"],
        )

    @override
    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        response_format: Any = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """This model with tools to call.

        The tools are shown through the model's own chat template, or described in the system
        message where the template has no place for them. Binding the same tools again costs
        microseconds.

        Args:
            tools: LangChain tools, functions, Pydantic and TypedDict classes, dataclasses, dicts.
            tool_choice: None or "auto": the model decides. "any", "required" or True: it must call
                one, held to the tool's schema. A tool's name, or a dict with one: it must call
                that. "none": it is shown none.
            strict: False leaves the arguments of calls that the model makes by itself
                unconstrained. Otherwise they are held to the tool's schema.
            parallel_tool_calls: False: one call at most. True: a forced answer may have several.
            response_format: Schema of the final answer, which the model gives when it calls none.
            **kwargs: Further options of the calls.

        Raises:
            RequestError: A tool cannot be described, two have one name, or the choice names none.
        """
        with LANGCHAIN_ERRORS.converting():
            bound: dict[str, Any] = {"tools": openai_tools(tools, strict)}
            if tool_choice is not None:
                bound["tool_choice"] = tool_choice
            if parallel_tool_calls is not None:
                bound["parallel_tool_calls"] = parallel_tool_calls
            if strict is not None:
                bound["strict"] = strict
            if response_format is not None:
                bound["response_format"] = _as_dict(response_format)
            _request(bound)
        return self.bind(**bound, **kwargs)

    @override
    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """This model with answers in a schema, which it cannot leave.

        Args:
            schema: A Pydantic class (v1 or v2), a dataclass, a TypedDict, a JSON schema, an OpenAI
                function. Classes give instances (a TypedDict: a dict), schemas give dicts.
            method: "json_schema": the answer is the JSON. "function_calling": it is the arguments
                of one forced call, so the model is shown the schema. "json_mode": as "json_schema",
                and without a schema any JSON object.
            include_raw: Return `{"raw": message, "parsed": …, "parsing_error": …}`.
            strict: Accepted: the schema is always kept.
            **kwargs: Further options of the calls, such as `temperature`.

        Raises:
            RequestError: The method is unknown or the schema cannot be described.
        """
        with LANGCHAIN_ERRORS.converting():
            check_method(method, schema)
            traced = {
                "kwargs": {"method": method, "strict": strict},
                "schema": None if schema is None else traced_schema(schema),
            }
            if schema is not None:
                kwargs["ls_structured_output_format"] = traced
            if method == "function_calling":
                tools = openai_tools([schema], strict)  # type: ignore[list-item]
                name = tools[0]["function"]["name"]
                model = self.bind_tools(tools, tool_choice=name, **kwargs)
                parser = parser_of_call(schema)
            else:
                wanted = (
                    {"type": "json_object"}
                    if schema is None
                    else response_format(schema, strict=strict)
                )
                _request({"response_format": wanted, "strict": strict})
                model = self.bind(response_format=wanted, **kwargs)
                parser = parser_of_answer(schema)
        return RawAndParsed(model, parser) if include_raw else model | parser


def _request(asked: Mapping[str, Any]) -> ToolRequest | None:
    """The checked form of a call's keywords about tools and format."""
    tools = asked.get("tools")
    return tool_request(
        None if tools is None else openai_tools(tools),
        asked.get("tool_choice"),
        asked.get("parallel_tool_calls"),
        _as_dict(asked.get("response_format")),
        asked.get("strict"),
    )


def _as_dict(wanted: Any) -> Mapping[str, Any] | None:
    """A call's `response_format` as a dict: classes become their schema."""
    if wanted is None or isinstance(wanted, Mapping):
        return wanted
    return response_format(wanted)
