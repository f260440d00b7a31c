"""The eight endpoints: types, chunks, usage, options, errors. Fake engine."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncGenerator, Generator
from typing import Any

import pytest
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    ImageBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import LLM
from llama_index.core.prompts import PromptTemplate
from llama_index_fake_engine import BOS_ID, CHATML, NO_SYSTEM, FakeEngine

import engine
from llm_connectors.llama_index import (
    ConfigError,
    ConstraintError,
    ContextOverflowError,
    LocalLLM,
    RequestError,
    UnsupportedBlockError,
)
from llm_connectors.llama_index.messages import template_messages

USER = [ChatMessage(content="What is the capital of France?")]
PROMPT = "What is the capital of France?"
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
SWALLOWED = (ValueError, TypeError, RuntimeError)


def call(llm: LocalLLM, endpoint: str, source: Any = None, **kwargs: Any) -> list[Any]:
    """All responses of one endpoint; a non-streaming one gives a single response."""
    if source is None:
        source = USER if endpoint.endswith("chat") else PROMPT
    result = getattr(llm, endpoint)(source, **kwargs)
    if inspect.iscoroutine(result):

        async def drain() -> list[Any]:
            response = await result
            if isinstance(response, AsyncGenerator):
                return [chunk async for chunk in response]
            return [response]

        return asyncio.run(drain())
    return list(result) if isinstance(result, Generator) else [result]


def text_of(response: ChatResponse | CompletionResponse) -> str:
    return response.message.content if isinstance(response, ChatResponse) else response.text


def test_class_hierarchy(llm: LocalLLM) -> None:
    names = [cls.__name__ for cls in LocalLLM.__mro__]
    assert BaseLLM.__name__ in names
    assert isinstance(llm, LLM)
    assert isinstance(llm, FunctionCallingLLM)
    assert llm.class_name() == "LocalLLM"


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_types(llm: LocalLLM, endpoint: str) -> None:
    expected = ChatResponse if endpoint.endswith("chat") else CompletionResponse
    responses = call(llm, endpoint)
    assert responses
    assert all(type(response) is expected for response in responses)


def test_stream_types(llm: LocalLLM) -> None:
    assert isinstance(llm.stream_chat(USER), Generator)
    assert isinstance(llm.stream_complete(PROMPT), Generator)

    async def check() -> None:
        for stream in (await llm.astream_chat(USER), await llm.astream_complete(PROMPT)):
            assert isinstance(stream, AsyncGenerator)
            await stream.aclose()

    asyncio.run(check())


@pytest.mark.parametrize("endpoint", [name for name in ENDPOINTS if "stream" in name])
def test_stream_equals_whole_answer(llm: LocalLLM, fake: FakeEngine, endpoint: str) -> None:
    fake.step_s = 0.01
    chunks = call(llm, endpoint)
    whole = call(llm, endpoint.replace("stream_", ""))[0]
    assert len(chunks) > 1
    assert text_of(chunks[-1]) == text_of(whole) != ""
    so_far = ""
    for chunk in chunks:
        so_far += chunk.delta
        assert text_of(chunk) == so_far
    finals = [chunk for chunk in chunks if chunk.raw is not None]
    assert finals == [chunks[-1]]
    assert finals[0].raw["finish_reason"] == whole.raw["finish_reason"]
    assert finals[0].raw["usage"] == whole.raw["usage"]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize(
    ("answer", "options", "finish_reason"),
    [
        ("", {}, "stop"),
        ("one", {"max_tokens": 1}, "stop"),
        ("one two three", {"max_tokens": 1}, "length"),
        ("one STOP two", {"stop": ["STOP"]}, "stop"),
        ("STOP", {"stop": "STOP"}, "stop"),
    ],
)
def test_one_final_chunk_always(
    endpoint: str, answer: str, options: dict[str, Any], finish_reason: str
) -> None:
    fake = FakeEngine(answer=lambda _prompt, _params: answer)
    final = call(LocalLLM(engine=fake), endpoint, **options)[-1]
    assert final.raw["finish_reason"] == finish_reason
    assert "STOP" not in text_of(final)
    assert final.raw["usage"]["prompt_tokens"] == len(fake.requests[-1].prompt_ids)
    fake.close()


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_usage_stands_in_both_places(llm: LocalLLM, fake: FakeEngine, endpoint: str) -> None:
    final = call(llm, endpoint)[-1]
    request = fake.requests[-1]
    expected = {
        "prompt_tokens": len(request.prompt_ids),
        "completion_tokens": len(request.pieces),
        "total_tokens": len(request.prompt_ids) + len(request.pieces),
    }
    assert final.additional_kwargs == expected
    assert expected.items() <= final.raw["usage"].items()
    assert final.raw["model"] == "fake"
    assert final.raw["request_id"] == request.request_id
    assert final.raw["metrics"]["total_s"] >= 0
    assert dict(final.raw)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_logprobs(llm: LocalLLM, fake: FakeEngine, endpoint: str) -> None:
    final = call(llm, endpoint, logprobs=2)[-1]
    pieces = fake.requests[-1].pieces
    assert [row[0].token for row in final.logprobs] == pieces
    assert all([item.token for item in row[1:]] == ["alt1", "alt2"] for row in final.logprobs)
    assert final.logprobs[0][0].bytes == list(pieces[0].encode())
    assert call(llm, endpoint)[-1].logprobs is None


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_call_options_override_and_never_persist(fake: FakeEngine, endpoint: str) -> None:
    llm = LocalLLM(engine=fake, temperature=0.5, stop=["A"], seed=1, priority=3, max_tokens=64)
    before = llm.to_dict()
    options = {"temperature": 0.9, "stop": ["B"], "seed": 7, "max_tokens": 5, "top_k": 4}
    call(llm, endpoint, **options, min_p=0.1, priority=-1, cache_salt="x")
    request = fake.requests[-1]
    assert request.params.stop == ("B",)
    assert (request.params.temperature, request.params.seed) == (0.9, 7)
    assert (request.params.max_tokens, request.params.top_k) == (5, 4)
    assert request.params.min_p == 0.1
    assert request.kwargs == {"priority": -1, "cache_salt": "x"}
    call(llm, endpoint)
    request = fake.requests[-1]
    assert (request.params.temperature, request.params.stop) == (0.5, ("A",))
    assert (request.params.max_tokens, request.params.seed) == (64, 1)
    assert request.kwargs == {"priority": 3, "cache_salt": None}
    assert llm.to_dict() == before


def test_every_sampling_field_reaches_the_engine(fake: FakeEngine) -> None:
    options = {
        "temperature": 0.3,
        "top_p": 0.8,
        "top_k": 5,
        "min_p": 0.05,
        "seed": 11,
        "stop": ("x",),
        "stop_token_ids": (3,),
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "max_tokens": 9,
        "min_tokens": 2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.1,
        "logit_bias": {4: 1.5},
        "bad_words": ("bad",),
        "logprobs": 1,
        "skip_special_tokens": False,
    }
    wanted = engine.SamplingParams(**options)
    LocalLLM(engine=fake, **options).complete(PROMPT)
    assert fake.requests[-1].params == wanted
    LocalLLM(engine=fake).complete(PROMPT, **options)
    assert fake.requests[-1].params == wanted
    LocalLLM(engine=fake, additional_kwargs=options).complete(PROMPT)
    assert fake.requests[-1].params == wanted


def test_fields_changed_between_calls_count(fake: FakeEngine) -> None:
    """Options of calls without keywords are made once; a change must make them anew."""
    llm = LocalLLM(engine=fake, stop=["x"], additional_kwargs={"seed": 1}, timeout=9.0)
    llm.complete(PROMPT)
    first = fake.requests[-1].params
    llm.complete(PROMPT)
    assert fake.requests[-1].params is first
    llm.stop.append("y")  # type: ignore[union-attr]
    llm.complete(PROMPT)
    assert fake.requests[-1].params.stop == ("x", "y")
    llm.temperature = 0.5
    llm.additional_kwargs["seed"] = 2
    llm.priority = 3
    llm.complete(PROMPT)
    changed = fake.requests[-1].params
    assert (changed.temperature, changed.stop, changed.seed) == (0.5, ("x", "y"), 2)
    assert fake.requests[-1].kwargs["priority"] == 3


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"temprature": 1.0}, RequestError, "'temperature'"),
        ({"timout": 1.0}, RequestError, "'timeout'"),
        ({"temperature": -1.0}, RequestError, "temperature"),
        ({"n": 2}, RequestError, "batch_complete"),
        ({"prompt_logprobs": 1}, RequestError, "prompt_logprobs"),
        ({"timeout": 0}, RequestError, "timeout"),
        ({"json_schema": "{"}, ConstraintError, "json_schema"),
        ({"tools": "f"}, RequestError, "tools"),
        ({"tools": [print]}, RequestError, "FunctionTool"),
        ({"tool_choice": "f"}, RequestError, "tool_choice"),
        ({"thinking": 3}, RequestError, "thinking"),
        ({"thinking": True}, RequestError, "reasoning"),
        ({"tool_parser": "hermse"}, ConfigError, "'hermes'"),
        ({"response_format": "json"}, RequestError, "response_format"),
        ({"max_tokens": 10**6}, ContextOverflowError, "4096"),
        ({"stop": "a", "stop_sequences": "b"}, RequestError, "stop"),
    ],
)
def test_bad_options_raise_what_llama_index_does_not_swallow(
    llm: LocalLLM,
    fake: FakeEngine,
    endpoint: str,
    options: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error, match=words) as caught:
        call(llm, endpoint, **options)
    assert isinstance(caught.value, engine.EngineError)
    assert not isinstance(caught.value, SWALLOWED)
    assert fake.requests == []


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"temprature": 1.0}, RequestError, "temperature"),
        ({"temperature": 101.0}, RequestError, "temperature"),
        ({"additional_kwargs": {"min_tokns": 1}}, RequestError, "min_tokens"),
        ({"n": 3}, RequestError, "batch_complete"),
    ],
)
def test_bad_fields_fail_in_the_constructor(
    fake: FakeEngine, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        LocalLLM(engine=fake, **options)


def test_constructor_needs_a_model_and_known_engine_options() -> None:
    with pytest.raises(ConfigError, match="No model"):
        LocalLLM()
    with pytest.raises(ConfigError, match="max_model_len"):
        LocalLLM("any", engine_kwargs={"max_model_length": 3})


# ---- prompts


def test_prompt_ids_equal_the_templates(llm: LocalLLM, fake: FakeEngine) -> None:
    messages = [
        ChatMessage(content="Be brief.", role=MessageRole.SYSTEM),
        ChatMessage(content="Hi", role="user"),
        ChatMessage(content="Hello", role="chatbot"),
        ChatMessage(blocks=[TextBlock(text="one"), TextBlock(text="two")]),
    ]
    llm.chat(messages)
    assert fake.requests[-1].prompt_ids == fake.apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "one\ntwo"},
        ]
    )
    assert fake.requests[-1].prompt_ids.count(BOS_ID) == 1
    assert llm.count_messages(messages) == len(fake.requests[-1].prompt_ids)


def test_complete_on_a_chat_model_is_one_user_message(llm: LocalLLM, fake: FakeEngine) -> None:
    llm.complete(PROMPT)
    assert fake.requests[-1].prompt_ids == fake.apply_chat_template(
        [{"role": "user", "content": PROMPT}]
    )


def test_formatted_prompts_are_used_as_they_stand(llm: LocalLLM, fake: FakeEngine) -> None:
    llm.complete("<|im_start|>user\nHi<|im_end|>", formatted=True)
    ids = fake.requests[-1].prompt_ids
    assert ids == fake.tokenize(
        "<|im_start|>user\nHi<|im_end|>", add_special_tokens=False, parse_special=True
    )
    assert BOS_ID not in ids
    assert fake.detokenize(ids[:1]) == "<|im_start|>"


def test_base_model_gets_one_bos() -> None:
    fake = FakeEngine(template=None)
    llm = LocalLLM(engine=fake)
    for text, formatted in (("Once", False), ("Once", True), ("<s>Once", True)):
        llm.complete(text, formatted=formatted)
        ids = fake.requests[-1].prompt_ids
        assert ids[0] == BOS_ID
        assert ids.count(BOS_ID) == 1
        assert fake.detokenize(ids) == "<s>Once"
    llm.chat(USER)
    assert fake.detokenize(fake.requests[-1].prompt_ids) == f"<s>user: {PROMPT}\nassistant: "
    fake.close()


def test_the_users_prompt_functions_replace_the_template(fake: FakeEngine) -> None:
    llm = LocalLLM(
        engine=fake,
        messages_to_prompt=lambda messages: f"<s>[INST]{messages[-1].content}",
        completion_to_prompt=lambda prompt: f"[Q]{prompt}",
    )
    llm.chat(USER)
    assert fake.detokenize(fake.requests[-1].prompt_ids) == f"<s>[INST]{PROMPT}"
    assert fake.requests[-1].prompt_ids.count(BOS_ID) == 1
    llm.complete(PROMPT)
    assert fake.detokenize(fake.requests[-1].prompt_ids) == f"<s>[Q]{PROMPT}"


def test_chat_template_by_field_and_by_call(fake: FakeEngine) -> None:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    LocalLLM(engine=fake, chat_template=template).chat(USER)
    assert fake.detokenize(fake.requests[-1].prompt_ids) == f"<s>[user] {PROMPT}"
    LocalLLM(engine=fake).chat(USER, chat_template=template)
    assert fake.detokenize(fake.requests[-1].prompt_ids) == f"<s>[user] {PROMPT}"


@pytest.mark.parametrize("endpoint", ["chat", "achat", "stream_chat", "astream_chat"])
@pytest.mark.parametrize(
    ("messages", "error", "words"),
    [
        (
            [ChatMessage(blocks=[TextBlock(text="a"), ImageBlock(url="http://a/b.png")])],
            UnsupportedBlockError,
            r"messages\[0\]\.blocks\[1\] is a ImageBlock",
        ),
        (
            [*USER, ChatMessage(role="user", blocks=[ToolCallBlock(tool_name="f")])],
            UnsupportedBlockError,
            r"messages\[1\]\.blocks\[0\] is a ToolCallBlock",
        ),
        (
            [ChatMessage(role="user", blocks=[ThinkingBlock(content="hm")])],
            UnsupportedBlockError,
            r"messages\[0\]\.blocks\[0\] is a ThinkingBlock",
        ),
        (
            [ChatMessage("x", role="assistant", additional_kwargs={"function_call": {"a": 1}})],
            RequestError,
            "function_call",
        ),
        (
            [ChatMessage("x", role="assistant", additional_kwargs={"tool_calls": [1]})],
            RequestError,
            "tool_calls",
        ),
        ([], RequestError, "empty"),
    ],
)
def test_what_the_model_cannot_read_is_refused(
    llm: LocalLLM, endpoint: str, messages: list[Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        call(llm, endpoint, messages)
    assert not isinstance(caught.value, SWALLOWED)


@pytest.mark.parametrize("messages", ["text", ["text"]])
def test_strings_are_no_messages(messages: Any) -> None:
    with pytest.raises(RequestError, match="ChatMessage"):
        template_messages(messages)


def test_messages_are_not_changed(llm: LocalLLM) -> None:
    messages = [ChatMessage(content="Hi", additional_kwargs={"id": 1})]
    before = [message.model_copy(deep=True) for message in messages]
    llm.chat(messages)
    assert messages == before


def test_system_prompt_in_predict_and_apredict(fake: FakeEngine) -> None:
    llm = LocalLLM(engine=fake, system_prompt="Be brief.")
    template = PromptTemplate("Say {word}.")
    wanted = fake.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hi."}]
    )
    llm.predict(template, word="hi")
    assert fake.requests[-1].prompt_ids == wanted
    asyncio.run(llm.apredict(template, word="hi"))
    assert fake.requests[-1].prompt_ids == wanted
    list(llm.stream(template, word="hi"))
    assert fake.requests[-1].prompt_ids == wanted
    llm.chat(USER)
    assert "brief" not in fake.detokenize(fake.requests[-1].prompt_ids)


# ---- metadata


def test_metadata_tells_the_truth() -> None:
    fake = FakeEngine("name", max_model_len=777)
    llm = LocalLLM(engine=fake, max_tokens=99)
    assert llm.metadata.context_window == 777
    assert llm.metadata.num_output == 99
    assert llm.metadata.is_chat_model is True
    assert llm.metadata.model_name == "name"
    assert llm.metadata.system_role is MessageRole.SYSTEM
    assert llm.metadata is llm.metadata
    llm.max_tokens = 50
    assert llm.metadata.num_output == 50
    assert LocalLLM(engine=fake, context_window=500).metadata.context_window == 500
    fake.close()


def test_metadata_of_other_templates() -> None:
    refusing, base = FakeEngine(template=NO_SYSTEM), FakeEngine(template=None)
    assert LocalLLM(engine=refusing).metadata.system_role is MessageRole.USER
    assert LocalLLM(engine=base).metadata.is_chat_model is False
    assert LocalLLM(engine=base, chat_template=CHATML).metadata.is_chat_model is True
    refusing.close()
    base.close()


def test_metadata_is_cheap(llm: LocalLLM, fake: FakeEngine, monkeypatch: Any) -> None:
    _ = llm.metadata
    monkeypatch.setattr(fake, "apply_chat_template", None)
    started_s = time.thread_time()  # what other processes do does not count
    for _ in range(1000):
        _ = llm.metadata
    assert time.thread_time() - started_s < 0.2


def test_own_context_window_is_enforced() -> None:
    fake = FakeEngine(max_model_len=1000, answer=lambda _prompt, _params: "word " * 500)
    llm = LocalLLM(engine=fake, context_window=100, max_tokens=80)
    with pytest.raises(ContextOverflowError, match="context_window=100"):
        llm.complete("word " * 30)
    assert fake.requests == []
    response = llm.complete("word", max_tokens=None)
    assert response.raw["usage"]["total_tokens"] == 100
    with pytest.raises(ConfigError, match="1000"):
        _ = LocalLLM(engine=fake, context_window=2000).metadata
    fake.close()


# ---- many at once


@pytest.mark.parametrize("is_async", [False, True])
def test_batches_are_one_hand_over(llm: LocalLLM, fake: FakeEngine, is_async: bool) -> None:
    prompts = [f"{'word ' * index}end" for index in range(12)]
    if is_async:
        responses = asyncio.run(llm.abatch_complete(prompts, max_tokens=20))
    else:
        responses = llm.batch_complete(prompts, max_tokens=20)
    assert fake.num_hand_overs == 1
    assert fake.peak_running == 12
    singles = [llm.complete(prompt, max_tokens=20) for prompt in prompts]
    assert [response.text for response in responses] == [one.text for one in singles]
    conversations = [[ChatMessage(content=prompt)] for prompt in prompts]
    if is_async:
        chats = asyncio.run(llm.abatch_chat(conversations))
    else:
        chats = llm.batch_chat(conversations)
    assert [chat.message.content for chat in chats] == [one.text for one in singles]
    assert llm.batch_complete([]) == []
    assert asyncio.run(llm.abatch_chat([])) == []


def test_a_batch_with_one_bad_prompt_starts_nothing(llm: LocalLLM, fake: FakeEngine) -> None:
    with pytest.raises(ContextOverflowError):
        llm.batch_complete(["fine", "word " * 5000])
    assert fake.requests == []


def test_with_options(llm: LocalLLM, fake: FakeEngine) -> None:
    base = LocalLLM(engine=fake, additional_kwargs={"min_tokens": 1, "top_k": 9}, temperature=0.5)
    sibling = base.with_options(temperature=0.0, top_k=3)
    assert sibling.engine is base.engine
    sibling.complete(PROMPT)
    params = fake.requests[-1].params
    assert (params.temperature, params.top_k, params.min_tokens) == (0.0, 3, 1)
    base.complete(PROMPT)
    params = fake.requests[-1].params
    assert (params.temperature, params.top_k, params.min_tokens) == (0.5, 9, 1)
    with pytest.raises(RequestError, match="temperature"):
        base.with_options(temperatur=1.0)
    with pytest.raises(RequestError, match="temperature"):
        base.with_options(temperature=-1.0)
    with pytest.raises(RequestError, match="model"):
        base.with_options(model="other")


def test_token_fn(llm: LocalLLM, fake: FakeEngine) -> None:
    assert llm.token_fn("<s>a b") == fake.tokenize("<s>a b", add_special_tokens=False)
    assert BOS_ID not in llm.token_fn("<s>a b")
