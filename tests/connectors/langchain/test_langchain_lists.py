"""List calls: one hand-over, order, errors kept apart, caps, callbacks, caching, cancellation."""

import asyncio
import threading
import time

import pytest
from langchain_calls import CountingHandler
from langchain_core.caches import InMemoryCache
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.tracers._streaming import _StreamingCallbackHandler

from engine import ContextOverflowError, RequestError, RequestTimeoutError
from llm_connectors.langchain import ChatLocal, LocalLLM, _batching


def text_of(answer):
    return answer.content if isinstance(answer, AIMessage) else answer


def wait_until(condition, limit_s=5.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


INPUTS = [f"prompt {index:02}" for index in range(20)]
ANSWERS = [text[::-1] for text in INPUTS]


def test_batch_is_one_hand_over_and_keeps_order(model, fake_engine):
    assert [text_of(one) for one in model.batch(INPUTS)] == ANSWERS
    assert fake_engine.hand_overs == [20]
    assert fake_engine.peak_running == 20


def test_generate_is_one_hand_over(model, fake_engine):
    prompts = [model._convert_input(one) for one in INPUTS]
    result = model.generate_prompt(prompts)
    assert [one[0].text for one in result.generations] == ANSWERS
    assert fake_engine.hand_overs == [20]
    assert result.llm_output["token_usage"] == {
        "prompt_tokens": 180,
        "completion_tokens": 180,
        "total_tokens": 360,
        "cached_tokens": 40,
    }
    assert len({one.run_id for one in result.run}) == 20


def test_async_lists_run_together(model, fake_engine):
    fake_engine.gate.clear()

    async def run():
        task = asyncio.create_task(model.abatch(INPUTS))
        while len(fake_engine.requests) < 20:
            await asyncio.sleep(0.001)
        fake_engine.gate.set()
        return await task

    assert [text_of(one) for one in asyncio.run(run())] == ANSWERS
    assert fake_engine.peak_running == 20


@pytest.mark.parametrize("wrap", ["sequence", "retry", "fallbacks", "bind", "configurable"])
def test_wrapped_batch_is_one_hand_over(model, fake_engine, wrap):
    wrapped = {
        "sequence": lambda: PromptTemplate.from_template("{it}") | model | StrOutputParser(),
        "retry": lambda: model.with_retry(stop_after_attempt=2),
        "fallbacks": lambda: model.with_fallbacks([model]),
        "bind": lambda: model.bind(temperature=0.5),
        "configurable": lambda: model.with_config(tags=["a"]),
    }[wrap]()
    inputs = [{"it": text} for text in INPUTS] if wrap == "sequence" else INPUTS
    assert [text_of(one) for one in wrapped.batch(inputs)] == ANSWERS
    assert fake_engine.hand_overs == [20]


def test_long_lists_are_handed_over_in_slices(model, fake_engine, monkeypatch):
    monkeypatch.setattr(_batching, "MAX_PROMPTS_PER_SUBMIT", 8)
    fake_engine.gate.clear()
    threading.Timer(0.1, fake_engine.gate.set).start()
    assert [text_of(one) for one in model.batch(INPUTS)] == ANSWERS
    assert fake_engine.hand_overs == [8, 8, 4]
    assert fake_engine.peak_running == 20, "later slices must not wait for earlier ones"


@pytest.mark.parametrize("cap", [1, 3, 19, 20, 50])
@pytest.mark.parametrize("verb", ["batch", "abatch", "batch_as_completed"])
def test_max_concurrency_caps_what_is_in_flight(model, fake_engine, cap, verb):
    config = {"max_concurrency": cap}
    if verb == "batch":
        answers = model.batch(INPUTS, config)
    elif verb == "abatch":
        answers = asyncio.run(model.abatch(INPUTS, config))
    else:
        done = dict(model.batch_as_completed(INPUTS, config))
        answers = [done[index] for index in range(20)]
    assert [text_of(one) for one in answers] == ANSWERS
    assert fake_engine.peak_running <= cap


def test_the_cap_is_a_window_not_waves(model, fake_engine):
    """While a long answer runs, short ones take turns beside it."""
    fake_engine.step_s = 0.002
    inputs = ["long " * 40, *["s"] * 12]
    finished = []
    for index, _answer in model.batch_as_completed(inputs, {"max_concurrency": 2}):
        finished.append(index)
    assert finished[-1] == 0, "the long one ends last; waves would have waited for it"
    assert fake_engine.peak_running == 2


def test_batch_as_completed_yields_in_order_of_completion(model, fake_engine):
    fake_engine.step_s = 0.002
    inputs = ["x" * 60, "y" * 30, "z"]
    assert [index for index, _answer in model.batch_as_completed(inputs)] == [2, 1, 0]


def test_leaving_batch_as_completed_aborts_the_rest(model, fake_engine):
    fake_engine.step_s = 0.002
    handler = CountingHandler()
    pairs = model.batch_as_completed(["z", "x" * 2000, "y" * 2000], {"callbacks": [handler]})
    assert next(pairs)[0] == 0
    pairs.close()
    wait_until(lambda: len(fake_engine.aborted) == 2)
    assert handler.counts == {"start": 3, "end": 1, "error": 2}


@pytest.mark.parametrize("bad", ["FAIL", "REFUSE", "x" * 20_000], ids=["late", "early", "long"])
@pytest.mark.parametrize("verb", ["batch", "abatch"])
def test_exceptions_stay_with_their_item(model, fake_engine, bad, verb):
    handler = CountingHandler()
    inputs = ["aa", bad, "bb"]
    config = {"callbacks": [handler]}
    if verb == "batch":
        first, error, last = model.batch(inputs, config, return_exceptions=True)
    else:
        first, error, last = asyncio.run(model.abatch(inputs, config, return_exceptions=True))
    assert (text_of(first), text_of(last)) == ("aa", "bb")
    assert isinstance(error, ContextOverflowError if len(bad) > 10 else RequestError)
    assert handler.counts == {"start": 3, "end": 2, "error": 1}
    assert sorted(handler.started) == sorted(handler.ended)


@pytest.mark.parametrize("bad", ["FAIL", "REFUSE"])
def test_the_first_error_ends_a_batch_and_aborts_the_rest(model, fake_engine, bad):
    fake_engine.step_s = 0.002
    handler = CountingHandler()
    with pytest.raises(RequestError, match=bad):
        model.batch([bad, "x" * 3000, "y" * 3000], {"callbacks": [handler]})
    wait_until(lambda: len(fake_engine.aborted) == 2)
    assert handler.counts == {"start": 3, "error": 3}
    assert all(isinstance(error, RequestError) for error in handler.errors)


def test_inputs_that_are_no_prompts(model, fake_engine):
    with pytest.raises(ValueError, match="Invalid input type"):
        model.batch(["a", 3])
    assert fake_engine.requests == []
    first, error = model.batch(["ab", 3], return_exceptions=True)
    assert text_of(first) == "ba"
    assert isinstance(error, ValueError)


@pytest.mark.parametrize("how", ["batch", "as_completed", "capped"])
def test_timeout_of_one_item(model, fake_engine, how):
    fake_engine.step_s = 0.001
    model.timeout = 0.3
    inputs = ["ab", "x" * 5000]
    if how == "batch":
        first, error = model.batch(inputs, return_exceptions=True)
    else:
        config = {"max_concurrency": 1} if how == "capped" else None
        done = dict(model.batch_as_completed(inputs, config, return_exceptions=True))
        first, error = done[0], done[1]
    assert text_of(first) == "ba"
    assert isinstance(error, RequestTimeoutError)
    wait_until(lambda: len(fake_engine.aborted) == 1)


def test_keyboard_interrupt_aborts_everything(model, fake_engine, monkeypatch):
    from engine import RequestHandle

    fake_engine.gate.clear()

    def interrupt(self, timeout=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(RequestHandle, "result", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.batch(INPUTS)
    wait_until(lambda: len(fake_engine.aborted) == 20)


def test_callbacks_of_each_item_and_of_the_model(model_class, fake_engine):
    ours, first, second = CountingHandler(), CountingHandler(), CountingHandler()
    model = model_class(engine=fake_engine, callbacks=[ours])
    model.batch(["a", "b"], [{"callbacks": [first]}, {"callbacks": [second]}])
    assert ours.counts == {"start": 2, "end": 2}
    assert first.counts == second.counts == {"start": 1, "end": 1}


@pytest.mark.parametrize("verb", ["batch", "generate"])
def test_tags_metadata_and_run_ids_reach_the_callbacks(model, verb):
    import uuid

    seen = []

    class Handler(CountingHandler):
        def on_chat_model_start(self, serialized, messages, **kwargs):
            seen.append(kwargs)

        def on_llm_start(self, serialized, prompts, **kwargs):
            seen.append(kwargs)

    run_id = uuid.uuid4()
    extras = {"tags": ["t"], "metadata": {"m": 1}, "run_name": "r", "run_id": run_id}
    if verb == "batch":
        configs = [{"callbacks": [Handler()], **extras}, {"callbacks": [Handler()]}]
        model.batch(["a", "b"], configs)
    else:
        prompts = [model._convert_input(one) for one in ("a", "b")]
        model.generate_prompt(prompts, callbacks=[Handler()], **extras)
    assert seen[0]["tags"] == ["t"]
    assert seen[0]["metadata"]["m"] == 1
    assert seen[0]["metadata"]["ls_provider"] == "llm-connectors"
    assert seen[0]["name"] == "r"
    assert seen[0]["run_id"] == run_id
    assert seen[0]["invocation_params"]["model"] == "fake-model"
    assert seen[0]["batch_size"] == 2


def test_batch_uses_and_fills_the_cache_that_invoke_uses(model_class, fake_engine):
    model = model_class(engine=fake_engine, cache=InMemoryCache())
    handler = CountingHandler()
    model.invoke("aa")
    answers = model.batch(["aa", "bc", "dd"], {"callbacks": [handler]})
    assert [text_of(one) for one in answers] == ["aa", "cb", "dd"]
    assert len(fake_engine.requests) == 3, "the first item was in the cache"
    assert handler.counts["end"] == handler.counts["start"] - handler.counts["error"]
    model.invoke("bc")
    model.batch(["aa", "dd"])
    assert len(fake_engine.requests) == 3
    # Another value of an option is another entry.
    model_class(engine=fake_engine, cache=model.cache, temperature=0.5).batch(["aa", "dd"])
    assert len(fake_engine.requests) == 5


def test_cache_hits_need_no_model(model_class, fake_engine):
    cache = InMemoryCache()
    model_class(engine=fake_engine, cache=cache).batch(["aa", "bb"])
    unloadable = model_class(model="fake-model", cache=cache)
    assert [text_of(one) for one in unloadable.batch(["aa", "bb"])] == ["aa", "bb"]


def test_call_options_and_the_cache(model_class, fake_engine):
    """`BaseLLM` leaves call options out of its key, so they must not be answered from it."""
    model = model_class(engine=fake_engine, cache=InMemoryCache())
    model.invoke("aa")
    model.batch(["aa", "bb"])
    asked = len(fake_engine.requests)
    assert asked == 2

    calls = [
        lambda: model.invoke("aa", temperature=0.1),
        lambda: asyncio.run(model.ainvoke("aa", temperature=0.2)),
        lambda: model.batch(["aa", "bb"], temperature=0.3),
        lambda: asyncio.run(model.abatch(["aa", "bb"], temperature=0.4)),
    ]
    for call, temperature in zip(calls, (0.1, 0.2, 0.3, 0.4), strict=True):
        call()
        new = fake_engine.requests[asked:]
        assert new, f"temperature={temperature} was answered with what was sampled at 1"
        assert {one.params.temperature for one in new} == {temperature}
        asked += len(new)
    model.invoke("aa")
    assert len(fake_engine.requests) == asked, "the entry made without options is still there"


def test_constructor_stop_is_part_of_the_cache_key(model_class, fake_engine):
    cache = InMemoryCache()
    assert text_of(model_class(engine=fake_engine, cache=cache).invoke("ab")) == "ba"
    cut = model_class(engine=fake_engine, cache=cache, stop=["a"])
    assert text_of(cut.invoke("ab")) == "b"
    assert [text_of(one) for one in cut.batch(["ab", "cd"])] == ["b", "dc"]


def test_cache_true_without_a_cache(model_class, fake_engine):
    with pytest.raises(ValueError, match="cache"):
        model_class(engine=fake_engine, cache=True).batch(["a", "b"])


@pytest.mark.parametrize("verb", ["batch", "batch_as_completed", "generate"])
def test_rate_limiter_and_streaming_handlers_get_single_calls(chat, fake_engine, verb):
    class Watcher(CountingHandler, _StreamingCallbackHandler):
        def tap_output_aiter(self, run_id, output):
            return output

        def tap_output_iter(self, run_id, output):
            return output

    def call(model, config=None):
        if verb == "batch":
            return [one.content for one in model.batch(["ab", "cd"], config)]
        if verb == "batch_as_completed":
            done = dict(model.batch_as_completed(["ab", "cd"], config))
            return [done[0].content, done[1].content]
        prompts = [model._convert_input(one) for one in ("ab", "cd")]
        result = model.generate_prompt(prompts, callbacks=(config or {}).get("callbacks"))
        return [one[0].text for one in result.generations]

    watcher = Watcher()
    assert call(chat, {"callbacks": [watcher]}) == ["ba", "dc"]
    assert watcher.counts["token"] >= 2
    assert fake_engine.hand_overs == [1, 1]

    limiter = InMemoryRateLimiter(requests_per_second=1000, check_every_n_seconds=0.001)
    limited = ChatLocal(engine=fake_engine, rate_limiter=limiter)
    assert call(limited) == ["ba", "dc"]
    assert fake_engine.hand_overs == [1, 1, 1, 1]


def test_single_calls_of_a_long_list_use_more_threads_than_langchains_default(fake_engine):
    chat = ChatLocal(engine=fake_engine, streaming=True)
    fake_engine.gate.clear()
    wanted = 48
    thread = threading.Thread(target=chat.batch, args=(["ab"] * wanted,))
    thread.start()
    try:
        wait_until(lambda: len(fake_engine.requests) == wanted)
    finally:
        fake_engine.gate.set()
        thread.join()


def test_streaming_text_model_reports_tokens(fake_engine):
    handler = CountingHandler()
    llm = LocalLLM(engine=fake_engine, streaming=True)
    assert llm.invoke("abc", {"callbacks": [handler]}) == "cba"
    assert llm.batch(["abc", "def"], {"callbacks": [handler]}) == ["cba", "fed"]
    assert asyncio.run(llm.ainvoke("abc", {"callbacks": [handler]})) == "cba"
    assert handler.counts["token"] >= 4
    assert handler.counts["start"] == handler.counts["end"] == 4


@pytest.mark.parametrize("verb", ["batch", "batch_as_completed", "abatch"])
def test_lists_of_none_and_of_one(model, fake_engine, verb):
    def call(inputs):
        if verb == "batch_as_completed":
            return [answer for _index, answer in model.batch_as_completed(inputs)]
        if verb == "abatch":
            return asyncio.run(model.abatch(inputs))
        return model.batch(inputs)

    assert call([]) == []
    assert [text_of(one) for one in call(["ab"])] == ["ba"]
    assert len(fake_engine.requests) == 1


def test_output_version_v1_in_a_batch(fake_engine):
    chat = ChatLocal(engine=fake_engine, output_version="v1")
    single = chat.invoke("ab")
    first, _second = chat.batch(["ab", "cd"])
    assert first.content == single.content == [{"type": "text", "text": "ba"}]
    assert first.response_metadata["output_version"] == "v1"


def test_batch_and_invoke_give_equal_messages(chat):
    single = chat.invoke("ab")
    first, second = chat.batch(["ab", "cd"])
    ignore = {"id", "response_metadata"}
    assert first.model_dump(exclude=ignore) == single.model_dump(exclude=ignore)
    assert first.response_metadata.keys() == single.response_metadata.keys()
    assert first.id.startswith("lc_run--")
    assert first.id != second.id
