"""`LocalLLM` with one fault each: what the published checks must see.

`FAULTS` has check -> [(class, words of the failure that show it was seen for this reason)].
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import llama_index_subjects as subjects
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, TextBlock
from llama_index.core.embeddings import MockEmbedding

from llm_connectors.llama_index import LocalEmbedding, LocalLLM, RequestError

kept: list[Any] = []
"""Requests that a faulty class left running."""


# ---- answers


class Forgetting(LocalLLM):
    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> Any:
        return super().from_dict({k: v for k, v in data.items() if k != "temperature"}, **kwargs)


class PlainTypes(LocalLLM):
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        return str(super().complete(prompt, formatted, **kwargs))


class OnlyDeltas(LocalLLM):
    """Chunks that hold what is new, not the text so far."""

    def stream_chat(self, messages: Any, **kwargs: Any) -> Any:
        for chunk in super().stream_chat(messages, **kwargs):
            chunk.message = ChatMessage(content=chunk.delta, role="assistant")
            yield chunk


class NoLastChunk(LocalLLM):
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        for chunk in super().stream_complete(prompt, formatted, **kwargs):
            if chunk.raw is None:
                yield chunk


class NothingWhenEmpty(LocalLLM):
    """No chunk at all for an answer that ends at once."""

    def stream_chat(self, messages: Any, **kwargs: Any) -> Any:
        for chunk in super().stream_chat(messages, **kwargs):
            if chunk.message.content:
                yield chunk


class HalfCharacters(LocalLLM):
    def stream_chat(self, messages: Any, **kwargs: Any) -> Any:
        for chunk in super().stream_chat(messages, **kwargs):
            chunk.delta = "\udc80" + chunk.delta
            yield chunk


class IgnoresStop(LocalLLM):
    async def achat(self, messages: Any, stop: Any = None, **kwargs: Any) -> Any:
        return await super().achat(messages, **kwargs)


class Persisting(LocalLLM):
    def chat(self, messages: Any, **kwargs: Any) -> Any:
        self.max_tokens = kwargs.get("max_tokens", self.max_tokens)
        return super().chat(messages, **kwargs)


class TakesAnything(LocalLLM):
    def complete(
        self, prompt: str, formatted: bool = False, temprature: Any = None, **kwargs: Any
    ) -> Any:
        return super().complete(prompt, formatted, **kwargs)


class TwoBos(LocalLLM):
    def _submit(self, engine: Any, prompts: Any, options: Any) -> Any:
        for ids in prompts.prompt_ids:
            ids.insert(0, 0)
        return super()._submit(engine, prompts, options)


class OtherWords(LocalLLM):
    """As many tokens as the template's, but others."""

    def _submit(self, engine: Any, prompts: Any, options: Any) -> Any:
        for ids in prompts.prompt_ids:
            ids.reverse()
        return super()._submit(engine, prompts, options)


class NoSystemPrompt(LocalLLM):
    async def astructured_predict(self, *args: Any, **kwargs: Any) -> Any:
        plain = self.model_copy(update={"system_prompt": None})
        return await LocalLLM.astructured_predict(plain, *args, **kwargs)


class SlowMetadata(LocalLLM):
    @property
    def metadata(self) -> Any:
        time.sleep(0.0002)
        return super().metadata


class ReadingMetadata(LocalLLM):
    @property
    def metadata(self) -> Any:
        with open(__file__, encoding="utf-8"):
            return super().metadata


class WrongWindow(LocalLLM):
    @property
    def metadata(self) -> Any:
        return super().metadata.model_copy(update={"context_window": 3900})


# ---- requests


class OneByOne(LocalLLM):
    async def achat(self, messages: Any, **kwargs: Any) -> Any:
        return self.chat(messages, **kwargs)


class OneLoop(LocalLLM):
    async def achat(self, messages: Any, **kwargs: Any) -> Any:
        loop = self.__dict__.setdefault("first_loop", asyncio.get_running_loop())
        if loop is not asyncio.get_running_loop():
            raise RuntimeError("bound to another loop")
        return await super().achat(messages, **kwargs)


class NeedsNoLoop(LocalLLM):
    def chat(self, messages: Any, **kwargs: Any) -> Any:
        return asyncio.run(super().achat(messages, **kwargs))


