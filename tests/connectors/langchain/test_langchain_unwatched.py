"""Calls that nobody watches skip LangChain's event machinery; nothing else may differ."""

import asyncio
import threading
import time
import uuid

import pytest
from langchain_calls import CountingHandler
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import (
    AsyncCallbackManager,
    CallbackManager,
    get_usage_metadata_callback,
)
from langchain_core.globals import set_llm_cache
from langchain_core.runnables import RunnableLambda

from engine import ContextOverflowError, RequestError
from llm_connectors.langchain import ChatLocal
from llm_connectors.langchain.errors import LANGCHAIN_ERRORS


def call(chat, verb, inputs, config=None, **kwargs):
    """Answers of one of the four verbs, as a list."""
    if verb == "invoke":
        return [chat.invoke(one, config, **kwargs) for one in inputs]
    if verb == "batch":
        return chat.batch(inputs, config, **kwargs)
    if verb == "abatch":
        return asyncio.run(chat.abatch(inputs, config, **kwargs))

    async def run():
        return [await chat.ainvoke(one, config, **kwargs) for one in inputs]

    return asyncio.run(run())


VERBS = ("invoke", "ainvoke", "batch", "abatch")
every_verb = pytest.mark.parametrize("verb", VERBS)


@pytest.fixture
def no_events(monkeypatch):
    """Fail where LangChain would fire a start event."""

    def refuse(*args, **kwargs):
        raise AssertionError("an event was fired")

    monkeypatch.setattr(CallbackManager, "on_chat_model_start", refuse)
    monkeypatch.setattr(AsyncCallbackManager, "on_chat_model_start", refuse)


@every_verb
def test_no_event_is_fired_for_nobody(chat, no_events, verb):
    answers = call(chat, verb, ["ab", "cd"], max_tokens=2)
    assert [answer.content for answer in answers] == ["ba", "dc"]


@every_verb
def test_events_are_fired_for_a_handler(chat, no_events, verb):
    with pytest.raises(AssertionError, match="an event was fired"):
        call(chat, verb, ["ab", "cd"], {"callbacks": [CountingHandler()]})
    watched = ChatLocal(engine=chat.engine, callbacks=[CountingHandler()])
    with pytest.raises(AssertionError, match="an event was fired"):
        call(watched, verb, ["ab", "cd"])


@every_verb
@pytest.mark.parametrize("output_version", ["v0", "v1"])
def test_watched_and_unwatched_answers_are_equal(fake_engine, verb, output_version):
    chat = ChatLocal(engine=fake_engine, output_version=output_version, logprobs=True)
    plain = call(chat, verb, ["ab", "cd"], stop=["z"])
    watched = call(chat, verb, ["ab", "cd"], {"callbacks": [CountingHandler()]}, stop=["z"])
    for one, other in zip(plain, watched, strict=True):
        assert type(one) is type(other)
        metadata = [dict(answer.response_metadata, timings=None) for answer in (one, other)]
        assert metadata[0] == metadata[1]
        ignore = {"id", "response_metadata"}
        assert one.model_dump(exclude=ignore) == other.model_dump(exclude=ignore)
        assert len(one.id) == len(other.id)
    assert len({answer.id for answer in (*plain, *watched)}) == 4


def stream(chat, verb, text, config=None, **kwargs):
    """Pieces of `stream` or `astream`."""
    if verb == "stream":
        return list(chat.stream(text, config, **kwargs))

    async def run():
        return [piece async for piece in chat.astream(text, config, **kwargs)]

    return asyncio.run(run())


either_stream = pytest.mark.parametrize("verb", ["stream", "astream"])


@either_stream
def test_streams_fire_no_event_for_nobody(chat, no_events, verb):
    assert "".join(piece.content for piece in stream(chat, verb, "abc")) == "cba"
    with pytest.raises(AssertionError, match="an event was fired"):
        stream(chat, verb, "abc", {"callbacks": [CountingHandler()]})
    with get_usage_metadata_callback(), pytest.raises(AssertionError, match="an event was fired"):
        stream(chat, verb, "abc")


@either_stream
@pytest.mark.parametrize("output_version", ["v0", "v1"])
@pytest.mark.parametrize("options", [{}, {"logprobs": True}, {"stop": ["b"]}, {"max_tokens": 1}])
def test_watched_and_unwatched_streams_are_equal(fake_engine, verb, output_version, options):
    chat = ChatLocal(engine=fake_engine, output_version=output_version)
    run_id = uuid.uuid4()
    plain = stream(chat, verb, "abc", {"run_id": run_id}, **options)
    watched = stream(
        chat, verb, "abc", {"run_id": run_id, "callbacks": [CountingHandler()]}, **options
    )
    assert {piece.id for piece in (*plain, *watched)} == {f"lc_run--{run_id}"}
    sums = []
    for pieces in (plain, watched):
        total = pieces[0]
        for piece in pieces[1:]:
            total += piece
        assert pieces[-1].chunk_position == "last"
        metadata = dict(total.response_metadata, timings=None)
        sums.append((total.model_dump(exclude={"response_metadata"}), metadata))
    assert sums[0] == sums[1]
    assert len({piece.id for piece in (plain[0], stream(chat, verb, "abc")[0])}) == 2


