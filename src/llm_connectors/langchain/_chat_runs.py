"""The runs of a list call of `ChatLocal`: callbacks, cache and post-processing per conversation.

`BaseChatModel` does these steps inside `invoke`, one conversation at a time. A list call needs
them apart: start all runs, look all of them up, submit what is missing together, end each run when
its answer is there. Names and order of the callbacks are those of `BaseChatModel.generate`.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, cast

from langchain_core.callbacks import CallbackManager, CallbackManagerForLLMRun
from langchain_core.globals import get_llm_cache
from langchain_core.load import dumps
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatResult, LLMResult
from langchain_core.utils.utils import LC_ID_PREFIX
from langchain_core.utils.uuid import uuid7
from typing_extensions import override

from engine import RequestOutput
from llm_connectors._answer_plan import AnswerPlan
from llm_connectors.langchain._batching import Prompt, Run
from llm_connectors.langchain._fields import CallOptions
from llm_connectors.langchain._list_call import ListCall
from llm_connectors.langchain._messages import to_conversation
from llm_connectors.langchain._outputs import answer_messages, chat_result, llm_output

if TYPE_CHECKING:
    from engine import Engine
    from llm_connectors.langchain._chat_lists import ChatLists


class ChatListCall(ListCall):
    """What the runs of one list call of a chat model share."""

    model: ChatLists
    plan: AnswerPlan | None = None
    """How prompts are made and answers read; known once the engine is."""

    def plan_for(self, engine: Engine) -> AnswerPlan:
        """The plan of this call, made once.

        Raises:
            RequestError: The model cannot do what the call asks for.
        """
        if self.plan is None:
            self.plan = self.model._plan(engine, self.options)
        return self.plan

    @cached_property
    @override
    def invocation_params(self) -> dict[str, Any]:
        return self.model._get_invocation_params(stop=self.stop, **self.kwargs)

    @cached_property
    def cache_key(self) -> str:
        """Model and options as a cache knows them; the same key as `invoke` uses."""
        return self.model._get_llm_string(stop=self.stop, **self.kwargs)

    @cached_property
    def needs_single_calls(self) -> bool:
        """Whether a rate limiter, `streaming` or a handler that wants tokens is there."""
        model = self.model
        if model.rate_limiter is not None:
            return True
        # Only the handlers of these managers are looked at.
        watchers = cast("list[CallbackManagerForLLMRun]", self.managers)
        return any(
            model._should_stream(async_api=False, run_manager=one, **self.kwargs)
            or model._should_use_protocol_streaming(async_api=False, run_manager=one, **self.kwargs)
            for one in watchers
        )

    @cached_property
    def is_watched(self) -> bool:
        """Whether somebody is told of the runs, or something may answer or stop them.

        That is callbacks, tracing, a cache, a rate limiter, `streaming`. Where there is nothing of
        it, LangChain's managers would be made, which is most of the cost of a call, for nobody.
        """
        model = self.model
        if model.rate_limiter is not None or (
            model.cache is not False and (model.cache is not None or get_llm_cache() is not None)
        ):
            return True
        given = [config.get("callbacks") for config in self.configs]
        return any(
            CallbackManager.configure(callbacks, model.callbacks, model.verbose).handlers
            for callbacks in {id(callbacks): callbacks for callbacks in given}.values()
        ) or model._should_stream(async_api=False, **self.kwargs)

    def start(self, index: int, messages: list[BaseMessage]) -> ChatRun | UnwatchedRun:
        """Fire the start callbacks of one conversation, with the config of its own."""
        if not self.is_watched:
            return self.start_unwatched(index, messages)
        config = self.configs[index]
        (run,) = self._start(
            self.managers[index], [messages], config.get("run_name"), config.get("run_id")
        )
        return run

    def start_unwatched(self, index: int, messages: list[BaseMessage]) -> UnwatchedRun:
        """The run of one conversation that nobody is told of."""
        return UnwatchedRun(self, messages, self._run_id(index))

    def message_id(self) -> str:
        """Id of the pieces of an unwatched call's first stream."""
        return f"{LC_ID_PREFIX}-{self._run_id(0)}"

    def _run_id(self, index: int) -> uuid.UUID:
        return self.configs[index].get("run_id") or uuid7()

    def start_together(
        self,
        conversations: list[list[BaseMessage]],
        run_name: str | None,
        run_id: uuid.UUID | None,
    ) -> list[ChatRun]:
        """Fire the start callbacks of all conversations, which share one config."""
        return self._start(self.managers[0], conversations, run_name, run_id)

    def _start(
        self,
        manager: CallbackManager,
        conversations: list[list[BaseMessage]],
        run_name: str | None,
        run_id: uuid.UUID | None,
    ) -> list[ChatRun]:
        run_managers = manager.on_chat_model_start(
            self.model._serialized,
            conversations,
            invocation_params=self.invocation_params,
            options={"stop": self.stop},
            name=run_name,
            run_id=run_id,
            batch_size=len(self.configs),
        )
        return [
            ChatRun(self, messages, run_manager)
            for messages, run_manager in zip(conversations, run_managers, strict=True)
        ]


