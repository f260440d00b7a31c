"""Checks of what is written about an answer: usage, events and spans, log probabilities, blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llama_index_instrumentation as instrument
import pytest
from llama_index.core.base.llms.types import (
    ChatMessage,
    ImageBlock,
    LogProb,
    TextBlock,
    ThinkingBlock,
)
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler

from llm_connectors.testing.llama_index.recorder import Recorder
from llm_connectors.testing.llama_index.subject import (
    CHATS,
    ENDPOINTS,
    MESSAGES,
    PROMPT,
    Subject,
    is_swallowed,
    responses,
    text_of,
)


def check_21_usage(subject: Subject) -> None:
    """Token counts stand where LlamaIndex looks, and are counted once."""
    for endpoint in ENDPOINTS:
        handler = TokenCountingHandler(tokenizer=lambda text: [0] * len(text))
        llm = subject.llm.model_copy(update={"callback_manager": CallbackManager([handler])})
        final = responses(llm, endpoint, temperature=0.0, max_tokens=4)[-1]
        usage = dict(final.raw)["usage"]
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert usage[name] == final.additional_kwargs[name], endpoint
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        (counted,) = handler.llm_token_counts
        assert counted.prompt_token_count == usage["prompt_tokens"], endpoint
        assert counted.completion_token_count == usage["completion_tokens"], endpoint
        assert usage["prompt_tokens"] >= 1
        if final.raw["finish_reason"] == "length":
            assert usage["completion_tokens"] == 4, endpoint
        if subject.prompt_ids is not None:
            assert usage["prompt_tokens"] == len(subject.prompt_ids(MESSAGES)), endpoint


@instrument.get_dispatcher(__name__).span
def _outer(work: Callable[[], Any]) -> Any:
    return work()


def check_22_events(subject: Subject) -> None:
    """One start and one end per request, in one span inside the caller's; an error has no end."""
    for endpoint in ENDPOINTS:
        kind = "Chat" if endpoint in CHATS else "Completion"
        with Recorder() as recorder:
            _outer(lambda endpoint=endpoint: responses(subject.llm, endpoint, max_tokens=4))
        counts = recorder.counts
        assert bool(counts.pop(f"LLM{kind}InProgressEvent", 0)) == ("stream" in endpoint), endpoint
        assert counts == {f"LLM{kind}StartEvent": 1, f"LLM{kind}EndEvent": 1}, (endpoint, counts)
        ids = {event.span_id for event in recorder.events if f"LLM{kind}" in type(event).__name__}
        assert len(ids) == 1, endpoint
        outer = next(span for span in recorder.parents if "_outer" in span)
        assert recorder.parents[ids.pop()] == outer, endpoint
        assert sorted(recorder.ends) == sorted(recorder.parents), endpoint
        with Recorder() as recorder, pytest.raises(Exception, match=r"(?s).*"):
            responses(subject.llm, endpoint, max_tokens=10**9)
        counts = recorder.counts
        assert counts[f"LLM{kind}StartEvent"] == 1, (endpoint, counts)
        assert counts[f"LLM{kind}EndEvent"] == 0, (endpoint, counts)
        assert counts["ExceptionEvent"] <= 1, (endpoint, counts)
        assert sorted(recorder.ends) == sorted(recorder.parents), endpoint
    for name in ("stream_chat", "stream_complete"):
        with Recorder() as recorder:
            stream = getattr(subject.llm, name)(MESSAGES if name in CHATS else PROMPT)
            next(stream)
            stream.close()
        left = {one: count for one, count in recorder.counts.items() if "Progress" not in one}
        assert sorted(left.values()) == [1, 1], (name, left)
        assert "ExceptionEvent" in left, (name, left)


def check_23_logprobs(subject: Subject) -> None:
    """A list of lists of `LogProb`, one row per token, on chat and completion."""
    for endpoint in ENDPOINTS:
        final = responses(subject.llm, endpoint, temperature=0.0, max_tokens=4, logprobs=2)[-1]
        rows = final.logprobs
        assert rows, endpoint
        assert len(rows) == final.raw["usage"]["completion_tokens"], endpoint
        for row in rows:
            assert row, endpoint
            assert all(isinstance(item, LogProb) and item.logprob <= 1e-6 for item in row)


def check_24_blocks(subject: Subject) -> None:
    """A block that cannot be read is refused by name; reasoning is a block, never text."""
    image = ChatMessage(blocks=[TextBlock(text="Look."), ImageBlock(image=b"x")])
    for endpoint in CHATS:
        with pytest.raises(Exception, match="ImageBlock") as caught:
            responses(subject.llm, endpoint, [image])
        assert not is_swallowed(caught.value), endpoint
    if subject.script is None:
        return
    for endpoint in CHATS:
        subject.script("<think>\nHm.\n</think>\n\nYes.")
        chunks = responses(subject.llm, endpoint)
        blocks = chunks[-1].message.blocks
        assert [type(block) for block in blocks] == [ThinkingBlock, TextBlock], endpoint
        assert blocks[0].content == "Hm.", endpoint
        assert all("Hm" not in text_of(chunk) for chunk in chunks), endpoint
