"""LocalLLM on the real engine and the packaged demo model."""

from __future__ import annotations

import asyncio
import copy
import inspect
import pickle
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole

from engine import Engine, RequestTimeoutError
from llm_connectors.llama_index import ContextOverflowError, LocalLLM

pytestmark = pytest.mark.demo_model

USER = [ChatMessage(content="Name three colours.")]
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


@pytest.fixture(scope="module")
def demo_engine(demo_model: str) -> Iterator[Engine]:
    with Engine(demo_model, device="cpu", num_threads=1, max_model_len=1024) as engine:
        yield engine
        assert engine.stats().kv_blocks_used == 0


@pytest.fixture
def demo(demo_engine: Engine) -> LocalLLM:
    return LocalLLM(engine=demo_engine, temperature=0.0, max_tokens=6)


def call(llm: LocalLLM, endpoint: str, source: Any, **kwargs: Any) -> list[Any]:
    result = getattr(llm, endpoint)(source, **kwargs)
    if inspect.iscoroutine(result):

        async def drain() -> list[Any]:
            response = await result
            if isinstance(response, AsyncGenerator):
                return [chunk async for chunk in response]
            return [response]

        return asyncio.run(drain())
    return list(result) if isinstance(result, Generator) else [result]


def text_of(response: Any) -> str:
    return response.message.content if isinstance(response, ChatResponse) else response.text


def wait_until(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.01)


def test_all_endpoints_agree(demo: LocalLLM) -> None:
    prompt = USER[0].content
    finals = []
    for endpoint in ENDPOINTS:
        responses = call(demo, endpoint, USER if endpoint.endswith("chat") else prompt)
        finals.append(responses[-1])
        if "stream" in endpoint:
            assert "".join(chunk.delta for chunk in responses) == text_of(responses[-1])
    assert len({text_of(final) for final in finals}) == 1
    assert len({str(final.additional_kwargs) for final in finals}) == 1
    assert finals[0].raw["usage"]["completion_tokens"] == 6
    assert finals[0].raw["finish_reason"] == "length"


def test_prompt_is_the_models_own_template(demo: LocalLLM, demo_engine: Engine) -> None:
    messages = [ChatMessage(content="Be brief.", role=MessageRole.SYSTEM), *USER]
    # The text of SmolLM2's template, rendered by hand; it has no BOS apart from <|im_start|>.
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n"
    )
    wanted = demo_engine.tokenize(text, add_special_tokens=False, parse_special=True)
    assert demo.count_messages(messages) == len(wanted)
    response = demo.chat(messages, max_tokens=1)
    assert response.raw["usage"]["prompt_tokens"] == len(wanted)
    assert demo.complete(text, formatted=True).text == demo.chat(messages).message.content


