"""`LocalLLM`: LangChain text completion over the in-process engine."""

from __future__ import annotations

import asyncio
import dataclasses
import operator
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from contextlib import aclosing, closing
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast, overload

from langchain_core.callbacks import (
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForLLMRun,
    Callbacks,
)
from langchain_core.language_models import BaseLLM, LangSmithParams, LanguageModelInput
from langchain_core.outputs import GenerationChunk, LLMResult
from langchain_core.runnables import Runnable, RunnableConfig
from typing_extensions import override

from engine import RequestOutput
from llm_connectors._gathered import MAX_INLINE_CHARS
from llm_connectors.langchain._batching import serve, serve_runs
from llm_connectors.langchain._fields import CallOptions, LocalModelFields
from llm_connectors.langchain._list_call import configs_of_items
from llm_connectors.langchain._llm_runs import TextListCall, fitted_prompts
from llm_connectors.langchain._outputs import PROVIDER, text_chunk, text_generations, token_usage
from llm_connectors.langchain._streaming import aiterate, check_can_stream, iterate, wait
from llm_connectors.langchain.errors import LANGCHAIN_ERRORS

if TYPE_CHECKING:
    from engine import Engine

_RUN_KEYWORDS = frozenset({"tags", "metadata", "run_name", "run_id"})
"""Keywords of `generate` that are about the run, not about the answer."""