class ChatRun(Run[ChatResult]):
    """One conversation of a list call."""

    def __init__(
        self,
        call: ChatListCall,
        messages: Sequence[BaseMessage],
        run_manager: CallbackManagerForLLMRun,
    ) -> None:
        self.run_manager = run_manager
        self._call = call
        self._messages = messages

    @cached_property
    def _cached_prompt(self) -> str:
        """The conversation as a cache knows it: without message ids, as `invoke` writes it."""
        return dumps([_without_id(message) for message in self._messages])

    @override
    def cached(self) -> ChatResult | None:
        cache = self._call.cache
        if cache is None:
            return None
        hit = cache.lookup(self._cached_prompt, self._call.cache_key)
        if not isinstance(hit, list):
            return None
        return ChatResult(generations=self._call.model._convert_cached_generations(hit))

    @classmethod
    @override
    def prompts(cls, engine: Engine, runs: Sequence[Self]) -> list[Prompt]:
        plan = runs[0]._call.plan_for(engine)
        return list(plan.encode([to_conversation(run._messages) for run in runs]))

    @override
    def options_for(self, engine: Engine, options: CallOptions) -> CallOptions:
        return dataclasses.replace(options, params=self._call.plan_for(engine).params)

    @override
    def result(self, output: RequestOutput) -> ChatResult:
        model = self._call.model
        plan = self._call.plan
        assert plan is not None, "the prompts were made with it"
        result = chat_result(output, self._call.options.model, plan)
        for index, generation in enumerate(result.generations):
            message = cast("AIMessage", generation.message)
            _finish_message(message, self.run_manager.run_id, index, model.output_version)
        if len(result.generations) == 1 and result.llm_output:
            first = result.generations[0].message
            first.response_metadata = {**result.llm_output, **first.response_metadata}
        if self._call.cache is not None:
            self._call.cache.update(
                self._cached_prompt, self._call.cache_key, list(result.generations)
            )
        return result

    @override
    def end(self, result: ChatResult) -> None:
        self.run_manager.on_llm_end(
            LLMResult(generations=[list(result.generations)], llm_output=result.llm_output)
        )

    @override
    def fail(self, error: BaseException) -> None:
        self.run_manager.on_llm_error(error, response=LLMResult(generations=[]))


class UnwatchedRun(Run[AIMessage]):
    """One conversation of a call that nobody watches: its answer alone is made.

    A generation, a result and a callback manager around it are thirty objects that Python's
    collector has to walk, for each answer.
    """

    __slots__ = ("_call", "_messages", "_run_id")

    def __init__(
        self, call: ChatListCall, messages: Sequence[BaseMessage], run_id: uuid.UUID
    ) -> None:
        self._call = call
        self._messages = messages
        self._run_id = run_id

    @override
    def cached(self) -> None:
        return None

    @classmethod
    @override
    def prompts(cls, engine: Engine, runs: Sequence[Self]) -> list[Prompt]:
        plan = runs[0]._call.plan_for(engine)
        prompts: list[Prompt] = list(plan.encode([to_conversation(run._messages) for run in runs]))
        for run in runs:  # not needed again, and a message is five objects
            run._messages = ()
        return prompts

    @override
    def options_for(self, engine: Engine, options: CallOptions) -> CallOptions:
        return dataclasses.replace(options, params=self._call.plan_for(engine).params)

    @override
    def result(self, output: RequestOutput) -> AIMessage:
        """What `invoke` returns: the first answer's message."""
        call = self._call
        assert call.plan is not None, "the prompts were made with it"
        name = call.options.model
        message = answer_messages(output, name, call.plan)[0]
        _finish_message(message, self._run_id, 0, call.model.output_version)
        if len(output.outputs) == 1:
            message.response_metadata = {**llm_output(output, name), **message.response_metadata}
        return message

    @override
    def end(self, result: AIMessage) -> None:
        """Nobody is told."""

    @override
    def fail(self, error: BaseException) -> None:
        """Nobody is told."""


def _finish_message(
    message: AIMessage, run_id: uuid.UUID, index: int, output_version: str | None
) -> None:
    """Give an answer its id, and its form."""
    message.id = f"{LC_ID_PREFIX}-{run_id}-{index}"
    if output_version == "v1":
        message.content = list(message.content_blocks)  # type: ignore[arg-type]
        message.response_metadata["output_version"] = "v1"


def _without_id(message: BaseMessage) -> BaseMessage:
    return message if message.id is None else message.model_copy(update={"id": None})