@pytest.mark.parametrize("endpoint", [name for name in ENDPOINTS if name.startswith("stream")])
def test_stop_strings_never_leak(demo: LocalLLM, endpoint: str) -> None:
    source = USER if endpoint.endswith("chat") else USER[0].content
    free = text_of(call(demo, endpoint, source)[-1])
    # A stop string that starts and ends inside words, and so spans tokens.
    stop = free[len(free) // 2 : len(free) // 2 + 5]
    chunks = call(demo, endpoint, source, stop=[stop])
    assert text_of(chunks[-1]) == free[: free.index(stop)]
    assert "".join(chunk.delta for chunk in chunks) == text_of(chunks[-1])
    assert chunks[-1].raw["finish_reason"] == "stop"
    assert chunks[-1].raw["stop_reason"] == stop


def test_deltas_are_whole_characters(demo: LocalLLM) -> None:
    prompt = "Repeat: 🦀🚀 你好 🦀🚀 你好 🦀🚀 你好 🦀🚀 你好 🦀🚀"
    chunks = list(demo.stream_complete(prompt, formatted=True, max_tokens=16))
    text = text_of(chunks[-1])
    assert sum(ord(character) > 0x2000 for character in text) >= 2
    # Where max_tokens cuts a character, its bytes show as U+FFFD at the very end.
    assert "\ufffd" not in "".join(chunk.delta for chunk in chunks).rstrip("\ufffd")
    assert text == demo.complete(prompt, formatted=True, max_tokens=16).text


def test_seed_repeats_and_options_override(demo: LocalLLM) -> None:
    options = {"temperature": 1.0, "seed": 5}
    assert demo.complete("Once", **options).text == demo.complete("Once", **options).text
    other = demo.complete("Once", temperature=1.0, seed=6).text
    assert demo.complete("Once", **options).text != other
    assert demo.complete("Once", max_tokens=2).raw["usage"]["completion_tokens"] == 2


def test_logprobs(demo: LocalLLM) -> None:
    response = demo.chat(USER, logprobs=3, max_tokens=4)
    assert len(response.logprobs) == 4
    for row in response.logprobs:
        # Greedy: the sampled token is the likeliest, so the others follow in falling order.
        values = [item.logprob for item in row]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert values[0] <= 0.0
    assert "".join(row[0].token for row in response.logprobs) == response.message.content
    streamed = list(demo.stream_chat(USER, logprobs=3, max_tokens=4))[-1]
    assert streamed.logprobs == response.logprobs


def test_batch_equals_single(demo: LocalLLM) -> None:
    prompts = ["Hi.", "Name a river. " * 5, "What is the capital of France?", "Count: 1, 2, 3,"]
    batch = [response.text for response in demo.batch_complete(prompts)]
    assert batch == [demo.complete(prompt).text for prompt in prompts]
    assert batch == [response.text for response in asyncio.run(demo.abatch_complete(prompts))]


@pytest.mark.parametrize("endpoint", ["chat", "achat", "stream_complete", "abatch_complete"])
def test_overflow_before_any_work(demo: LocalLLM, demo_engine: Engine, endpoint: str) -> None:
    seen = demo_engine.stats().prompt_tokens
    long = "word " * 1100
    source: Any = [ChatMessage(content=long)] if endpoint.endswith("chat") else long
    with pytest.raises(ContextOverflowError, match="1024"):
        call(demo, endpoint, [source] if "batch" in endpoint else source)
    assert demo_engine.stats().prompt_tokens == seen


def test_gathered_chats_share_steps(demo: LocalLLM, demo_engine: Engine) -> None:
    async def main() -> list[ChatResponse]:
        return await asyncio.gather(*(demo.achat(USER, max_tokens=3) for _ in range(32)))

    texts = {response.message.content for response in asyncio.run(main())}
    assert len(texts) == 1
    assert demo_engine.stats().peak_running >= 32


@pytest.mark.parametrize("how", ["break", "cancel", "timeout"])
def test_giving_up_returns_the_blocks(demo: LocalLLM, demo_engine: Engine, how: str) -> None:
    aborted = demo_engine.stats().requests_aborted
    endless = demo.with_options(max_tokens=900, ignore_eos=True)
    if how == "break":
        for _ in endless.stream_chat(USER):
            break
    elif how == "timeout":
        with pytest.raises(RequestTimeoutError):
            endless.chat(USER, timeout=0.1)
    else:
        with pytest.raises(TimeoutError):
            asyncio.run(asyncio.wait_for(endless.achat(USER), 0.1))
    wait_until(lambda: demo_engine.stats().requests_aborted == aborted + 1)
    wait_until(lambda: demo_engine.stats().kv_blocks_used == 0)


def test_copies_share_the_weights(demo: LocalLLM, demo_engine: Engine) -> None:
    for twin in (
        copy.deepcopy(demo),
        pickle.loads(pickle.dumps(demo)),
        LocalLLM.from_dict(demo.to_dict()),
        demo.with_options(max_tokens=4),
    ):
        assert twin.engine is demo_engine


def test_shared_engine_closes_and_reopens(demo_model: str) -> None:
    options = {"device": "cpu", "num_threads": 1, "max_num_seqs": 2, "max_model_len": 256}
    llm = LocalLLM(demo_model, engine_kwargs=options, max_tokens=4, temperature=0.0)
    assert llm.metadata.context_window == 256
    first_engine, first = llm.engine, llm.chat(USER).message.content
    llm.close()
    llm.close()
    assert first_engine.is_closed
    with llm:
        assert llm.chat(USER).message.content == first
        assert llm.engine is not first_engine


def test_clean_exit_with_requests_in_flight(demo_model: str) -> None:
    code = f"""
        from llm_connectors.llama_index import LocalLLM
        llm = LocalLLM({demo_model!r}, max_tokens=2000, engine_kwargs=dict(num_threads=1))
        stream = llm.stream_complete("Once upon a time")
        next(stream)
        print("leaving")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr, done.returncode) == ("leaving\n", "", 0)