class LocalLLM(LocalModelFields, BaseLLM):
    """Text completion in this process: the prompt is continued as it stands, without a template.

    Making one loads nothing: the model is loaded at the first call, or by `load`, and shared by
    all objects in the process that name it with the same engine options.

        llm = LocalLLM(model="smollm2-135m", max_tokens=32)
        llm.invoke("The capital of France is")
        llm.batch(["One list", "is one batch"], return_exceptions=True)

    All sampling options are fields, keywords of every call, and work with `bind` and
    `configurable_fields`. Unknown names raise. For conversations use `ChatLocal`.

    Raises:
        pydantic.ValidationError: A name is unknown or a value is bad.
    """

    parse_special: bool = False
    """Read control tokens written in the prompt as such. Off, because text of unknown origin
    must not be able to end its own turn; on for prompts with chat markup written by hand."""

    _own_call_names: ClassVar[tuple[str, ...]] = ("parse_special",)

    @property
    def _llm_type(self) -> str:
        return "llm-connectors-llm"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {**super()._identifying_params, "parse_special": self.parse_special}

    @override
    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        return self._fill_ls_params(params, stop, kwargs)

    @override
    def _call_options(
        self, stop: list[str] | None, kwargs: Any, **own_overrides: Any
    ) -> CallOptions:
        options = super()._call_options(stop, kwargs, **own_overrides)
        submit = {**options.submit, "parse_special": options.own["parse_special"]}
        return dataclasses.replace(options, submit=submit)

    # ---------------------------------------------------------------- prompts

    @override
    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        if self.streaming and len(prompts) == 1:
            return _merged(list(self._stream(prompts[0], stop, run_manager, **kwargs)))
        with LANGCHAIN_ERRORS.converting():
            options = self._call_options(stop, kwargs)
            engine = self._engine(options)
            outputs: list[RequestOutput] = []
            served = serve(
                engine,
                lambda indices: fitted_prompts(engine, [prompts[one] for one in indices], options),
                len(prompts),
                options,
            )
            with closing(served):
                for _index, output in served:
                    if isinstance(output, Exception):
                        raise output
                    outputs.append(output)
            return self._result(outputs, options)

    @override
    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        if self.streaming and len(prompts) == 1:
            stream = self._astream(prompts[0], stop, run_manager, **kwargs)
            return _merged([chunk async for chunk in stream])
        with LANGCHAIN_ERRORS.converting():
            options = self._call_options(stop, kwargs)
            engine = await self._aengine(options)
            encoded = await self._aencode(engine, prompts, options)
            handles = engine.submit_many(encoded, options.params, **options.submit)
            try:
                outputs = await asyncio.gather(*(wait(one, options.timeout) for one in handles))
            finally:
                for handle in handles:
                    handle.abort()  # changes nothing for those that have finished
            return self._result(outputs, options)

    @override
    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        with LANGCHAIN_ERRORS.converting():
            options = self._call_options(stop, kwargs)
            check_can_stream(options)
            engine = self._engine(options)
            (fitted,) = fitted_prompts(engine, [prompt], options)
            handle = engine.submit(fitted, options.params, **options.submit)
            with closing(iterate(handle, options)) as pieces:
                for delta, output in pieces:
                    chunk = text_chunk(delta, output, options.model, options.params)
                    if run_manager is not None:
                        run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    @override
    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        with LANGCHAIN_ERRORS.converting():
            options = self._call_options(stop, kwargs)
            check_can_stream(options)
            engine = await self._aengine(options)
            (encoded,) = await self._aencode(engine, [prompt], options)
            handle = engine.submit(encoded, options.params, **options.submit)
            async with aclosing(aiterate(handle, options)) as pieces:
                async for delta, output in pieces:
                    chunk = text_chunk(delta, output, options.model, options.params)
                    if run_manager is not None:
                        await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    async def _aencode(
        self, engine: Engine, prompts: Sequence[str], options: CallOptions
    ) -> Sequence[str | list[int]]:
        """Token ids of long prompts, made in a worker thread; short ones as they are."""
        if sum(map(len, prompts)) <= MAX_INLINE_CHARS:
            return fitted_prompts(engine, prompts, options)
        if options.own["on_overflow"] != "error":
            return await asyncio.to_thread(fitted_prompts, engine, prompts, options)
        encode = partial(engine.tokenize, parse_special=options.own["parse_special"])
        return await asyncio.to_thread(lambda: [encode(text) for text in prompts])

    def _result(self, outputs: Sequence[RequestOutput], options: CallOptions) -> LLMResult:
        return LLMResult(
            generations=[
                list(text_generations(output, options.model, options.params)) for output in outputs
            ],
            llm_output={
                "token_usage": token_usage(*(output.usage for output in outputs)),
                "model_name": options.model,
                "model_provider": PROVIDER,
            },
        )

    # ---------------------------------------------------------------- LangChain's cache

    @override
    def generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Continue several prompts, submitted together. The first error ends the call.

        Calls with keywords of their own bypass LangChain's cache: its key leaves them out, and
        `temperature=0` must not be answered with what was sampled at 1.
        """
        if self.cache is not False and not _RUN_KEYWORDS.issuperset(kwargs):
            return self._without_cache().generate(prompts, stop, callbacks, **kwargs)
        return super().generate(prompts, stop, callbacks, **kwargs)

    @override
    async def agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """`generate` for an event loop."""
        if self.cache is not False and not _RUN_KEYWORDS.issuperset(kwargs):
            return await self._without_cache().agenerate(prompts, stop, callbacks, **kwargs)
        return await super().agenerate(prompts, stop, callbacks, **kwargs)

    def _without_cache(self) -> Self:
        return self.model_copy(update={"cache": False})

    # ---------------------------------------------------------------- lists of inputs

    @override
    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Continue a list of inputs, all submitted together; results in order of the inputs.

        Args:
            inputs: Strings, prompt values or message lists.
            config: One for all or one for each. `max_concurrency` caps how many are in flight.
            return_exceptions: Put an input's error in its place. Otherwise the first error is
                raised and what still runs is aborted.
            **kwargs: As `invoke`.
        """
        configs = configs_of_items(config, len(inputs))
        if len(inputs) < 2 or self.streaming:
            return Runnable.batch(
                self, inputs, configs, return_exceptions=return_exceptions, **kwargs
            )
        call = TextListCall(self, kwargs, configs)
        outcomes = dict(self._serve_inputs(call, inputs, return_exceptions, as_completed=False))
        return [cast("str", outcomes[index]) for index in range(len(inputs))]

    @overload
    def batch_as_completed(
        self,
        inputs: Sequence[LanguageModelInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: Literal[False] = False,
        **kwargs: Any,
    ) -> Iterator[tuple[int, str]]: ...

    @overload
    def batch_as_completed(
        self,
        inputs: Sequence[LanguageModelInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: Literal[True],
        **kwargs: Any,
    ) -> Iterator[tuple[int, str | Exception]]: ...

    @override
    def batch_as_completed(
        self,
        inputs: Sequence[LanguageModelInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> Iterator[tuple[int, str | Exception]]:
        """`batch`, yielding (index, text) as answers finish. Leaving early aborts the rest."""
        configs = configs_of_items(config, len(inputs))
        if len(inputs) < 2 or self.streaming:
            as_is = cast("Literal[True]", return_exceptions)
            return super().batch_as_completed(inputs, configs, return_exceptions=as_is, **kwargs)
        call = TextListCall(self, kwargs, configs)
        return self._serve_inputs(call, inputs, return_exceptions, as_completed=True)

    @override
    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """`batch` for an event loop: one native call per input, so that errors stay apart."""
        return await Runnable.abatch(
            self, inputs, config, return_exceptions=return_exceptions, **kwargs
        )

    def _serve_inputs(
        self,
        call: TextListCall,
        inputs: Sequence[LanguageModelInput],
        return_exceptions: bool,
        *,
        as_completed: bool,
    ) -> Generator[tuple[int, str | Exception]]:
        texts: dict[int, str] = {}
        for index, one in enumerate(inputs):
            try:
                texts[index] = self._convert_input(one).to_string()
            except Exception as error:
                if not return_exceptions:
                    raise
                yield index, error
        served = serve_runs(
            [call.start(index, text) for index, text in texts.items()],
            self._engine,
            lambda: call.options,
            max_in_flight=call.max_concurrency,
            as_completed=as_completed,
            return_exceptions=return_exceptions,
        )
        indices = list(texts)
        with closing(served):
            for position, outcome in served:
                if isinstance(outcome, Exception):
                    yield indices[position], outcome
                else:
                    yield indices[position], outcome.generations[0][0].text

    # ---------------------------------------------------------------- tokens

    @override
    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of `text` alone. Loads the model if need be."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        with LANGCHAIN_ERRORS.converting():
            return self._engine().tokenize(
                text, add_special_tokens=False, parse_special=self.parse_special
            )


def _merged(chunks: list[GenerationChunk]) -> LLMResult:
    """A streamed answer as the result of one prompt."""
    generation = reduce(operator.add, chunks)
    usage = (generation.generation_info or {}).get("usage", {})
    return LLMResult(generations=[[generation]], llm_output={"token_usage": usage})
