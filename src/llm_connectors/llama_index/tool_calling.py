"""`LocalLLM`'s tool calls: how they are asked for and read, in LlamaIndex's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole
from llama_index.core.chat_engine.types import AgentChatResponse
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools import BaseTool

from llm_connectors.llama_index.base import EngineBackedLLM
from llm_connectors.llama_index.errors import NoToolCallError
from llm_connectors.llama_index.tools import selections

_DESCRIBED = "hermes"
"""How a model that was not trained on tools is told to write calls."""


class ToolCalling(EngineBackedLLM):
    """The part of `LocalLLM` that makes it a `FunctionCallingLLM`."""

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | dict[str, Any] | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Keywords of `chat` for a chat with tools. `chat_history` is left as it is.

        Args:
            tools: The tools to show.
            user_msg: Comes after the history.
            chat_history: The conversation so far.
            verbose: Read by LlamaIndex, which prints calls and results.
            allow_parallel_tool_calls: False keeps the answer to one call, streaming too.
            tool_required: The answer must be a call; held to it while it is written.
            tool_choice: As in the OpenAI API: "auto", "none", "required", a tool's name or a dict
                with one. Wins over `tool_required`.
            strict: False leaves calls that the model makes by itself unconstrained. Otherwise
                their arguments fit the tool's schema, as those of a forced call always do.
            **kwargs: Further options of the call.
        """
        messages = list(chat_history or [])
        if user_msg is not None:
            if isinstance(user_msg, str):
                user_msg = ChatMessage(role=MessageRole.USER, content=user_msg)
            messages.append(user_msg)
        asked: dict[str, Any] = {"messages": messages, **kwargs}
        if tools:
            required = "required" if tool_required else "auto"
            asked["tools"] = list(tools)
            asked["tool_choice"] = required if tool_choice is None else tool_choice
            asked["parallel_tool_calls"] = allow_parallel_tool_calls
            if strict is not None:
                asked["strict"] = strict
        return asked

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The calls in an answer, or in a chunk of one that is still being written.

        Calls are read from `ToolCallBlock`s, else from `additional_kwargs["tool_calls"]`. Of
        arguments that are incomplete JSON, what is there is returned.

        Args:
            response: An answer or a chunk of a stream.
            error_on_no_tool_call: Raise where there is no call.
            **kwargs: Of LlamaIndex's other classes; there are none here.

        Raises:
            NoToolCallError: There is no call. `tool_required=True` makes sure that there is one.
        """
        found = selections(response.message)
        if not found and error_on_no_tool_call:
            msg = (
                f"The answer has no tool call: {(response.message.content or '')[:200]!r}. Pass "
                "tool_required=True to have one, or error_on_no_tool_call=False."
            )
            raise NoToolCallError(msg)
        return found

    def predict_and_call(
        self, tools: Sequence[BaseTool], *args: Any, **kwargs: Any
    ) -> AgentChatResponse:
        """Choose a tool, call it and give its result.

        Unless `error_on_no_tool_call=False` is given, the model is held to making a call. Models
        that were not trained on tools are told how; no text is parsed for "Action:".
        """
        llm, kwargs = self._for_calls(kwargs)
        return FunctionCallingLLM.predict_and_call(llm, tools, *args, **kwargs)

    async def apredict_and_call(
        self, tools: Sequence[BaseTool], *args: Any, **kwargs: Any
    ) -> AgentChatResponse:
        """`predict_and_call`, awaited."""
        await self._aengine()
        llm, kwargs = self._for_calls(kwargs)
        return await FunctionCallingLLM.apredict_and_call(llm, tools, *args, **kwargs)

    def _for_calls(self, kwargs: dict[str, Any]) -> tuple[ToolCalling, dict[str, Any]]:
        must_call = kwargs.get("error_on_no_tool_call", True) and "tool_choice" not in kwargs
        kwargs = {"tool_required": must_call, **kwargs}
        if self.metadata.is_function_calling_model:
            return self, kwargs
        return self.with_options(tool_parser=_DESCRIBED), kwargs
