"""What the published suite is run on: `LocalLLM` on a tiny model, on a fake engine, and mocks."""

from __future__ import annotations

import functools
import tempfile
import weakref
from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.llms.mock import MockFunctionCallingLLM, MockLLM
from llama_index_fake_engine import CHATML, FakeEngine
from tiny_checkpoints import write_tiny_llama

from engine import Engine
from llm_connectors.llama_index import LocalEmbedding, LocalLLM
from llm_connectors.testing.llama_index import Subject


@functools.cache
def tiny_folder() -> str:
    return str(write_tiny_llama(tempfile.mkdtemp(), max_position_embeddings=8192))


def tiny_engine(placement: str = "thread") -> Engine:
    """One for each placement, made when first asked for."""
    return _engine_in(placement)


@functools.cache
def _engine_in(placement: str) -> Engine:
    engine = Engine(
        tiny_folder(), device="cpu", num_threads=1, max_num_seqs=64, placement=placement
    )
    submit, submit_many = engine.submit, engine.submit_many

    def submit_and_remember(prompt: Any, *args: Any, **kwargs: Any) -> Any:
        last_sent[:] = prompt
        return submit(prompt, *args, **kwargs)

    def submit_many_and_remember(prompts: Any, *args: Any, **kwargs: Any) -> Any:
        last_sent[:] = prompts[-1]
        return submit_many(prompts, *args, **kwargs)

    engine.submit = submit_and_remember  # type: ignore[method-assign]
    engine.submit_many = submit_many_and_remember  # type: ignore[method-assign]
    return engine


last_sent: list[int] = []


def tiny(max_tokens: int = 96, placement: str = "thread") -> Subject:
    """`LocalLLM` on a random Llama: real tokens, constraints and KV blocks."""
    engine = tiny_engine(placement)
    return Subject(
        LocalLLM(engine=engine, max_tokens=max_tokens, temperature=0.0, tool_parser="hermes"),
        running=lambda: engine.stats().running + engine.stats().waiting,
        peak=lambda: engine.stats().peak_running,
        admitted=lambda: engine.stats().prompt_tokens,
        blocks=lambda: engine.stats().kv_blocks_used,
        prompt_ids=prompt_ids,
        sent_ids=lambda: list(last_sent),
        empty={"logit_bias": {engine.tokenizer.eos_token_id: 100.0}},
        factory="llama_index_subjects:tiny",
    )


CLOSABLE: dict[str, Any] = {"device": "cpu", "num_threads": 1}


def closable() -> Subject:
    """`LocalLLM` on an engine of its own that may be closed."""
    llm = LocalLLM(tiny_folder(), engine_kwargs=CLOSABLE, max_tokens=8)
    started = weakref.ref(llm.engine)
    return Subject(
        llm,
        running=lambda: started().stats().running,  # type: ignore[union-attr]
        memory=lambda: 0 if started() is None else 1,
        reopen=lambda: LocalLLM(tiny_folder(), engine_kwargs=CLOSABLE, max_tokens=8),
        factory="llama_index_subjects:closable",
    )


QUERY_PROMPT, TEXT_PROMPT = "query: ", "passage: "


def embedding(engine: Engine, cls: type[Any] = LocalEmbedding) -> Subject:
    """An embedding model on `engine`, with prompts."""
    made = scripted()
    if issubclass(cls, LocalEmbedding):
        made.embedding = cls(engine=engine, query_prompt=QUERY_PROMPT, text_prompt=TEXT_PROMPT)
    else:
        made.embedding = cls(embed_dim=2)
    made.embedding_prompts = (QUERY_PROMPT, TEXT_PROMPT)
    made.plain_embedding = lambda text: engine.embed(text, prompt="").tolist()
    made.embedding_steps = lambda: engine.stats().steps
    return made


def prompt_ids(messages: Sequence[ChatMessage]) -> list[int]:
    """By transformers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
    dicts = [{"role": one.role.value, "content": one.content} for one in messages]
    return list(tokenizer.apply_chat_template(dicts, add_generation_prompt=True, return_dict=False))


def scripted() -> Subject:
    """`LocalLLM` on the fake engine, whose answers can be told."""
    template = "{% if tools %}{{ tools | tojson }}{% endif %}{# <think></think> #}" + CHATML
    fake = FakeEngine(template=template)
    fake.answer = lambda _prompt, _params: "Some answer."

    def script(*texts: str) -> None:
        waiting = list(texts)
        fake.answer = lambda _prompt, _params: waiting.pop(0) if len(waiting) > 1 else waiting[0]

    return Subject(
        LocalLLM(engine=fake, max_tokens=96, temperature=0.0),
        running=lambda: fake.stats().running,
        peak=lambda: fake.stats().peak_running,
        script=script,
    )


def mock() -> MockLLM:
    """The control: LlamaIndex's own mock."""
    return MockLLM(max_tokens=5)


def calling_mock() -> MockFunctionCallingLLM:
    """The control for tools."""
    return MockFunctionCallingLLM()
