"""The runs of a list call of `LocalLLM`: callbacks, cache and post-processing per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from langchain_core.caches import BaseCache
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.outputs import Generation, LLMResult
from typing_extensions import override

from engine import RequestOutput
from llm_connectors._overflow import prompt_room, shortened_text
from llm_connectors.langchain._batching import Prompt, Run
from llm_connectors.langchain._fields import CallOptions
from llm_connectors.langchain._list_call import ListCall

if TYPE_CHECKING:
    from engine import Engine
    from llm_connectors.langchain.llms import LocalLLM


def fitted_prompts(
    engine: Engine, prompts: Sequence[str], options: CallOptions
) -> list[str | list[int]]:
    """Texts as they are submitted: cut where that is wanted, see `llm_connectors._overflow`."""
    if options.own["on_overflow"] == "error":
        return list(prompts)
    room = prompt_room(engine, options.params.max_tokens)
    parse_special = options.own["parse_special"]
    return [shortened_text(engine, text, room, parse_special=parse_special) for text in prompts]


class TextListCall(ListCall):
    """What the runs of one list call of a text model share."""

    model: LocalLLM

    @cached_property
    @override
    def invocation_params(self) -> dict[str, Any]:
        return {**self.model.asdict(), "stop": self.stop, **self.kwargs}

    @cached_property
    @override
    def cache(self) -> BaseCache | None:
        # `BaseLLM` leaves the call's keywords out of its key, see `LocalLLM.generate`.
        return None if self.kwargs else super().cache

    @cached_property
    def cache_key(self) -> str:
        """Model and options as a cache knows them; the same key as `invoke` uses."""
        return str(sorted({**self.model.asdict(), "stop": self.stop}.items()))

    def start(self, index: int, text: str) -> TextRun:
        """Fire the start callbacks of one prompt, with the config of its own."""
        config = self.configs[index]
        (run_manager,) = self.managers[index].on_llm_start(
            self.model._serialized,
            [text],
            invocation_params=self.invocation_params,
            options={"stop": self.stop},
            name=config.get("run_name"),
            run_id=config.get("run_id"),
            batch_size=len(self.configs),
        )
        return TextRun(self, text, run_manager)


class TextRun(Run[LLMResult]):
    """One prompt of a list call."""

    def __init__(
        self, call: TextListCall, text: str, run_manager: CallbackManagerForLLMRun
    ) -> None:
        self.run_manager = run_manager
        self._call = call
        self._text = text

    @override
    def cached(self) -> LLMResult | None:
        cache = self._call.cache
        if cache is None:
            return None
        hit = cache.lookup(self._text, self._call.cache_key)
        return LLMResult(generations=[list(hit)]) if isinstance(hit, list) else None

    @classmethod
    @override
    def prompts(cls, engine: Engine, runs: Sequence[Self]) -> list[Prompt]:
        call = runs[0]._call
        return fitted_prompts(engine, [run._text for run in runs], call.options)

    @override
    def result(self, output: RequestOutput) -> LLMResult:
        result = self._call.model._result([output], self._call.options)
        if self._call.cache is not None:
            generations = [one for one in result.generations[0] if isinstance(one, Generation)]
            self._call.cache.update(self._text, self._call.cache_key, generations)
        return result

    @override
    def end(self, result: LLMResult) -> None:
        self.run_manager.on_llm_end(result)

    @override
    def fail(self, error: BaseException) -> None:
        self.run_manager.on_llm_error(error, response=LLMResult(generations=[]))
