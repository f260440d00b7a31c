"""`LocalLLM`: LlamaIndex's LLM class over the in-process engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
)
from llama_index_instrumentation import get_dispatcher

from llm_connectors.llama_index import batch
from llm_connectors.llama_index.observation import chat_endpoint, completion_endpoint
from llm_connectors.llama_index.responses import Answer
from llm_connectors.llama_index.structured import StructuredOutput

dispatcher = get_dispatcher(__name__)


class LocalLLM(StructuredOutput):
    """A model in this process: true async, streaming, batching, and no server.

    Every option of `engine.SamplingParams` is a field here and a keyword of every call; a keyword
    replaces the field for that call alone. Unknown names are refused with the nearest valid one.
    The model is loaded on first use, `load()` or `await aload()`, and shared by all objects (and
    by the LangChain classes) that ask for the same model with the same `engine_kwargs`.

    Calls that run at the same time, from any threads and event loops, share the GPU in one
    continuous batch. `chat` sends messages through the model's chat template. `complete` does the
    same with one user message where the model has a template, and continues the text where it has
    none; with `formatted=True` the text is used as it stands.

    Tools work with `chat(tools=...)`, `chat_with_tools`, `predict_and_call` and LlamaIndex's
    agents. `metadata.is_function_calling_model` is True where the chat template has a place for
    tools or `tool_parser` is set; else `AgentWorkflow` picks the ReAct agent. Forced calls and the
    structured methods are held to their JSON schema while the answer is written. Reasoning comes
    as a `ThinkingBlock`, and in streams as `additional_kwargs["thinking_delta"]`.

    Example:
        >>> llm = LocalLLM("smollm2-135m", max_tokens=16, temperature=0.0)
        >>> llm.complete("The capital of France is").text  # doctest: +SKIP

    Raises:
        ConfigError: No model is given, or an engine option is unknown or bad.
        RequestError: A sampling option is unknown or bad.
    """

    @classmethod
    def class_name(cls) -> str:
        """Name in serialized form; `load_llm` knows it."""
        return "LocalLLM"

    # ------------------------------------------------------------------ whole answers

    @chat_endpoint(dispatcher)
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """The assistant's answer to a conversation.

        Args:
            messages: Text messages, calls and results of tools; `system_prompt` is not added (only
                `predict` and the structured methods add it).
            **kwargs: Any sampling option; `timeout`, `priority`, `cache_salt`, `chat_template`,
                `chat_template_kwargs`, `thinking`, `tool_parser`, `reasoning_parser`; and, as in
                the OpenAI API, `tools`, `tool_choice`, `parallel_tool_calls`, `response_format`.

        Raises:
            RequestError: An option is unknown or bad, or a block cannot be read.
            ContextOverflowError: Prompt and answer do not fit the context; raised before any
                work on the GPU.
            EngineError: Anything else that ended the request.
        """
        return self._submit_chat(self.engine, messages, kwargs).wait().as_chat()

    @chat_endpoint(dispatcher)
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """`chat`, awaited. Cancelling the task aborts the request."""
        pending = await self._asubmit_chat(await self._aengine(), messages, kwargs)
        return (await pending.wait_async()).as_chat()

    @completion_endpoint(dispatcher)
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """The model's answer to a prompt, or its continuation; see the class.

        Args:
            prompt: Text.
            formatted: The text carries the model's markup already: no template is applied, no
                BOS added (a base model gets one if the text brings none), special tokens in the
                text are parsed.
            **kwargs: As in `chat`.
        """
        return (
            self._submit_completion(self.engine, prompt, formatted, kwargs).wait().as_completion()
        )

    @completion_endpoint(dispatcher)
    async def acomplete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponse:
        """`complete`, awaited. Cancelling the task aborts the request."""
        pending = self._submit_completion(await self._aengine(), prompt, formatted, kwargs)
        return (await pending.wait_async()).as_completion()

    # ------------------------------------------------------------------ streams

    @chat_endpoint(dispatcher)
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """The answer while it grows: each chunk has the text so far and what is new.

        The request is submitted by the call itself. Leaving the loop early aborts it. The last
        chunk, which always comes, has usage and finish reason.
        """
        return self._submit_chat(self.engine, messages, kwargs).stream(Answer.as_chat)

    @chat_endpoint(dispatcher)
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        """`stream_chat` as an async generator."""
        pending = await self._asubmit_chat(await self._aengine(), messages, kwargs)
        return pending.stream_async(Answer.as_chat)

    @completion_endpoint(dispatcher)
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        """`complete` while it grows, in chunks like those of `stream_chat`."""
        return self._submit_completion(self.engine, prompt, formatted, kwargs).stream(
            Answer.as_completion
        )

    @completion_endpoint(dispatcher)
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """`stream_complete` as an async generator."""
        pending = self._submit_completion(await self._aengine(), prompt, formatted, kwargs)
        return pending.stream_async(Answer.as_completion)

    # ------------------------------------------------------------------ many at once

    @dispatcher.span
    def batch_complete(
        self, prompts: Sequence[str], formatted: bool = False, **kwargs: Any
    ) -> list[CompletionResponse]:
        """`complete` for many prompts, all started in the same step; answers in order.

        Each prompt has its own instrumentation events. If one cannot be served, none is started;
        if one fails later, the others are aborted.

        Args:
            prompts: Texts.
            formatted: As in `complete`, for all.
            **kwargs: As in `chat`, for all. `timeout` counts from the call.
        """
        if self.rate_limiter is not None:
            return [self.complete(prompt, formatted, **kwargs) for prompt in prompts]
        pending = self._submit_completions(self.engine, prompts, formatted, kwargs)
        return batch.completions(self, prompts, pending, kwargs)

    @dispatcher.span
    async def abatch_complete(
        self, prompts: Sequence[str], formatted: bool = False, **kwargs: Any
    ) -> list[CompletionResponse]:
        """`batch_complete`, awaited."""
        if self.rate_limiter is not None:
            return [await self.acomplete(prompt, formatted, **kwargs) for prompt in prompts]
        pending = self._submit_completions(await self._aengine(), prompts, formatted, kwargs)
        return await batch.acompletions(self, prompts, pending, kwargs)

    @dispatcher.span
    def batch_chat(
        self, conversations: Sequence[Sequence[ChatMessage]], **kwargs: Any
    ) -> list[ChatResponse]:
        """`chat` for many conversations, all started in the same step, as `batch_complete`."""
        if self.rate_limiter is not None:
            return [self.chat(messages, **kwargs) for messages in conversations]
        pending = self._submit_chats(self.engine, conversations, kwargs)
        return batch.chats(self, conversations, pending, kwargs)

    @dispatcher.span
    async def abatch_chat(
        self, conversations: Sequence[Sequence[ChatMessage]], **kwargs: Any
    ) -> list[ChatResponse]:
        """`batch_chat`, awaited."""
        if self.rate_limiter is not None:
            return [await self.achat(messages, **kwargs) for messages in conversations]
        pending = self._submit_chats(await self._aengine(), conversations, kwargs)
        return await batch.achats(self, conversations, pending, kwargs)
