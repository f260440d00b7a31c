"""Checks of how long things live: copies, pickles, other processes, closing."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llm_connectors.testing.llama_index.subject import (
    MAKE,
    MESSAGES,
    Subject,
    is_swallowed,
    responses,
    run_apart,
    text_of,
    wait_until,
)

_LEAVE = (
    MAKE
    + """
length = llm.metadata.context_window // 2
next(llm.stream_chat(messages, max_tokens=length, ignore_eos=True))
print("leaving")
"""
)
_UNPICKLE = """
import pickle, sys
from llama_index.core.base.llms.types import ChatMessage
with open(sys.argv[1], "rb") as file:
    llm = pickle.load(file)
try:
    llm.chat([ChatMessage(content="Name three colours.")], max_tokens=2)
except (ValueError, TypeError, RuntimeError) as error:
    print("disguised", type(error).__name__, error)
except Exception as error:
    print("refused", type(error).__name__, error)
else:
    print("answered", "by an engine of its own" if hasattr(llm, "engine") else "")
"""


def check_25_copies(subject: Subject) -> None:
    """Copies and pickles work, and share the engine."""
    llm = subject.llm
    wanted = text_of(llm.chat(MESSAGES, temperature=0.0, max_tokens=4))
    copies = {
        "copy": copy.copy(llm),
        "deepcopy": copy.deepcopy(llm),
        "pickle": pickle.loads(pickle.dumps(llm)),
    }
    for name, other in copies.items():
        assert text_of(other.chat(MESSAGES, temperature=0.0, max_tokens=4)) == wanted, name
        if hasattr(llm, "engine"):
            assert other.engine is llm.engine, name
    # In another process, as `IngestionPipeline.run(num_workers=...)` has it: an answer from the
    # same engine, or an error that says why; never a second engine, never an object without one.
    admitted = subject.admitted() if subject.admitted is not None else 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "llm.pickle"
        path.write_bytes(pickle.dumps(llm))
        outcome = run_apart(_UNPICKLE, str(path))
    if outcome.startswith("refused"):
        assert "process" in outcome, outcome
        return
    assert outcome.startswith("answered"), outcome
    is_shared = subject.admitted is not None and subject.admitted() > admitted
    assert is_shared or "engine" not in outcome, outcome


def check_28_close(subject: Subject) -> None:
    """`close` is idempotent, fails what is pending, gives memory back, and can be undone."""
    reopen = subject.probe("reopen")
    length = min(1000, subject.llm.metadata.context_window // 2)
    _close_while_busy(subject, {"max_tokens": length, "ignore_eos": True})
    if subject.memory is not None:
        gc.collect()
        assert subject.memory() == 0, f"{subject.memory()} is still held after close()"
    again = reopen()
    assert responses(again, "chat", max_tokens=2)[-1].raw["usage"]["completion_tokens"] >= 1
    again.close()
    if subject.factory is not None:
        assert run_apart(_LEAVE, *subject.factory.split(":")) == "leaving"


def _close_while_busy(subject: Subject, options: dict[str, Any]) -> None:
    """`close` while a stream, a call in a thread and one in an event loop are under way."""
    llm: Any = subject.llm
    stream = llm.stream_chat(MESSAGES, **options)
    next(stream)
    with ThreadPoolExecutor(2) as pool:
        calls = [
            pool.submit(llm.chat, MESSAGES, **options),
            pool.submit(lambda: asyncio.run(llm.achat(MESSAGES, **options))),
        ]
        if subject.running is not None:
            running = subject.running
            wait_until(lambda: running() >= 1 + len(calls), "all requests run")
        else:
            time.sleep(0.2)
        llm.close(drain=False)
        llm.close()
        endings: list[Callable[[], Any]] = [lambda: list(stream), *(call.result for call in calls)]
        for ending in endings:
            with pytest.raises(Exception, match=r"(?s).+") as caught:
                ending()
            assert not is_swallowed(caught.value), repr(caught.value)
