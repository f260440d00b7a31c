"""`with_structured_output`: schemas of every kind, and the answers parsed back into them."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, cast

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import (
    BaseOutputParser,
    JsonOutputKeyToolsParser,
    JsonOutputParser,
    PydanticOutputParser,
    PydanticToolsParser,
)
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_core.runnables.utils import AddableDict
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import TypeAdapter, ValidationError
from typing_extensions import override

from engine import RequestError
from llm_connectors.langchain._tools import openai_tools

METHODS = ("json_schema", "function_calling", "json_mode")
"""Ways of asking for a schema. The answer is held to it by every one of them."""

Parser = Runnable[Any, Any]


def response_format(schema: Any, *, strict: bool | None = None) -> dict[str, Any]:
    """A schema of any kind as the `response_format` of a call.

    Raises:
        RequestError: It cannot be described as a JSON schema.
    """
    function = openai_tools([schema], strict)[0]["function"]
    inner = {"name": function["name"], "schema": function.get("parameters") or {"type": "object"}}
    if strict is not None:
        inner["strict"] = strict
    return {"type": "json_schema", "json_schema": inner}


def traced_schema(schema: Any) -> Any:
    """A schema in a form that LangChain's traces can describe."""
    is_dataclass = dataclasses.is_dataclass(schema)
    return openai_tools([cast("type", schema)])[0] if is_dataclass else schema


def parser_of_answer(schema: Any) -> Parser:
    """Reads an answer that is JSON: into the class, or a dict where `schema` is no class."""
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return PydanticOutputParser(pydantic_object=schema)
    as_dict: BaseOutputParser[Any] = JsonOutputParser()
    if dataclasses.is_dataclass(schema):
        return as_dict | RunnableLambda(_into(cast("type", schema)))
    return as_dict


def parser_of_call(schema: Any) -> Parser:
    """Reads the arguments of the one call in an answer."""
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return PydanticToolsParser(tools=[schema], first_tool_only=True)
    name = openai_tools([schema])[0]["function"]["name"]
    as_dict = JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
    if dataclasses.is_dataclass(schema):
        return as_dict | RunnableLambda(_into(cast("type", schema)))
    return as_dict


def _into(cls: type) -> Callable[[Any], Any]:
    adapter: TypeAdapter[Any] = TypeAdapter(cls)

    def build(values: Any) -> Any:
        try:
            return adapter.validate_python(values)
        except ValidationError as error:
            msg = f"The answer does not fit {cls.__name__}: {error}"
            raise OutputParserException(msg) from error

    return build


def check_method(method: Any, schema: Any) -> None:
    """Refuse a method nobody knows, or one that needs a schema without one.

    Raises:
        RequestError: Either is the case.
    """
    if method not in METHODS:
        msg = f"method={method!r} is unknown; there are {', '.join(METHODS)}."
        raise RequestError(msg)
    if schema is None and method != "json_mode":
        msg = f"method={method!r} needs a schema. Only method='json_mode' works without one."
        raise RequestError(msg)
    if schema is not None and not isinstance(schema, Mapping | type):
        msg = f"schema is {type(schema).__name__}; pass a class or a JSON schema as a dict."
        raise RequestError(msg)


class RawAndParsed(Runnable[LanguageModelInput, dict[str, Any]]):
    """A model's message and what was parsed out of it, with lists passed on as lists.

    LangChain's own composition calls the model once per input, from threads.

    Args:
        model: The bound model.
        parser: Reads its messages.
    """

    def __init__(self, model: Runnable[LanguageModelInput, AIMessage], parser: Parser) -> None:
        self._model = model
        self._parser = parser

    @override
    def invoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The message ("raw"), the parsed value or None, and the parsing error or None."""
        return self._parsed(self._model.invoke(input, config, **kwargs))

    @override
    async def ainvoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """`invoke`, awaited."""
        return self._parsed(await self._model.ainvoke(input, config, **kwargs))

    @override
    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """One list to the model, so one batch on the engine."""
        messages = self._model.batch(inputs, config, return_exceptions=return_exceptions, **kwargs)
        return [self._parsed_or_error(message) for message in messages]

    @override
    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """`batch`, awaited."""
        messages = await self._model.abatch(
            inputs, config, return_exceptions=return_exceptions, **kwargs
        )
        return [self._parsed_or_error(message) for message in messages]

    @override
    def stream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[dict[str, Any]]:
        """What is known so far: the message grows, the parsed value comes with its end."""
        message: Any = None
        for chunk in self._model.stream(input, config, **kwargs):
            message = chunk if message is None else message + chunk
            yield AddableDict(raw=chunk)
        parsed = self._parsed(message)
        yield AddableDict(parsed=parsed["parsed"], parsing_error=parsed["parsing_error"])

    @override
    async def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[dict[str, Any]]:
        """`stream` for an event loop."""
        message: Any = None
        async for chunk in self._model.astream(input, config, **kwargs):
            message = chunk if message is None else message + chunk
            yield AddableDict(raw=chunk)
        parsed = self._parsed(message)
        yield AddableDict(parsed=parsed["parsed"], parsing_error=parsed["parsing_error"])

    def _parsed_or_error(self, message: Any) -> Any:
        """An error that stands in a message's place stays there."""
        return message if isinstance(message, BaseException) else self._parsed(message)

    def _parsed(self, message: AIMessage) -> dict[str, Any]:
        try:
            parsed = self._parser.invoke(message)
        except Exception as error:
            return {"raw": message, "parsed": None, "parsing_error": error}
        return {"raw": message, "parsed": parsed, "parsing_error": None}
