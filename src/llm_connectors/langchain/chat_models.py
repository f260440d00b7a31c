"""`ChatLocal`: a LangChain chat model over the in-process engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from langchain_core.callbacks import (
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForLLMRun,
)
from langchain_core.language_models import LangSmithParams, LanguageModelInput
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config
from langchain_core.tools import BaseTool
from pydantic import Field, model_validator
from typing_extensions import override

from engine import check_parser_names
from llm_connectors.langchain._chat_runs import ChatListCall
from llm_connectors.langchain._chat_tools import ChatTools
from llm_connectors.langchain._messages import to_conversation
from llm_connectors.langchain._outputs import chat_result
from llm_connectors.langchain._tools import openai_tools
from llm_connectors.langchain.errors import LANGCHAIN_ERRORS

if TYPE_CHECKING:
    from engine import Engine


class ChatLocal(ChatTools):
    """A chat model that runs in this process, with every way of calling it served natively.

    Making one loads nothing: the model is loaded at the first call, or by `load`, and shared by
    all objects in the process that name it with the same engine options.

        chat = ChatLocal(model="smollm2-135m", temperature=0.2)
        chat.invoke("Why is the sky blue?").content
        chat.batch(["One", "list", "is", "one", "batch", "on", "the", "GPU"])
        async for chunk in chat.astream("Tell me a story"): ...

    All sampling options are fields, keywords of every call, and work with `bind` and
    `configurable_fields`. Unknown names raise.

        chat.bind_tools([get_weather]).invoke("Weather in Oslo?").tool_calls
        chat.with_structured_output(Person).batch(documents)

    Raises:
        pydantic.ValidationError: A name is unknown or a value is bad.
    """

    chat_template: str | None = None
    """Jinja source to use instead of the model's own template."""

    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the template, such as `enable_thinking`, and `continue_final_message`."""

    tool_parser: str = "auto"
    """How tool calls are written: "hermes", "llama3_json", "pythonic", "mistral", "granite",
    "phi4", "gemma", "harmony", "deepseek", "qwen_xml" or "json"; "auto" asks the template."""

    reasoning: bool | str | None = None
    """Think before the answer: True or False, an effort ("low", "medium", "high") where the model
    takes one, None for the template's default. What was thought is in `reasoning_content`."""

    reasoning_parser: str = "auto"
    """How reasoning is marked: "think", "mistral", "granite", "gemma", "harmony" or "none", which
    leaves it in the text; "auto" asks the template."""

    stream_usage: bool = True
    """Put the token counts on a stream's last chunk."""

    _own_call_names: ClassVar[tuple[str, ...]] = (
        "chat_template",
        "chat_template_kwargs",
        "stream_usage",
        "tool_parser",
        "reasoning",
        "reasoning_parser",
    )

    @model_validator(mode="after")
    def _check_parsers(self) -> Self:
        check_parser_names(self.tool_parser, self.reasoning_parser)
        return self

    @property
    def _llm_type(self) -> str:
        return "llm-connectors-chat"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        own = {
            name: getattr(self, name)
            for name in (
                "chat_template",
                "chat_template_kwargs",
                "tool_parser",
                "reasoning",
                "reasoning_parser",
            )
        }
        return {**super()._identifying_params, **own}

    @override
    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        return self._fill_ls_params(params, stop, kwargs)

    # ---------------------------------------------------------------- one conversation

    @override
    def invoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        """The answer to one input.

        Where nobody watches (no callbacks, no tracing) and there is no cache and no rate limiter,
        LangChain's event machinery, the larger part of a call's cost, is left out.
        """
        config = ensure_config(config)
        call = ChatListCall(self, {**kwargs, "stop": stop}, [config])
        if call.is_watched:
            return super().invoke(input, config, stop=stop, **kwargs)
        messages = self._convert_input(input).to_messages()
        with LANGCHAIN_ERRORS.converting():
            output, call.plan = self._answer(messages, call.options)
        return call.start_unwatched(0, messages).result(output)

    @override
    async def ainvoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        """`invoke`, awaited. Cancelling the task aborts the request."""
        config = ensure_config(config)
        call = ChatListCall(self, {**kwargs, "stop": stop}, [config])
        if call.is_watched:
            return await super().ainvoke(input, config, stop=stop, **kwargs)
        messages = self._convert_input(input).to_messages()
        with LANGCHAIN_ERRORS.converting():
            output, call.plan = await self._aanswer(messages, call.options)
        return call.start_unwatched(0, messages).result(output)

    @override
    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        """The answer in pieces. Leaving the loop early aborts it. Unwatched as `invoke`."""
        config = ensure_config(config)
        call = ChatListCall(self, {**kwargs, "stop": stop}, [config])
        if not self._streams_plainly(call, kwargs):
            yield from super().stream(input, config, stop=stop, **kwargs)
            return
        messages = self._convert_input(input).to_messages()
        message_id = call.message_id()
        with closing(self._stream(messages, call.stop, **call.kwargs)) as chunks:
            for chunk in chunks:
                yield _plain_chunk(chunk, message_id)

    @override
    async def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """`stream` for an event loop."""
        config = ensure_config(config)
        call = ChatListCall(self, {**kwargs, "stop": stop}, [config])
        if not self._streams_plainly(call, kwargs):
            watched = super().astream(input, config, stop=stop, **kwargs)
            async with aclosing(cast("AsyncGenerator[AIMessageChunk]", watched)) as pieces:
                async for piece in pieces:
                    yield piece
            return
        messages = self._convert_input(input).to_messages()
        message_id = call.message_id()
        async with aclosing(self._astream(messages, call.stop, **call.kwargs)) as chunks:
            async for chunk in chunks:
                yield _plain_chunk(chunk, message_id)

    def _streams_plainly(self, call: ChatListCall, kwargs: dict[str, Any]) -> bool:
        """Whether pieces go to the caller as they are: nobody else wants them, nor another form."""
        return (
            self.output_version != "v1"
            and self._should_stream(async_api=True, **{**kwargs, "stream": True})
            and not call.is_watched
        )

    @override
    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with LANGCHAIN_ERRORS.converting():
            options = self._call_options(stop, kwargs)
            output, plan = self._answer(messages, options)
            return chat_result(output, options.model, plan)

    @override
    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with LANGCHAIN_ERRORS.converting():
            options = self._call_options(stop, kwargs)
            output, plan = await self._aanswer(messages, options)
            return chat_result(output, options.model, plan)

    @override
    def _streaming_disabled(self, **kwargs: Any) -> bool:
        """Also where several answers are wanted, which cannot be streamed.

        Who asks for a stream is told so by an error; a handler that merely listens, such as
        LangGraph's, must not make `invoke` fail.
        """
        is_asked_for = bool(kwargs.get("stream"))
        if kwargs.get("n", self.n) > 1 and not is_asked_for:
            return True
        return super()._streaming_disabled(**kwargs)

    # ---------------------------------------------------------------- tokens

    @override
    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of `text` alone, without the template. Loads the model if need be."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        with LANGCHAIN_ERRORS.converting():
            return self._engine().tokenize(text, add_special_tokens=False)

    @override
    def get_num_tokens_from_messages(
        self,
        messages: list[BaseMessage],
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool] | None = None,
    ) -> int:
        """Tokens the model sees for this conversation, its template and `tools` included."""
        if not messages:
            return 0
        with LANGCHAIN_ERRORS.converting():
            given: dict[str, Any] = {"on_overflow": "error"}  # count all of it
            if tools:
                given["tools"] = openai_tools(tools)
            options = self._call_options(None, given)
            plan = self._plan(self._engine(options), options)
            return len(plan.encode([to_conversation(messages)])[0])

    # ---------------------------------------------------------------- what the model can do

    @override
    def _resolve_model_profile(self) -> ModelProfile:
        """What is known without loading the model; the rest comes with the first use."""
        profile = ModelProfile(
            text_inputs=True,
            text_outputs=True,
            image_inputs=False,
            audio_inputs=False,
            video_inputs=False,
            pdf_inputs=False,
            tool_calling=True,
            tool_choice=True,
            tool_call_streaming=True,
            mid_conversation_tools=False,
            structured_output=True,
            temperature=True,
        )
        if self.engine is not None:
            self._complete_profile(profile, self.engine)
        return profile

    @override
    def _on_engine(self, engine: Engine) -> None:
        if self.profile is not None and "max_input_tokens" not in self.profile:
            self._complete_profile(self.profile, engine)

    def _complete_profile(self, profile: ModelProfile, engine: Engine) -> None:
        profile["max_input_tokens"] = engine.max_model_len
        if engine.has_chat_template or self.chat_template is not None:
            form = engine.answer_format(self.chat_template, self.tool_parser, self.reasoning_parser)
            profile["reasoning_output"] = form.has_reasoning
            profile["mid_conversation_system_messages"] = form.shows_late_system_messages
            if form.effort_levels:
                profile["reasoning_effort_levels"] = list(form.effort_levels)
                if form.default_effort is not None:
                    profile["reasoning_effort_default"] = form.default_effort


def _plain_chunk(chunk: ChatGenerationChunk, message_id: str) -> AIMessageChunk:
    """A chunk's message with its id and metadata, as LangChain hands it on."""
    message = cast("AIMessageChunk", chunk.message)
    message.id = message_id
    if chunk.generation_info:
        message.response_metadata = {**chunk.generation_info, **message.response_metadata}
    return message
