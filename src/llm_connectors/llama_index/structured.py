"""`LocalLLM`'s four structured methods, by decoding that cannot leave the schema."""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Generator
from typing import Any, TypeVar

from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock
from llama_index.core.instrumentation.events.llm import (
    LLMStructuredPredictEndEvent,
    LLMStructuredPredictStartEvent,
)
from llama_index.core.output_parsers import PydanticOutputParser
from llama_index.core.program import LLMTextCompletionProgram
from llama_index.core.program.utils import create_flexible_model
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.types import BasePydanticProgram, PydanticProgramMode
from llama_index_instrumentation import get_dispatcher
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from llm_connectors._schema import schema_text
from llm_connectors.llama_index.errors import ERRORS, RequestError, StructuredOutputError
from llm_connectors.llama_index.tool_calling import ToolCalling

dispatcher = get_dispatcher(__name__)
Model = TypeVar("Model", bound=BaseModel)

_INSTRUCTION = "Answer with JSON that fits this JSON schema, and nothing else:\n"


class StructuredOutput(ToolCalling):
    """The part of `LocalLLM` that answers with objects of a class.

    `structured_mode` says how they are asked for. Only where `pydantic_program_mode` is set to
    something else than its default, LlamaIndex's program of that name is used.
    """

    @dispatcher.span
    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """An object of `output_cls`, filled in by the model.

        Args:
            output_cls: A Pydantic class.
            prompt: What to ask. `system_prompt` is added.
            llm_kwargs: Options of the call.
            **prompt_args: Variables of the prompt.

        Raises:
            StructuredOutputError: The answer was cut off by `max_tokens`, or a validator of the
                class, which no schema can express, refuses it.
            ConstraintError: The schema of the class cannot be enforced.
        """
        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT:
            found = super().structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
            return self._checked(output_cls, found)
        self._announce(output_cls, prompt, prompt_args)
        if self.structured_mode == "text":
            found = self._program(output_cls, prompt)(llm_kwargs=llm_kwargs, **prompt_args)
            result = self._checked(output_cls, found)
        elif self.metadata.is_chat_model:
            messages, call = self._asked(output_cls, prompt, prompt_args, llm_kwargs)
            result = self._parsed(output_cls, self.chat(messages, **call))
        else:
            text, call = self._asked_as_text(output_cls, prompt, prompt_args, llm_kwargs)
            result = self._parsed(output_cls, self.complete(text, formatted=True, **call))
        dispatcher.event(LLMStructuredPredictEndEvent(output=result))
        return result

    @dispatcher.span
    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """`structured_predict`, awaited."""
        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT:
            found = await super().astructured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
            return self._checked(output_cls, found)
        await self._aengine()
        self._announce(output_cls, prompt, prompt_args)
        if self.structured_mode == "text":
            program = self._program(output_cls, prompt)
            found = await program.acall(llm_kwargs=llm_kwargs, **prompt_args)
            result = self._checked(output_cls, found)
        elif self.metadata.is_chat_model:
            messages, call = self._asked(output_cls, prompt, prompt_args, llm_kwargs)
            result = self._parsed(output_cls, await self.achat(messages, **call))
        else:
            text, call = self._asked_as_text(output_cls, prompt, prompt_args, llm_kwargs)
            result = self._parsed(output_cls, await self.acomplete(text, formatted=True, **call))
        dispatcher.event(LLMStructuredPredictEndEvent(output=result))
        return result

    def _structured_stream_call(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Any, None, None]:
        """What `stream_structured_predict` yields: objects that fill up, the last one whole."""
        if not self._streams_json:
            yield from self._text_program(output_cls, prompt).stream_call(
                llm_kwargs=llm_kwargs, **prompt_args
            )
            return
        if self.metadata.is_chat_model:
            messages, call = self._asked(output_cls, prompt, prompt_args, llm_kwargs)
            chunks: Any = self.stream_chat(messages, **call)
        else:
            text, call = self._asked_as_text(output_cls, prompt, prompt_args, llm_kwargs)
            chunks = self.stream_complete(text, formatted=True, **call)
        growing = _GrowingObject(output_cls)
        last = None
        for last in chunks:
            partial = growing.update(_json_text(last)) if last.raw is None else None
            if partial is not None:
                yield partial
        yield self._parsed(output_cls, last)

    async def _structured_astream_call(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Any, None]:
        """`_structured_stream_call` as an async generator."""
        await self._aengine()
        if not self._streams_json:
            program = self._text_program(output_cls, prompt)
            stream: AsyncGenerator[Any, None] = await program.astream_call(
                llm_kwargs=llm_kwargs, **prompt_args
            )
            return stream
        if self.metadata.is_chat_model:
            messages, call = self._asked(output_cls, prompt, prompt_args, llm_kwargs)
            chunks: Any = await self.astream_chat(messages, **call)
        else:
            text, call = self._asked_as_text(output_cls, prompt, prompt_args, llm_kwargs)
            chunks = await self.astream_complete(text, formatted=True, **call)

        async def objects() -> AsyncGenerator[Any, None]:
            growing = _GrowingObject(output_cls)
            last = None
            async for last in chunks:
                partial = growing.update(_json_text(last)) if last.raw is None else None
                if partial is not None:
                    yield partial
            yield self._parsed(output_cls, last)

        return objects()

    # ------------------------------------------------------------------ asking

    @property
    def _streams_json(self) -> bool:
        is_default = self.pydantic_program_mode == PydanticProgramMode.DEFAULT
        return is_default and self.structured_mode != "text"

    def _asked(
        self,
        output_cls: type[BaseModel],
        prompt: BasePromptTemplate,
        prompt_args: dict[str, Any],
        llm_kwargs: dict[str, Any] | None,
    ) -> tuple[list[ChatMessage], dict[str, Any]]:
        """Messages and options of the chat that is answered by the object."""
        messages = self._get_messages(prompt, **prompt_args)
        schema = _schema(output_cls)
        if self.structured_mode == "tool":
            function = {
                "name": output_cls.__name__,
                "description": (output_cls.__doc__ or "").strip(),
                "parameters": schema,
            }
            call: dict[str, Any] = {"parallel_tool_calls": False}
            call["tools"] = [{"type": "function", "function": function}]
            call["tool_choice"] = output_cls.__name__
            return messages, {**(llm_kwargs or {}), **call}
        role = self.metadata.system_role
        call = {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
        return _with_instruction(messages, _instruction(schema), role), {
            **(llm_kwargs or {}),
            **call,
        }

    def _asked_as_text(
        self,
        output_cls: type[BaseModel],
        prompt: BasePromptTemplate,
        prompt_args: dict[str, Any],
        llm_kwargs: dict[str, Any] | None,
    ) -> tuple[str, dict[str, Any]]:
        """The same for a model without a chat template, which takes no tools."""
        if self.structured_mode == "tool":
            msg = "structured_mode='tool' needs a model with a chat template. Use 'schema'."
            raise RequestError(msg)
        schema = _schema(output_cls)
        text = f"{_instruction(schema)}\n\n{self._get_prompt(prompt, **prompt_args)}"
        call = {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
        return text, {**(llm_kwargs or {}), **call}

    def _program(
        self, output_cls: type[Model], prompt: BasePromptTemplate
    ) -> BasePydanticProgram[Model]:
        # A copy: the program writes its output parser into the prompt, which others may share.
        return LLMTextCompletionProgram.from_defaults(
            output_parser=PydanticOutputParser(output_cls=output_cls),
            prompt=copy.deepcopy(prompt),
            llm=self,
        )

    def _text_program(
        self, output_cls: type[Model], prompt: BasePromptTemplate
    ) -> BasePydanticProgram[Model]:
        if self.pydantic_program_mode == PydanticProgramMode.DEFAULT:
            return self._program(output_cls, prompt)
        from llama_index.core.program.utils import get_program_for_llm

        program: BasePydanticProgram[Model] = get_program_for_llm(
            output_cls,
            copy.deepcopy(prompt),
            self,
            pydantic_program_mode=self.pydantic_program_mode,
        )
        return program

    @staticmethod
    def _announce(
        output_cls: type[BaseModel], prompt: BasePromptTemplate, prompt_args: dict[str, Any]
    ) -> None:
        dispatcher.event(
            LLMStructuredPredictStartEvent(
                output_cls=output_cls, template=prompt, template_args=prompt_args
            )
        )

    # ------------------------------------------------------------------ reading

    def _parsed(self, output_cls: type[Model], response: Any) -> Model:
        text = _json_text(response)
        try:
            return output_cls.model_validate_json(text)
        except ValidationError as error:
            reason = response.raw["finish_reason"]
            why = (
                f"it was cut off by max_tokens={self.max_tokens}; raise it"
                if reason == "length"
                else f"{error}"
            )
            msg = f"The answer is no {output_cls.__name__}: {why}. It was: {text[:500]!r}"
            raise StructuredOutputError(msg) from error

    @staticmethod
    def _checked(output_cls: type[Model], found: Any) -> Model:
        if isinstance(found, output_cls):
            return found
        msg = f"The answer is a {type(found).__name__}, no {output_cls.__name__}: {found!r}"
        raise StructuredOutputError(msg)


class _GrowingObject:
    """Objects of a class that allows missing fields, from JSON that is being written."""

    def __init__(self, output_cls: type[BaseModel]) -> None:
        self._flexible_cls = create_flexible_model(output_cls)
        self._last: Any = None

    def update(self, text: str) -> BaseModel | None:
        """The object so far; None where nothing new can be read."""
        try:
            value = from_json(text, allow_partial="trailing-strings")
        except ValueError:
            return None
        if not isinstance(value, dict) or value == self._last:
            return None
        self._last = value
        partial: BaseModel = self._flexible_cls.model_validate(value)
        return partial


def _json_text(response: Any) -> str:
    """The object's JSON, from the arguments of a call or from the text."""
    message = getattr(response, "message", None)
    if message is None:
        return str(response.text)
    for call in message.additional_kwargs.get("tool_calls") or []:
        return str(call["function"]["arguments"])
    return message.content or ""


def _schema(output_cls: type[BaseModel]) -> dict[str, Any]:
    try:
        return output_cls.model_json_schema()
    except Exception as error:
        msg = f"{output_cls.__name__} has no JSON schema: {error}"
        raise RequestError(msg) from error


def _instruction(schema: dict[str, Any]) -> str:
    with ERRORS.converting():
        return _INSTRUCTION + schema_text(schema, "The schema of the class")


def _with_instruction(
    messages: list[ChatMessage], instruction: str, role: MessageRole
) -> list[ChatMessage]:
    """`instruction` ahead of the conversation, where all questions of one class share it.

    It ends the system message, or is one, or begins the first message where there can be none.
    """
    first = messages[0]
    is_system = first.role == MessageRole.SYSTEM
    if role == MessageRole.SYSTEM and not is_system:
        return [ChatMessage(role=MessageRole.SYSTEM, content=instruction), *messages]
    block = TextBlock(text=f"\n{instruction}" if is_system else f"{instruction}\n")
    blocks = [*first.blocks, block] if is_system else [block, *first.blocks]
    return [first.model_copy(update={"blocks": blocks}), *messages[1:]]
