"""Events, spans and callbacks around an endpoint, left out where nobody would be told.

LlamaIndex announces each call three times: as a span, as instrumentation events and to the callback
manager. For that it makes ids, copies of the messages and bound arguments, a hundred microseconds
and more, whether or not a handler is there. Here the handlers are looked for first.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from llama_index.core.callbacks import CallbackManager
from llama_index.core.llms.callbacks import dispatcher as event_dispatcher
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index_instrumentation.dispatcher import DISPATCHER_SPAN_DECORATED_ATTR, Dispatcher
from llama_index_instrumentation.event_handlers import NullEventHandler
from llama_index_instrumentation.span_handlers import NullSpanHandler

F = TypeVar("F", bound=Callable[..., Any])


def is_observed(llm: Any, span_dispatcher: Dispatcher = event_dispatcher) -> bool:
    """Whether somebody is told of the calls of `llm`, or may hold them up.

    That is a callback handler, a handler of events or spans, or a rate limiter.

    Args:
        llm: An LLM of LlamaIndex.
        span_dispatcher: Whom its endpoints tell of their spans, if they do.
    """
    manager = llm.callback_manager
    if not isinstance(manager, CallbackManager) or manager.handlers:
        return True
    return (
        llm.rate_limiter is not None
        or _has_handlers(event_dispatcher)
        or _has_handlers(span_dispatcher)
    )


def _has_handlers(dispatcher: Dispatcher) -> bool:
    """Whether anybody but LlamaIndex's placeholders listens to `dispatcher` or its parents."""
    while True:
        if any(type(one) is not NullEventHandler for one in dispatcher.event_handlers):
            return True
        if any(type(one) is not NullSpanHandler for one in dispatcher.span_handlers):
            return True
        if not dispatcher.propagate:
            return False
        dispatcher = dispatcher.parent


def chat_endpoint(dispatcher: Dispatcher) -> Callable[[F], F]:
    """Decorator for a method that takes messages: `llm_chat_callback` in a span, where observed."""
    return _endpoint(dispatcher, llm_chat_callback())


def completion_endpoint(dispatcher: Dispatcher) -> Callable[[F], F]:
    """The same for a method that takes a prompt."""
    return _endpoint(dispatcher, llm_completion_callback())


def _endpoint(dispatcher: Dispatcher, callback: Callable[..., Any]) -> Callable[[F], F]:
    def decorate(method: F) -> F:
        announced: Any = dispatcher.span(callback(method))
        # The callback's mark, `True`, where `inspect.signature` looks for a function.
        del method.__wrapped__  # type: ignore[attr-defined]
        if inspect.iscoroutinefunction(method):

            @functools.wraps(method)
            async def acall(self: Any, *args: Any, **kwargs: Any) -> Any:
                if is_observed(self, dispatcher):
                    return await announced.__get__(self)(*args, **kwargs)
                return await method(self, *args, **kwargs)

            endpoint: Any = acall
        else:

            @functools.wraps(method)
            def call(self: Any, *args: Any, **kwargs: Any) -> Any:
                if is_observed(self, dispatcher):
                    return announced.__get__(self)(*args, **kwargs)
                return method(self, *args, **kwargs)

            endpoint = call
        # LlamaIndex wraps each endpoint of a new class that is not marked so.
        setattr(endpoint, DISPATCHER_SPAN_DECORATED_ATTR, True)
        return cast("F", endpoint)

    return decorate