@either_stream
def test_streams_that_are_switched_off(fake_engine, verb):
    chat = ChatLocal(engine=fake_engine, disable_streaming=True)
    (whole,) = stream(chat, verb, "abc")
    assert whole.content == "cba"
    with pytest.raises(RequestError, match="n=2"):
        stream(ChatLocal(engine=fake_engine), verb, "abc", n=2)


@every_verb
def test_the_run_id_of_the_config_is_used(chat, verb):
    run_id = uuid.uuid4()
    inputs = ["ab"] if "invoke" in verb else ["ab", "cd"]
    configs = {"run_id": run_id}
    if "batch" in verb:
        configs = [configs, {}]
    assert call(chat, verb, inputs, configs)[0].id == f"lc_run--{run_id}-0"


@every_verb
def test_handlers_of_a_context_are_seen(chat, verb):
    with get_usage_metadata_callback() as usage:
        call(chat, verb, ["abc", "abc"])
    assert usage.usage_metadata["fake-model"]["output_tokens"] == 6


@pytest.mark.parametrize("verb", ["invoke", "ainvoke"])
def test_handlers_of_a_surrounding_chain_are_seen(chat, verb):
    handler = CountingHandler()
    if verb == "invoke":
        RunnableLambda(chat.invoke).invoke("ab", {"callbacks": [handler]})
    else:

        async def ask(text):
            return await chat.ainvoke(text)

        asyncio.run(RunnableLambda(ask).ainvoke("ab", {"callbacks": [handler]}))
    assert handler.counts == {"start": 1, "end": 1}


@every_verb
def test_a_global_cache_is_used(chat, fake_engine, verb):
    set_llm_cache(InMemoryCache())
    try:
        call(chat, verb, ["ab", "cd"])
        call(chat, verb, ["ab", "cd"])
    finally:
        set_llm_cache(None)
    assert len(fake_engine.requests) == 2


@every_verb
@pytest.mark.parametrize("bad", ["FAIL", "REFUSE", "x" * 20_000], ids=["late", "early", "long"])
def test_errors_are_langchains_and_ours(chat, bad, verb):
    expected = ContextOverflowError if len(bad) > 10 else RequestError
    with pytest.raises(expected) as caught:
        call(chat, verb, [bad, "ab"])
    assert type(caught.value) in LANGCHAIN_ERRORS._targets


@pytest.mark.parametrize("verb", ["batch", "abatch"])
@pytest.mark.parametrize(
    "bad", ["FAIL", "REFUSE", "x" * 20_000, [], 7], ids=["late", "early", "long", "empty", "number"]
)
def test_errors_stay_with_their_item(chat, fake_engine, bad, verb):
    first, error, last = call(chat, verb, ["aa", bad, "bb"], return_exceptions=True)
    assert (first.content, last.content) == ("aa", "bb")
    assert isinstance(error, ValueError if bad == 7 else RequestError)
    assert all(
        request.finish_reason == "stop" for request in fake_engine.requests if not request.error
    )


@pytest.mark.parametrize("verb", ["batch", "abatch"])
def test_bad_options_fail_every_item(chat, verb):
    outcomes = call(chat, verb, ["aa", 7, "bb"], return_exceptions=True, nonsense=1)
    assert [type(one).__mro__[1] for one in (outcomes[0], outcomes[2])] == [RequestError] * 2
    assert isinstance(outcomes[1], ValueError)
    with pytest.raises(RequestError, match="nonsense"):
        call(chat, verb, ["aa", "bb"], nonsense=1)


def test_abatch_is_one_hand_over_rendered_in_a_worker_thread(chat, fake_engine):
    inputs = [f"prompt {index}" for index in range(20)]
    answers = asyncio.run(chat.abatch(inputs))
    assert [answer.content for answer in answers] == [text[::-1] for text in inputs]
    assert fake_engine.hand_overs == [20]
    assert fake_engine.last_render.thread is not threading.main_thread()


@pytest.mark.parametrize("bad", ["FAIL", "REFUSE"])
def test_the_first_error_of_abatch_aborts_the_rest(chat, fake_engine, bad):
    fake_engine.step_s = 0.002
    with pytest.raises(RequestError, match=bad):
        asyncio.run(chat.abatch([bad, "x" * 3000, "y" * 3000]))
    wait_until(lambda: len(fake_engine.aborted) == 2)


def test_cancelling_abatch_aborts_everything(chat, fake_engine):
    fake_engine.step_s = 0.002

    async def run():
        task = asyncio.create_task(chat.abatch(["x" * 3000] * 5))
        while len(fake_engine.requests) < 5:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    wait_until(lambda: len(fake_engine.aborted) == 5)


@pytest.mark.parametrize("how", ["field", "keyword"])
def test_abatch_keeps_each_items_time_limit(fake_engine, how):
    fake_engine.step_s = 0.005
    limit = {"timeout": 0.2}
    chat = ChatLocal(engine=fake_engine, **(limit if how == "field" else {}))
    inputs = ["x" * 2000, "ab", "y" * 2000]
    started_s = time.monotonic()
    slow, fast, other = asyncio.run(
        chat.abatch(inputs, return_exceptions=True, **(limit if how == "keyword" else {}))
    )
    assert time.monotonic() - started_s < 2.0
    assert fast.content == "ba"
    assert isinstance(slow, TimeoutError)
    assert isinstance(other, TimeoutError)


def wait_until(condition, limit_s=5.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)
