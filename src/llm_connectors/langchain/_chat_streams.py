"""One conversation of `ChatLocal` through the engine: whole, in chunks, as events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForLLMRun,
)
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.utils.utils import LC_ID_PREFIX
from langchain_protocol.protocol import MessagesData
from typing_extensions import override

from engine import RequestOutput
from llm_connectors._answer_plan import AnswerPlan
from llm_connectors._gathered import submit_chat
from llm_connectors.langchain._chat_lists import ChatLists
from llm_connectors.langchain._chunks import ChunkMaker
from llm_connectors.langchain._events import EventMaker
from llm_connectors.langchain._fields import CallOptions
from llm_connectors.langchain._messages import to_conversation
from llm_connectors.langchain._streaming import aiterate, check_can_stream, iterate, wait
from llm_connectors.langchain.errors import LANGCHAIN_ERRORS

if TYPE_CHECKING:
    from engine import Engine, RequestHandle


class ChatStreams(ChatLists):
    """The single calls of a chat model, natively sync and async."""

    # ---------------------------------------------------------------- whole answers

    def _answer(
        self, messages: Sequence[BaseMessage], options: CallOptions
    ) -> tuple[RequestOutput, AnswerPlan]:
        plan, _prompt, handle = self._submit(messages, options)
        try:
            return handle.result(timeout=options.timeout), plan
        finally:
            handle.abort()  # changes nothing once there is a result

    async def _aanswer(
        self, messages: Sequence[BaseMessage], options: CallOptions
    ) -> tuple[RequestOutput, AnswerPlan]:
        plan, _prompt, handle = await self._asubmit(messages, options)
        return await wait(handle, options.timeout), plan

    def _submit(
        self, messages: Sequence[BaseMessage], options: CallOptions
    ) -> tuple[AnswerPlan, list[int], RequestHandle]:
        engine = self._engine(options)
        plan = self._plan(engine, options)
        (prompt,) = plan.encode([to_conversation(messages)])
        return plan, prompt, engine.submit(prompt, plan.params, **options.submit)

    async def _asubmit(
        self, messages: Sequence[BaseMessage], options: CallOptions
    ) -> tuple[AnswerPlan, list[int], RequestHandle]:
        engine: Engine = await self._aengine(options)
        plan = self._plan(engine, options)
        conversation = to_conversation(messages)
        prompt, handle = await submit_chat(engine, plan, conversation, options.submit)
        return plan, prompt, handle

    # ---------------------------------------------------------------- chunks

    @override
    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Generator[ChatGenerationChunk]:
        with LANGCHAIN_ERRORS.converting():
            options = self._call_options(stop, kwargs)
            check_can_stream(options)
            plan, prompt, handle = self._submit(messages, options)
            maker = self._chunk_maker(plan, prompt, options)
            with closing(iterate(handle, options)) as pieces:
                for delta, output in pieces:
                    yield from maker.chunks(delta, output)

    @override
    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncGenerator[ChatGenerationChunk]:
        with LANGCHAIN_ERRORS.converting():
            options = self._call_options(stop, kwargs)
            check_can_stream(options)
            plan, prompt, handle = await self._asubmit(messages, options)
            maker = self._chunk_maker(plan, prompt, options)
            async with aclosing(aiterate(handle, options)) as pieces:
                async for delta, output in pieces:
                    for chunk in maker.chunks(delta, output):
                        yield chunk

    def _chunk_maker(
        self, plan: AnswerPlan, prompt: Sequence[int], options: CallOptions
    ) -> ChunkMaker:
        return ChunkMaker(
            options,
            plan,
            plan.stream(prompt),
            is_v1=self.output_version == "v1",
            with_usage=options.own["stream_usage"],
        )

    # ---------------------------------------------------------------- events

    def _stream_chat_model_events(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Generator[MessagesData]:
        """The answer as protocol events. LangChain looks this method up by its name."""
        with LANGCHAIN_ERRORS.converting():
            options = self._call_options(stop, kwargs)
            check_can_stream(options)
            plan, prompt, handle = self._submit(messages, options)
            maker = self._event_maker(plan, prompt, options)
            with closing(iterate(handle, options)) as pieces:
                yield maker.start(_message_id(run_manager))
                for delta, output in pieces:
                    yield from maker.events(delta, output)

    async def _astream_chat_model_events(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncGenerator[MessagesData]:
        """`_stream_chat_model_events` for an event loop."""
        with LANGCHAIN_ERRORS.converting():
            options = self._call_options(stop, kwargs)
            check_can_stream(options)
            plan, prompt, handle = await self._asubmit(messages, options)
            maker = self._event_maker(plan, prompt, options)
            async with aclosing(aiterate(handle, options)) as pieces:
                yield maker.start(_message_id(run_manager))
                async for delta, output in pieces:
                    for event in maker.events(delta, output):
                        yield event

    def _event_maker(
        self, plan: AnswerPlan, prompt: Sequence[int], options: CallOptions
    ) -> EventMaker:
        stream = plan.stream(prompt)
        return EventMaker(options, plan, stream, with_usage=options.own["stream_usage"])


def _message_id(
    run_manager: CallbackManagerForLLMRun | AsyncCallbackManagerForLLMRun | None,
) -> str | None:
    return None if run_manager is None else f"{LC_ID_PREFIX}-{run_manager.run_id}"
