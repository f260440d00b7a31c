"""The list verbs of `ChatLocal`: every conversation of a list is submitted at once."""

from __future__ import annotations

import uuid
from collections.abc import Generator, Iterator, Sequence
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from langchain_core.callbacks import Callbacks
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatResult, LLMResult, RunInfo
from langchain_core.runnables import RunnableConfig
from typing_extensions import override

from engine import EngineError, RequestOutput
from llm_connectors._answer_plan import AnswerPlan
from llm_connectors.langchain._batching import Run, aserve, serve_runs
from llm_connectors.langchain._chat_runs import ChatListCall, UnwatchedRun
from llm_connectors.langchain._fields import CallOptions, LocalModelFields
from llm_connectors.langchain._list_call import configs_of_items
from llm_connectors.langchain.errors import LANGCHAIN_ERRORS

if TYPE_CHECKING:
    from engine import Engine


class ChatLists(LocalModelFields, BaseChatModel):
    """`generate`, `batch`, `abatch` and `batch_as_completed` over one hand-over to the engine.

    `agenerate` and `abatch_as_completed` are LangChain's own: they gather native async calls, which
    reach the engine together.
    """

    def _plan(self, engine: Engine, options: CallOptions) -> AnswerPlan:
        """How the prompts of a call are made and its answers read, by this engine.

        Raises:
            RequestError: The model cannot do what the call asks for.
        """
        return AnswerPlan(engine, options.answer, options.params)

    @override
    def generate(
        self,
        messages: list[list[BaseMessage]],
        stop: list[str] | None = None,
        callbacks: Callbacks = None,
        *,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        run_name: str | None = None,
        run_id: uuid.UUID | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Answer several conversations, submitted together. The first error ends the call."""
        config = RunnableConfig(callbacks=callbacks, tags=tags or [], metadata=metadata or {})
        call = ChatListCall(self, {**kwargs, "stop": stop}, [config] * len(messages))
        if len(messages) < 2 or call.needs_single_calls:
            return super().generate(
                messages,
                stop,
                callbacks,
                tags=tags,
                metadata=metadata,
                run_name=run_name,
                run_id=run_id,
                **kwargs,
            )
        runs = call.start_together(messages, run_name, run_id)
        served = serve_runs(runs, self._engine, lambda: call.options)
        results = {index: cast("ChatResult", result) for index, result in served}
        in_order = [results[index] for index in range(len(runs))]
        return LLMResult(
            generations=[list(result.generations) for result in in_order],
            llm_output=self._combine_llm_outputs([result.llm_output for result in in_order]),
            run=[RunInfo(run_id=run.run_manager.run_id) for run in runs],
        )

    @override
    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """Answer a list of inputs, all submitted together; results in order of the inputs.

        Args:
            inputs: Strings, prompt values or message lists.
            config: One for all or one for each. `max_concurrency` caps how many are in flight.
            return_exceptions: Put an input's error in its place. Otherwise the first error is
                raised and what still runs is aborted.
            **kwargs: As `invoke`.

        A rate limiter, `streaming` or a callback that wants tokens need calls of their own:
        then each input is an `invoke` in a thread, as many at once as the engine has sequences.
        """
        configs = configs_of_items(config, len(inputs))
        call = ChatListCall(self, kwargs, configs)
        if len(inputs) < 2 or (call.is_watched and call.needs_single_calls):
            capped = self._with_thread_cap(configs)
            return super().batch(inputs, capped, return_exceptions=return_exceptions, **kwargs)
        outcomes = dict(self._serve_inputs(call, inputs, return_exceptions, as_completed=False))
        return [cast("AIMessage", outcomes[index]) for index in range(len(inputs))]

    @overload
    def batch_as_completed(
        self,
        inputs: Sequence[LanguageModelInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: Literal[False] = False,
        **kwargs: Any,
    ) -> Iterator[tuple[int, AIMessage]]: ...

    @overload
    def batch_as_completed(
        self,
        inputs: Sequence[LanguageModelInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: Literal[True],
        **kwargs: Any,
    ) -> Iterator[tuple[int, AIMessage | Exception]]: ...

    @override
    def batch_as_completed(
        self,
        inputs: Sequence[LanguageModelInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> Iterator[tuple[int, AIMessage | Exception]]:
        """`batch`, yielding (index, answer) as answers finish. Leaving early aborts the rest."""
        configs = configs_of_items(config, len(inputs))
        call = ChatListCall(self, kwargs, configs)
        if len(inputs) < 2 or (call.is_watched and call.needs_single_calls):
            return super().batch_as_completed(
                inputs,
                self._with_thread_cap(configs),
                return_exceptions=cast("Literal[True]", return_exceptions),
                **kwargs,
            )
        return self._serve_inputs(call, inputs, return_exceptions, as_completed=True)

    @override
    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """`batch`, awaited. Rendering happens in a worker thread; the event loop goes on.

        Where somebody watches, or there is a time limit or a cap, each input is an `ainvoke`.
        """
        configs = configs_of_items(config, len(inputs))
        call = ChatListCall(self, kwargs, configs)
        is_plain = call.max_concurrency is None and kwargs.get("timeout", self.timeout) is None
        if len(inputs) < 2 or not is_plain or call.is_watched:
            return await super().abatch(
                inputs, configs, return_exceptions=return_exceptions, **kwargs
            )
        outcomes: dict[int, AIMessage | Exception] = {}
        conversations = self._conversations(inputs, outcomes if return_exceptions else None)
        runs = [call.start_unwatched(index, one) for index, one in conversations.items()]
        indices = list(conversations)
        del conversations  # each run lets go of its own once it is rendered
        try:
            with LANGCHAIN_ERRORS.converting():
                options = call.options
                engine = await self._aengine(options)
                options = runs[0].options_for(engine, options)
        except EngineError as error:
            if not return_exceptions:
                raise
            return [cast("AIMessage", outcomes.get(one, error)) for one in range(len(inputs))]
        served = aserve(
            engine,
            lambda positions: UnwatchedRun.prompts(engine, [runs[one] for one in positions]),
            len(runs),
            options,
        )
        async with aclosing(served):
            async for position, output in served:
                index = indices[position]
                if isinstance(output, RequestOutput):
                    outcomes[index] = runs[position].result(output)
                    continue
                failure = _as_ours(output)
                if not return_exceptions:
                    raise failure
                outcomes[index] = failure
        return [cast("AIMessage", outcomes[index]) for index in range(len(inputs))]

    def _conversations(
        self,
        inputs: Sequence[LanguageModelInput],
        failed: dict[int, AIMessage | Exception] | None,
    ) -> dict[int, list[BaseMessage]]:
        """Index -> messages. Errors go into `failed`; without one, the first is raised."""
        conversations: dict[int, list[BaseMessage]] = {}
        for index, one in enumerate(inputs):
            try:
                conversations[index] = self._convert_input(one).to_messages()
            except Exception as error:
                if failed is None:
                    raise
                failed[index] = error
        return conversations

    def _serve_inputs(
        self,
        call: ChatListCall,
        inputs: Sequence[LanguageModelInput],
        return_exceptions: bool,
        *,
        as_completed: bool,
    ) -> Generator[tuple[int, AIMessage | Exception]]:
        failed: dict[int, AIMessage | Exception] = {}
        conversations = self._conversations(inputs, failed if return_exceptions else None)
        yield from failed.items()
        runs: list[Run[Any]] = [call.start(index, one) for index, one in conversations.items()]
        indices = list(conversations)
        del conversations  # each run lets go of its own once it is rendered
        served = serve_runs(
            runs,
            self._engine,
            lambda: call.options,
            max_in_flight=call.max_concurrency,
            as_completed=as_completed,
            return_exceptions=return_exceptions,
        )
        with closing(served):
            for position, outcome in served:
                if isinstance(outcome, ChatResult):
                    answer = cast("AIMessage", outcome.generations[0].message)
                    yield indices[position], answer
                else:  # an answer that nobody watched, or an error
                    yield indices[position], outcome

    def _with_thread_cap(self, configs: list[RunnableConfig]) -> list[RunnableConfig]:
        """Configs that let threads keep the engine busy; LangChain's own default is 32 at most."""
        if not configs or configs[0].get("max_concurrency") is not None:
            return configs
        cap = min(len(configs), self._lease.config.max_num_seqs)
        return [{**config, "max_concurrency": cap} for config in configs]

    @override
    def _combine_llm_outputs(self, llm_outputs: list[dict[str, Any] | None], /) -> dict[str, Any]:
        usages = [output["token_usage"] for output in llm_outputs if output]
        names = {name for usage in usages for name in usage}
        total = {name: sum(usage[name] for usage in usages) for name in sorted(names)}
        models = [output["model_name"] for output in llm_outputs if output]
        return {"token_usage": total, "model_name": models[0] if models else self.model}


def _as_ours(error: Exception) -> Exception:
    return LANGCHAIN_ERRORS.convert(error) if isinstance(error, EngineError) else error
