"""Fixtures of the LlamaIndex tests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from llama_index_fake_engine import FakeEngine

import engine
from llm_connectors import _runtime
from llm_connectors.llama_index import LocalLLM


@pytest.fixture(autouse=True)
def no_current_loop() -> None:
    """Without a loop set, LlamaIndex's sync paths use `asyncio.run`, which closes its loop.

    Otherwise they make one by `asyncio.get_event_loop` and leave it open.
    """
    asyncio.set_event_loop(None)


@pytest.fixture
def fake() -> Iterator[FakeEngine]:
    """A fake engine with a ChatML template and a BOS."""
    engine = FakeEngine()
    yield engine
    engine.close()


@pytest.fixture
def llm(fake: FakeEngine) -> LocalLLM:
    """A greedy model on the fake engine."""
    return LocalLLM(engine=fake, max_tokens=64, temperature=0.0)


@pytest.fixture
def shared_fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeEngine]]:
    """`Engine.shared` gives fakes; the class counts how many were made."""

    class SharedFake(FakeEngine):
        _shared: dict[str, FakeEngine] = {}  # noqa: RUF012
        num_made = 0

    # Not `setattr`, which would import the real engine to remember it.
    monkeypatch.setitem(vars(engine), "Engine", SharedFake)
    monkeypatch.setattr(_runtime, "_REFERENCES", _runtime._References())
    yield SharedFake
    for made in SharedFake._shared.values():
        made.references = 0
        made.close()
