"""Answers: text, usage, metadata, log probabilities, several answers, streams."""

import asyncio
import warnings

import pytest
from langchain_calls import AsyncCountingHandler, CountingHandler
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGenerationChunk

from engine import RequestError, RequestTimeoutError
from llm_connectors.langchain import ChatLocal, LocalLLM

USAGE = {
    "input_tokens": 3,
    "output_tokens": 3,
    "total_tokens": 6,
    "input_token_details": {"cache_read": 2, "cache_creation": 0},
    "output_token_details": {"reasoning": 0},
}


def merged(chunks):
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    return total


def collect(model, text, **kwargs):
    async def run():
        return [chunk async for chunk in model.astream(text, **kwargs)]

    return asyncio.run(run())


@pytest.fixture(params=["stream", "astream"])
def stream(request):
    """A function that collects a stream, synchronously or not."""
    if request.param == "astream":
        return collect
    return lambda model, text, **kwargs: list(model.stream(text, **kwargs))


def test_invoke(chat):
    message = chat.invoke("abc")
    assert isinstance(message, AIMessage)
    assert message.content == "cba"
    assert message.usage_metadata == USAGE
    metadata = message.response_metadata
    assert metadata["model_name"] == "fake-model"
    assert metadata["model_provider"] == chat._get_ls_params()["ls_provider"] == "llm-connectors"
    assert (metadata["finish_reason"], metadata["stop_reason"]) == ("stop", None)
    assert set(metadata["timings"]) >= {"queue_s", "time_to_first_token_s", "total_s"}
    assert asyncio.run(chat.ainvoke("abc")).content == "cba"


@pytest.mark.parametrize(
    ("options", "text", "finish_reason", "stop_reason"),
    [({"stop": ["b"]}, "c", "stop", "b"), ({"max_tokens": 2}, "cb", "length", None)],
)
def test_why_the_answer_ended(chat, stream, options, text, finish_reason, stop_reason):
    for message in (chat.invoke("abc", **options), merged(stream(chat, "abc", **options))):
        assert message.content == text
        assert message.response_metadata["finish_reason"] == finish_reason
        assert message.response_metadata["stop_reason"] == stop_reason


def test_stream_ends_in_one_last_chunk_with_everything(chat, fake_engine, stream):
    fake_engine.step_s = 0.002
    chunks = stream(chat, "abcdef")
    assert len(chunks) > 2
    assert "".join(chunk.content for chunk in chunks) == "fedcba"
    assert [chunk.chunk_position for chunk in chunks] == [None] * (len(chunks) - 1) + ["last"]
    assert [chunk.usage_metadata is not None for chunk in chunks].count(True) == 1
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(isinstance(chunk, AIMessageChunk) for chunk in chunks)
    whole, single = merged(chunks), chat.invoke("abcdef")
    assert whole.usage_metadata == single.usage_metadata
    for name in ("model_name", "model_provider", "finish_reason", "stop_reason"):
        assert whole.response_metadata[name] == single.response_metadata[name]
    assert "total_s" in whole.response_metadata["timings"]


def test_stream_without_usage(chat, stream):
    assert all(chunk.usage_metadata is None for chunk in stream(chat, "ab", stream_usage=False))
    chat.stream_usage = False
    assert all(chunk.usage_metadata is None for chunk in stream(chat, "ab"))


def test_no_empty_chunks_but_the_last(chat, fake_engine, stream):
    """A stop string that is held back, or half a character, makes steps without text."""
    fake_engine.step_s = 0.002
    chunks = stream(chat, "___a___b___c")
    assert "".join(chunk.content for chunk in chunks) == "cba"
    assert all(chunk.content for chunk in chunks[:-1])


def test_logprobs_in_openais_shape(chat, stream):
    message = chat.invoke("ab", logprobs=True, top_logprobs=1)
    expected = {
        "content": [
            {
                "token": token,
                "bytes": [ord(token)],
                "logprob": -1.0,
                "top_logprobs": [{"token": "?", "bytes": [63], "logprob": -0.5}],
            }
            for token in "ba"
        ]
    }
    assert message.response_metadata["logprobs"] == expected
    whole = merged(stream(chat, "ab", logprobs=True, top_logprobs=1))
    assert whole.response_metadata["logprobs"] == expected
    assert "logprobs" not in chat.invoke("ab").response_metadata
    only_sampled = chat.invoke("ab", logprobs=True).response_metadata["logprobs"]
    assert only_sampled["content"][0]["top_logprobs"] == []


def test_bytes_of_half_characters_are_unknown():
    from engine import Logprob
    from llm_connectors.langchain._outputs import _token

    assert _token(Logprob(-1.0, 1, "\ufffd"))["bytes"] is None
    assert _token(Logprob(-1.0, 1, "é"))["bytes"] == [195, 169]


def test_prompt_logprobs(model, chat, stream):
    first, second = chat.invoke("ab", prompt_logprobs=0).response_metadata["prompt_logprobs"]
    assert first is None
    assert second == {"token": "b", "bytes": [98], "logprob": -1.0, "top_logprobs": []}
    whole = merged(stream(chat, "ab", prompt_logprobs=0))
    assert whole.response_metadata["prompt_logprobs"] == [first, second]


def test_several_answers(chat, fake_engine):
    result = chat.generate_prompt([chat._convert_input("ab")], n=3)
    assert [one.text for one in result.generations[0]] == ["ba"] * 3
    usages = [one.message.usage_metadata for one in result.generations[0]]
    assert usages[0]["output_tokens"] == 6
    assert usages[1:] == [None, None], "sums over generations must be right"
    assert LocalLLM(engine=fake_engine, n=2).generate(["ab"]).generations[0][1].text == "ba"


