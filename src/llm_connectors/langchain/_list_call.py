"""What a list call does once for all its items: keywords, callbacks, the cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from langchain_core.caches import BaseCache
from langchain_core.callbacks import CallbackManager
from langchain_core.globals import get_llm_cache
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config, get_config_list

from llm_connectors.langchain._fields import CallOptions

if TYPE_CHECKING:
    from llm_connectors.langchain._chat_lists import ChatLists
    from llm_connectors.langchain.llms import LocalLLM

_TRACING_ONLY = ("ls_structured_output_format", "structured_output_format")
"""Keywords that LangChain binds for its traces; models never see them."""


def configs_of_items(
    config: RunnableConfig | Sequence[RunnableConfig] | None, num_items: int
) -> list[RunnableConfig]:
    """LangChain's `get_config_list`; items with equal configs share one, which is only read.

    A config of its own for each is four objects that Python's collector walks.
    """
    if num_items > 1 and (
        config is None or (isinstance(config, dict) and not config.get("run_id"))
    ):
        return [ensure_config(config)] * num_items
    return get_config_list(config, num_items)


class ListCall(ABC):
    """What the runs of one list call share.

    Args:
        model: Who answers.
        kwargs: The call's keywords, `stop` included.
        configs: One per item.
    """

    def __init__(
        self,
        model: ChatLists | LocalLLM,
        kwargs: dict[str, Any],
        configs: Sequence[RunnableConfig],
    ) -> None:
        self.model: ChatLists | LocalLLM = model
        self.kwargs = {name: kwargs[name] for name in kwargs if name not in _TRACING_ONLY}
        self.stop: list[str] | None = self.kwargs.pop("stop", None)
        self.configs = configs
        self.max_concurrency = configs[0].get("max_concurrency") if configs else None

    @property
    @abstractmethod
    def invocation_params(self) -> dict[str, Any]:
        """Model and options as LangChain's callbacks are told."""

    @cached_property
    def options(self) -> CallOptions:
        """The call's options, checked. Raises `RequestError` for bad ones."""
        return self.model._call_options(self.stop, self.kwargs)

    @cached_property
    def cache(self) -> BaseCache | None:
        """LangChain's cache, where it is on.

        Raises:
            ValueError: The model's `cache` is True, but there is no global cache.
        """
        if self.model.cache is False:
            return None
        if isinstance(self.model.cache, BaseCache):
            return self.model.cache
        cache = get_llm_cache()
        if cache is None and self.model.cache:
            msg = "cache=True, but no global cache is set. Call set_llm_cache, or pass a cache."
            raise ValueError(msg)
        return cache

    @cached_property
    def managers(self) -> list[CallbackManager]:
        """The callbacks of each config and of the model."""
        ls_params = dict(self.model._get_ls_params_with_defaults(stop=self.stop, **self.kwargs))
        model = self.model
        return [
            CallbackManager.configure(
                config.get("callbacks"),
                model.callbacks,
                model.verbose,
                config.get("tags"),
                model.tags,
                {**(config.get("metadata") or {}), **ls_params},
                model.metadata,
                langsmith_inheritable_metadata=self.invocation_params,
            )
            for config in self.configs
        ]
