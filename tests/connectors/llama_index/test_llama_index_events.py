"""Instrumentation, callbacks and token counts: once per request. Fake engine."""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import llama_index_instrumentation as instrument
import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.instrumentation.event_handlers.base import BaseEventHandler
from llama_index.core.instrumentation.events.base import BaseEvent
from llama_index.core.rate_limiter import BaseRateLimiter
from llama_index_fake_engine import FakeEngine
from llama_index_instrumentation.span_handlers import NullSpanHandler

from llm_connectors.llama_index import ContextOverflowError, LocalLLM

USER = [ChatMessage(content="What is the capital of France?")]
ENDPOINTS = (
    "chat",
    "achat",
    "stream_chat",
    "astream_chat",
    "complete",
    "acomplete",
    "stream_complete",
    "astream_complete",
)
BATCHES = ("batch_complete", "abatch_complete", "batch_chat", "abatch_chat")


class Recorder(BaseEventHandler):
    """Keeps every event."""

    events: list[Any] = []  # noqa: RUF012

    def handle(self, event: BaseEvent, **_: Any) -> None:
        self.events.append(event)

    def counts(self) -> Counter[str]:
        return Counter(type(event).__name__ for event in self.events)


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    dispatcher = instrument.get_dispatcher()
    handler = Recorder(events=[])
    dispatcher.add_event_handler(handler)
    yield handler
    dispatcher.event_handlers.remove(handler)


def run(llm: LocalLLM, endpoint: str, **kwargs: Any) -> int:
    """Exhaust one endpoint; gives the number of requests it made."""
    one = USER if endpoint.endswith("chat") else "What is it?"
    is_batch = "batch" in endpoint
    result = getattr(llm, endpoint)([one] * 3 if is_batch else one, **kwargs)
    if inspect.iscoroutine(result):

        async def drain() -> None:
            response = await result
            if isinstance(response, AsyncGenerator):
                async for _ in response:
                    pass

        asyncio.run(drain())
    elif "stream" in endpoint:
        list(result)
    return 3 if is_batch else 1


@pytest.mark.parametrize("endpoint", [*ENDPOINTS, *BATCHES])
def test_start_and_end_once_per_request(
    llm: LocalLLM, fake: FakeEngine, recorder: Recorder, endpoint: str
) -> None:
    num_requests = run(llm, endpoint, top_k=3)
    kind = "LLMChat" if endpoint.endswith("chat") else "LLMCompletion"
    counts = recorder.counts()
    chunks = counts.pop(f"{kind}InProgressEvent", 0)
    assert (chunks >= 1) == ("stream" in endpoint)
    assert {name: count for name, count in counts.items() if "Span" not in name} == {
        f"{kind}StartEvent": num_requests,
        f"{kind}EndEvent": num_requests,
    }
    assert len(fake.requests) == num_requests
    starts = [event for event in recorder.events if "Start" in type(event).__name__]
    assert all(event.additional_kwargs == {"top_k": 3} for event in starts)
    assert starts[0].model_dict["model_name"] == "fake"


@pytest.mark.parametrize("endpoint", [*ENDPOINTS, *BATCHES])
def test_nothing_is_made_for_nobody(
    llm: LocalLLM, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    """Without a handler no event is built; with one it is."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an event was announced")

    for name in ("LLMChatStartEvent", "LLMCompletionStartEvent"):
        monkeypatch.setattr(f"llama_index.core.llms.callbacks.{name}", refuse)
    assert run(llm, endpoint) == len(fake.requests)
    watched = LocalLLM(engine=fake, callback_manager=CallbackManager([TokenCountingHandler()]))
    with pytest.raises(AssertionError, match="an event was announced"):
        run(watched, endpoint)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_an_endpoint_keeps_its_name_and_signature(endpoint: str) -> None:
    method = getattr(LocalLLM, endpoint)
    assert method.__name__ == endpoint
    first = "messages" if endpoint.endswith("chat") else "prompt"
    assert list(inspect.signature(method).parameters)[:2] == ["self", first]
    assert inspect.iscoroutinefunction(method) == endpoint.startswith("a")


def test_a_span_handler_anywhere_is_served(llm: LocalLLM, fake: FakeEngine) -> None:
    """Spans are told with the class, the method and their parent, as of any LlamaIndex class."""
    entered: list[str] = []

    class Spans(NullSpanHandler):
        def span_enter(self, id_: str, *_: Any, **__: Any) -> None:
            entered.append(id_.partition("-")[0])

    class Own(Spans):
        pass

    dispatcher = instrument.get_dispatcher("llm_connectors.llama_index.local_llm")
    handler = Own()
    dispatcher.add_span_handler(handler)
    try:
        for endpoint in ENDPOINTS:
            run(llm, endpoint)
    finally:
        dispatcher.span_handlers.remove(handler)
    assert entered == [f"LocalLLM.{endpoint}" for endpoint in ENDPOINTS]


@pytest.mark.parametrize("endpoint", [*ENDPOINTS, *BATCHES])
def test_tokens_are_counted_once(fake: FakeEngine, endpoint: str) -> None:
    handler = TokenCountingHandler(tokenizer=lambda text: [0] * len(text))
    llm = LocalLLM(engine=fake, callback_manager=CallbackManager([handler]))
    num_requests = run(llm, endpoint)
    counted = handler.llm_token_counts
    assert len(counted) == num_requests
    assert sum(event.prompt_token_count for event in counted) == sum(
        len(request.prompt_ids) for request in fake.requests
    )
    assert sum(event.completion_token_count for event in counted) == sum(
        len(request.pieces) for request in fake.requests
    )


@pytest.mark.parametrize("endpoint", [*ENDPOINTS, "batch_complete"])
def test_a_failed_request_has_no_end_event(
    llm: LocalLLM, recorder: Recorder, endpoint: str
) -> None:
    with pytest.raises(ContextOverflowError):
        run(llm, endpoint, max_tokens=10**6)
    counts = recorder.counts()
    assert not [name for name in counts if name.endswith("EndEvent") and "Span" not in name]
    assert not [name for name in counts if "InProgress" in name]


def test_spans_nest_under_the_endpoint(llm: LocalLLM, recorder: Recorder) -> None:
    llm.chat(USER)
    span_ids = {event.span_id for event in recorder.events if "LLMChat" in type(event).__name__}
    assert len(span_ids) == 1
    assert "chat" in span_ids.pop()


def test_rate_limiter_is_asked_once_per_request(fake: FakeEngine) -> None:
    class Limiter(BaseRateLimiter):
        num_asked = 0

        def acquire(self, num_tokens: int = 0) -> None:
            self.num_asked += 1

        async def async_acquire(self, num_tokens: int = 0) -> None:
            self.num_asked += 1

    for endpoint in (*ENDPOINTS, *BATCHES):
        limiter = Limiter()
        llm = LocalLLM(engine=fake, rate_limiter=limiter)
        assert run(llm, endpoint) == limiter.num_asked