class NeverAborts(LocalLLM):
    async def achat(self, messages: Any, **kwargs: Any) -> Any:
        return await asyncio.shield(asyncio.ensure_future(super().achat(messages, **kwargs)))

    def stream_chat(self, messages: Any, **kwargs: Any) -> Any:
        (pending,) = self._submit_chats(self.engine, [messages], kwargs)
        kept.append(pending)
        for _ in range(3):
            yield pending


class BatchDependent(LocalLLM):
    async def achat(self, messages: Any, **kwargs: Any) -> Any:
        response = await super().achat(messages, **kwargs)
        response.message.blocks[0].text += "!"
        return response


# ---- calls and objects


class WritesHistory(LocalLLM):
    def _prepare_chat_with_tools(
        self,
        tools: Any,
        user_msg: Any = None,
        chat_history: Any = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        **kwargs: Any,
    ) -> Any:
        chat_history.append(ChatMessage(content=user_msg))
        asked = super()._prepare_chat_with_tools(
            tools, None, chat_history, tool_required=tool_required
        )
        return {**asked, **kwargs}


class ManyCalls(LocalLLM):
    """Does not keep the answer to one call."""

    def _submit_chats(self, engine: Any, conversations: Any, call: dict[str, Any]) -> Any:
        if "parallel_tool_calls" in call:
            call["parallel_tool_calls"] = True
        return super()._submit_chats(engine, conversations, call)


class OnlyBlocks(LocalLLM):
    """Calls that LlamaIndex's programs do not find."""

    def stream_chat(self, messages: Any, **kwargs: Any) -> Any:
        for chunk in super().stream_chat(messages, **kwargs):
            chunk.message.additional_kwargs.clear()
            yield chunk


class BlankObjects(LocalLLM):
    def stream_structured_predict(self, output_cls: Any, *args: Any, **kwargs: Any) -> Any:
        yield from reversed(list(super().stream_structured_predict(output_cls, *args, **kwargs)))


class Unconstrained(LocalLLM):
    async def achat(self, messages: Any, response_format: Any = None, **kwargs: Any) -> Any:
        return await super().achat(messages, **kwargs)


class NoThoughts(LocalLLM):
    async def astream_chat(self, messages: Any, **kwargs: Any) -> Any:
        chunks = await super().astream_chat(messages, **kwargs)

        async def stripped() -> Any:
            async for chunk in chunks:
                chunk.additional_kwargs.pop("thinking_delta", None)
                yield chunk

        return stripped()


# ---- what is written about an answer


class CountsTwice(LocalLLM):
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        response = super().complete(prompt, formatted, **kwargs)
        response.raw["usage"]["prompt_tokens"] *= 2
        return response


class Nested(LocalLLM):
    """`chat` by way of `complete`: two requests for the counters."""

    def chat(self, messages: Any, **kwargs: Any) -> Any:
        self.complete("Hi", max_tokens=1)
        return super().chat(messages, **kwargs)


class OwnIterator(LocalLLM):
    """Chunks that no wrapper of LlamaIndex sees."""

    def stream_chat(self, messages: Any, **kwargs: Any) -> Any:
        (pending,) = self._submit_chats(self.engine, [messages], kwargs)
        return (answer for answer in [pending.wait().as_chat()])


class NoLogprobs(LocalLLM):
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        response = super().complete(prompt, formatted, **kwargs)
        response.logprobs = None
        return response


class DropsBlocks(LocalLLM):
    def chat(self, messages: Any, **kwargs: Any) -> Any:
        texts = [
            message.model_copy(
                update={"blocks": [one for one in message.blocks if isinstance(one, TextBlock)]}
            )
            for message in messages
        ]
        return super().chat(texts, **kwargs)


class ThinksAloud(LocalLLM):
    def chat(self, messages: Any, **kwargs: Any) -> Any:
        response = super().chat(messages, **kwargs)
        text = "".join(getattr(block, "content", "") or "" for block in response.message.blocks)
        message = ChatMessage(content=text + (response.message.content or ""), role="assistant")
        return ChatResponse(message=message, raw=response.raw)


# ---- lives


class Reloading(LocalLLM):
    def __deepcopy__(self, memo: Any = None) -> Any:
        return LocalLLM(subjects.tiny_folder(), engine_kwargs=subjects.CLOSABLE, max_tokens=8)


class LoadsElsewhere(LocalLLM):
    """A pickle that quietly becomes a second engine in another process."""

    def __reduce__(self) -> Any:
        return (rebuilt, (subjects.tiny_folder(),))


