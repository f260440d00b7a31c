"""The ways text goes through an engine: its own methods and those of the connector classes.

Every case answers the same conversations with the same number of tokens each, so that what they
differ by is the caller's side alone. LangChain's and LlamaIndex's options hold for a whole list,
hence one `max_tokens` for all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from plan import fixed_length

from engine import Engine

NUM_STREAMS = 256
ENGINE_CASE = "Engine.generate"

Run = Callable[[], int]
"""Runs all conversations and returns the number of answer tokens seen or reported."""


class Cases:
    """All cases over one list of texts.

    Args:
        engine: With a tokenizer and a chat template.
        texts: One user message each.
        max_tokens: New tokens of every answer.
    """

    def __init__(self, engine: Engine, texts: list[str], max_tokens: int) -> None:
        self._engine = engine
        self._texts = texts
        self._max_tokens = max_tokens
        template = engine.apply_chat_template
        chats = [[{"role": "user", "content": text}] for text in texts]
        self._chats = chats
        # What the template makes of them, as text: the same token ids for every case.
        self._prompts = [
            engine.detokenize(template(chat), skip_special_tokens=False) for chat in chats
        ]
        self._options: dict[str, Any] = {
            "temperature": 0.0,
            "max_tokens": max_tokens,
            "ignore_eos": True,
        }

    def all(self) -> dict[str, tuple[int, Run]]:
        """Case -> (number of conversations, function that runs them)."""
        many, few = len(self._texts), min(NUM_STREAMS, len(self._texts))
        return {
            ENGINE_CASE: (many, self.generate),
            "Engine.chat": (many, self.chat),
            "ChatLocal.batch": (many, self.langchain_batch),
            "ChatLocal.abatch": (many, self.langchain_abatch),
            f"{ENGINE_CASE} x{few}": (few, lambda: self.generate(few)),
            f"handle streams x{few}": (few, lambda: asyncio.run(self.handle_streams(few))),
            f"ChatLocal.astream x{few}": (few, lambda: asyncio.run(self.langchain_streams(few))),
            f"ChatLocal.ainvoke x{few}": (few, lambda: asyncio.run(self.langchain_ainvoke(few))),
            f"LocalLLM.achat x{few}": (few, lambda: asyncio.run(self.llama_index_achat(few))),
            f"LocalLLM.batch_chat x{few}": (few, lambda: self.llama_index_batch(few)),
        }

    # ---------------------------------------------------------------- the engine

    def generate(self, count: int | None = None) -> int:
        """Prompts as text, outputs as text."""
        outputs = self._engine.generate(
            self._prompts[:count], fixed_length(self._max_tokens), parse_special=True
        )
        return sum(output.usage.completion_tokens for output in outputs)

    def chat(self) -> int:
        """Conversations through the template."""
        outputs = self._engine.chat(self._chats, fixed_length(self._max_tokens))
        return sum(output.usage.completion_tokens for output in outputs)

    async def handle_streams(self, count: int) -> int:
        """Every request's deltas read as they come."""

        async def read(prompt: str) -> int:
            handle = self._engine.submit(prompt, fixed_length(self._max_tokens), parse_special=True)
            return sum([len(delta.token_ids) async for delta in handle])

        return await _sum(read(prompt) for prompt in self._prompts[:count])

    # ---------------------------------------------------------------- LangChain

    def _langchain(self) -> Any:
        from llm_connectors.langchain import ChatLocal

        return ChatLocal(engine=self._engine, **self._options)

    def langchain_batch(self) -> int:
        """One `batch` over all texts."""
        return _langchain_tokens(self._langchain().batch(self._texts))

    def langchain_abatch(self) -> int:
        """One `abatch` over all texts."""
        return _langchain_tokens(asyncio.run(self._langchain().abatch(self._texts)))

    async def langchain_ainvoke(self, count: int) -> int:
        """Independent `ainvoke`s at once, as the nodes of a graph make them."""
        chat = self._langchain()

        async def ask(text: str) -> int:
            return _langchain_tokens([await chat.ainvoke(text)])

        return await _sum(ask(text) for text in self._texts[:count])

    async def langchain_streams(self, count: int) -> int:
        """Independent `astream`s at once."""
        chat = self._langchain()

        async def read(text: str) -> int:
            return _langchain_tokens([chunk async for chunk in chat.astream(text)][-2:])

        return await _sum(read(text) for text in self._texts[:count])

    # ---------------------------------------------------------------- LlamaIndex

    def _llama_index(self) -> tuple[Any, list[list[Any]]]:
        from llama_index.core.base.llms.types import ChatMessage

        from llm_connectors.llama_index import LocalLLM

        llm = LocalLLM(engine=self._engine, **self._options)
        return llm, [[ChatMessage(content=text)] for text in self._texts]

    async def llama_index_achat(self, count: int) -> int:
        """Gathered `achat`s."""
        llm, chats = self._llama_index()

        async def ask(chat: list[Any]) -> int:
            return _llama_index_tokens(await llm.achat(chat))

        return await _sum(ask(chat) for chat in chats[:count])

    def llama_index_batch(self, count: int) -> int:
        """One `batch_chat`."""
        llm, chats = self._llama_index()
        return sum(map(_llama_index_tokens, llm.batch_chat(chats[:count])))


async def _sum(counts: Any) -> int:
    waiting: list[Coroutine[Any, Any, int]] = list(counts)
    return sum(await asyncio.gather(*waiting))


def _langchain_tokens(messages: list[Any]) -> int:
    return sum(m.usage_metadata["output_tokens"] for m in messages if m.usage_metadata)


def _llama_index_tokens(response: Any) -> int:
    return int(response.raw["usage"]["completion_tokens"])