def test_several_answers_and_a_listening_handler(chat):
    """LangGraph's handlers turn `invoke` into a stream where they can; here they must not."""
    from langchain_core.tracers._streaming import _StreamingCallbackHandler

    class Watcher(CountingHandler, _StreamingCallbackHandler):
        def tap_output_aiter(self, run_id, output):
            return output

        def tap_output_iter(self, run_id, output):
            return output

    watcher = Watcher()
    assert chat.invoke("ab", {"callbacks": [watcher]}, n=2).content == "ba"
    assert watcher.counts["token"] == 0
    assert chat.invoke("ab", {"callbacks": [watcher]}).content == "ba"
    assert watcher.counts["token"] > 0


def test_text_generations(llm):
    result = llm.generate(["ab", "cd"], logprobs=True)
    first = result.generations[0][0]
    assert first.text == "ba"
    info = first.generation_info
    assert (info["finish_reason"], info["model_name"]) == ("stop", "fake-model")
    assert info["usage"]["prompt_tokens"] == 2
    assert [one["token"] for one in info["logprobs"]["content"]] == ["b", "a"]
    assert result.llm_output["token_usage"]["total_tokens"] == 8


def test_text_stream(llm, fake_engine, stream):
    fake_engine.step_s = 0.001
    chunks = stream(llm, "abcdef")
    assert len(chunks) > 2
    assert "".join(chunks) == "fedcba"


def test_text_stream_tells_callbacks_the_usage(llm):
    ended = []

    class Handler(CountingHandler):
        def on_llm_end(self, response, **kwargs):
            ended.append(response.generations[0][0])

    list(llm.stream("abc", {"callbacks": [Handler()]}))
    assert ended[0].text == "cba"
    assert ended[0].generation_info["usage"]["total_tokens"] == 6
    assert ended[0].generation_info["finish_reason"] == "stop"


def test_callbacks_of_streams(model, fake_engine):
    fake_engine.step_s = 0.02  # so slow that no chunks are joined
    handler = CountingHandler()
    list(model.stream("abcdef", {"callbacks": [handler]}))
    tokens = handler.counts.pop("token")
    assert tokens > 2
    assert handler.counts == {"start": 1, "end": 1}
    awaited = AsyncCountingHandler()
    collect(model, "abcdef", config={"callbacks": [awaited]})
    assert awaited.counts.pop("token") > 2
    assert awaited.counts == {"start": 1, "end": 1}


@pytest.mark.parametrize("verb", ["invoke", "ainvoke", "stream", "astream"])
def test_callbacks_of_failures(model, verb):
    from langchain_calls import VERBS

    handler = CountingHandler()
    with pytest.raises(RequestError, match="FAIL"):
        VERBS[verb](model, "FAIL", config={"callbacks": [handler]})
    assert handler.counts == {"start": 1, "error": 1}


def test_streaming_true_streams_inside_invoke(fake_engine):
    chat = ChatLocal(engine=fake_engine, streaming=True)
    handler = CountingHandler()
    message = chat.invoke("abc", {"callbacks": [handler]})
    assert message.content == "cba"
    assert message.usage_metadata == USAGE
    assert handler.counts["token"] > 0
    assert not isinstance(message, AIMessageChunk)


def test_configured_models_still_stream(chat, fake_engine):
    """LangChain takes `streaming=False` for a ban once the field counts as set."""
    from langchain_core.runnables import ConfigurableField

    fake_engine.step_s = 0.002
    configurable = chat.configurable_fields(temperature=ConfigurableField(id="t"))
    chunks = list(configurable.stream("abcdef", {"configurable": {"t": 0.5}}))
    assert len(chunks) > 2


@pytest.mark.parametrize("verb", ["invoke", "ainvoke", "stream", "astream"])
def test_timeout(model, fake_engine, verb):
    from langchain_calls import VERBS

    fake_engine.step_s = 0.001
    with pytest.raises(RequestTimeoutError, match=r"0\.05"):
        VERBS[verb](model, "x" * 5000, timeout=0.05)
    fake_engine.step_s = 0.0
    model.timeout = 60
    VERBS[verb](model, "ab")
    assert len(fake_engine.aborted) == 1


def test_a_stream_aborted_from_outside_ends_with_a_last_chunk(chat, fake_engine):
    fake_engine.step_s = 0.002
    chunks = []
    for chunk in chat.stream("x" * 5000):
        chunks.append(chunk)
        if len(chunks) == 3:
            fake_engine._abort(fake_engine.requests[0])
    assert chunks[-1].chunk_position == "last"
    assert chunks[-1].response_metadata["finish_reason"] == "abort"


def test_v1_content_and_v3_events(fake_engine):
    from langchain_tests.utils.stream_lifecycle import assert_valid_event_stream

    fake_engine.step_s = 0.001
    chat = ChatLocal(engine=fake_engine, output_version="v1")
    assert merged(list(chat.stream("abc"))).content[0]["text"] == "cba"
    with warnings.catch_warnings(action="ignore"):  # "beta", and only at the first call
        stream = chat.stream_events("abc", version="v3")
    assert_valid_event_stream(list(stream))
    assert stream.output.content[0]["text"] == "cba"


def test_native_stream_methods_yield_generation_chunks(chat):
    chunks = list(chat._stream(chat._convert_input("ab").to_messages()))
    assert all(isinstance(chunk, ChatGenerationChunk) for chunk in chunks)
    assert chunks[-1].generation_info["finish_reason"] == "stop"