def rebuilt(folder: str) -> LocalLLM:
    """On the engine of this process, whichever that is."""
    if folder == subjects.tiny_folder():
        return LocalLLM(engine=subjects.tiny_engine(), max_tokens=8)
    return LocalLLM(folder, engine_kwargs=subjects.CLOSABLE, max_tokens=8)


class Unclosable(LocalLLM):
    def close(self, **_: Any) -> None:
        pass


class Hoarding(LocalLLM):
    """Closes, but something still holds the engine."""

    def close(self, **options: Any) -> None:
        kept.extend(filter(None, [self._lease.peek()]))
        super().close(**options)


# ---- embeddings and pipelines


class Forgetful(MockEmbedding):
    def _get_text_embeddings(self, texts: list[str]) -> Any:
        return [[float(place), 1.0] for place, _ in enumerate(texts)]


class OneAtATime(LocalEmbedding):
    async def _aget_text_embedding(self, text: str) -> Any:
        return self._get_text_embedding(text)


class OnePrompt(LocalEmbedding):
    def _get_query_embedding(self, query: str) -> Any:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> Any:
        return self._get_text_embedding(query)


class Swallowed(LocalLLM):
    """Its own error, but of a kind that LlamaIndex answers "Empty Response" to."""

    def chat(self, messages: Any, **kwargs: Any) -> Any:
        try:
            return super().chat(messages, **kwargs)
        except RequestError as error:
            raise ValueError(str(error)) from error


class Talkative(LocalLLM):
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        raise ValueError("too long")

    async def achat(self, messages: Any, **kwargs: Any) -> Any:
        raise ValueError("too long")


FAULTS: dict[str, list[tuple[type[Any], str]]] = {
    "01_identity": [(Forgetting, "changes options")],
    "02_types": [(PlainTypes, "complete")],
    "03_streams_equal_answers": [(OnlyDeltas, "not cumulative")],
    "04_one_final_chunk": [
        (NoLastChunk, "'stream_complete', {'max_tokens': 1}"),
        (NothingWhenEmpty, "'stream_chat', {'logit_bias'"),
    ],
    "05_whole_characters": [(HalfCharacters, "surrogates")],
    "06_stop_strings": [(IgnoresStop, "achat")],
    "07_call_options": [(Persisting, "persists"), (TakesAnything, "DID NOT RAISE")],
    "08_prompt_tokens": [(TwoBos, "tokens, not"), (OtherWords, "other tokens")],
    "09_system_prompt": [(NoSystemPrompt, "astructured_predict")],
    "10_metadata": [
        (SlowMetadata, "µs"),
        (ReadingMetadata, "opens a file"),
        (WrongWindow, "DID NOT RAISE"),
    ],
    "11_overflow": [(Swallowed, "chat: ValueError")],
    "12_gathered": [(OneByOne, "requests ran together")],
    "13_any_loop": [(OneLoop, "another loop")],
    "14_sync_in_a_loop": [(NeedsNoLoop, "running event loop")],
    "15_giving_up": [(NeverAborts, "the request leaves")],
    "16_batch_equals_single": [(BatchDependent, "depend on the batch")],
    "17_tools": [(WritesHistory, "history is changed")],
    "18_streamed_objects": [(OnlyBlocks, "both places"), (BlankObjects, "not whole")],
    "19_structured": [(Unconstrained, "StructuredOutputError")],
    "21_usage": [(CountsTwice, "complete")],
    "22_events": [(Nested, "'LLMCompletionStartEvent': 1"), (OwnIterator, "stream_chat")],
    "23_logprobs": [(NoLogprobs, "complete")],
    "24_blocks": [(DropsBlocks, "DID NOT RAISE")],
    "25_copies": [(Reloading, "deepcopy"), (LoadsElsewhere, "engine of its own")],
    "27_rag_offline": [(Talkative, "ResponseMode")],
    "28_close": [(Unclosable, "DID NOT RAISE"), (Hoarding, "still held")],
}
"""On a real engine."""

SCRIPTED_FAULTS: dict[str, list[tuple[type[Any], str]]] = {
    "17_tools": [(ManyCalls, "('chat', False)")],
    "20_agents": [(NoThoughts, "not streamed")],
    "24_blocks": [(ThinksAloud, "chat")],
}
"""On an engine whose answers are told."""

EMBEDDING_FAULTS: list[tuple[type[Any], str]] = [
    (Forgetful, "a cat"),
    (OneAtATime, "share batches"),
    (OnePrompt, "query's prompt"),
]
"""Embedding models for check 26."""
