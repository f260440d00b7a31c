"""Async calls that begin in the same turn of an event loop, submitted as one list.

A hundred `ainvoke`s at once would render, encode and submit a hundred times, each time handing the
interpreter to the engine's thread and back. Here the first of them asks the loop for a turn, and by
then the others have lined up:

    ainvoke, achat, astream … ──► _Batch ──(next turn)──► encode together ──► submit_many
                                                          in a worker thread
                                                          where the texts are long

Whoever is cancelled before that is left out, whoever has a bad prompt is told so alone.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine import Engine, RequestHandle
    from llm_connectors._answer_plan import AnswerPlan

MAX_INLINE_CHARS = 8192
"""Longest text that is encoded in the event loop's thread: about 2 ms, cheaper than a hop to a
worker thread beside a busy engine."""

_PROMPTS_PER_PIECE = 64
"""The device starts with these while the worker thread encodes the next ones."""

Submitted = tuple[list[int], "RequestHandle"]
"""The prompt's token ids, and the request."""


async def submit_chat(
    engine: Engine,
    plan: AnswerPlan,
    conversation: Sequence[Mapping[str, Any]],
    order: Mapping[str, Any],
) -> Submitted:
    """Start the answer to a conversation, together with all that begin at this moment.

    Args:
        engine: Who answers.
        plan: Makes the prompt, and has the sampling parameters.
        conversation: As for `AnswerPlan.encode`.
        order: `priority` and `cache_salt`, as `Engine.submit` takes them.

    Raises:
        EngineError: As `AnswerPlan.encode` and `Engine.submit`.
    """
    loop = asyncio.get_running_loop()
    batch = _here.batches.get(id(engine))
    if batch is None or batch.loop is not loop:
        batch = _here.batches[id(engine)] = _Batch(engine, loop)
        loop.call_soon(batch.start)
    place = _Place(plan, conversation, order, loop.create_future())
    batch.places.append(place)
    try:
        return await place.future
    except asyncio.CancelledError:
        # Submitted already, and cancelled before this task got to run again.
        if place.future.done() and not place.future.cancelled() and not place.future.exception():
            place.future.result()[1].abort()
        raise


@dataclass(slots=True)
class _Place:
    """One call that waits for its request."""

    plan: AnswerPlan
    conversation: Sequence[Mapping[str, Any]]
    order: Mapping[str, Any]
    future: asyncio.Future[Submitted]

    def goes_with(self, other: _Place) -> bool:
        """Whether the two can be encoded and submitted in one call."""
        return self.order == other.order and self.plan.encodes_like(other.plan)


class _Here(threading.local):
    """The batches that are being gathered by this thread's event loop."""

    def __init__(self) -> None:
        self.batches: dict[int, _Batch] = {}


_here = _Here()


@dataclass(slots=True)
class _Batch:
    """The calls of one event loop and engine that wait for the loop's next turn."""

    engine: Engine
    loop: asyncio.AbstractEventLoop
    places: list[_Place] = field(default_factory=list)

    def start(self) -> None:
        """Submit what was gathered; whoever comes now starts a new batch."""
        del _here.batches[id(self.engine)]
        groups: list[list[_Place]] = []
        for place in self.places:
            if place.future.cancelled():
                continue
            if groups and place.goes_with(groups[-1][0]):
                groups[-1].append(place)
            else:
                groups.append([place])
        for group in groups:
            if sum(map(_num_chars, group)) <= MAX_INLINE_CHARS:
                self._submit(group, _encoded(group))
            else:
                self._start_encoding(group)

    def _start_encoding(self, places: list[_Place]) -> None:
        """Encode the first places in a worker thread, submit them, and go on with the others."""
        piece, rest = places[:_PROMPTS_PER_PIECE], places[_PROMPTS_PER_PIECE:]

        def take(done: asyncio.Future[list[Any]]) -> None:
            if rest:
                self._start_encoding(rest)
            error = asyncio.CancelledError() if done.cancelled() else done.exception()
            self._submit(piece, done.result() if error is None else [error] * len(piece))

        try:
            encoding = self.loop.run_in_executor(None, _encoded, piece)
        except RuntimeError:  # The loop's worker threads have been shut down: it is about to end.
            self._submit(places, _encoded(places))
        else:
            encoding.add_done_callback(take)

    def _submit(self, group: list[_Place], prompts: Sequence[list[int] | BaseException]) -> None:
        """Submit those prompts that could be made and still are wanted."""
        ready: list[tuple[_Place, list[int]]] = []
        for place, prompt in zip(group, prompts, strict=True):
            if place.future.done():
                continue
            if isinstance(prompt, BaseException):
                place.future.set_exception(prompt)
            else:
                ready.append((place, prompt))
        if len(ready) > 1:
            try:
                handles = self.engine.submit_many(
                    [prompt for _, prompt in ready],
                    [place.plan.params for place, _ in ready],
                    **group[0].order,
                )
            except Exception:
                pass  # One bad prompt refuses the whole hand-over; below it is found out which.
            else:
                for (place, prompt), handle in zip(ready, handles, strict=True):
                    place.future.set_result((prompt, handle))
                return
        for place, prompt in ready:
            try:
                handle = self.engine.submit(prompt, place.plan.params, **place.order)
            except Exception as error:
                place.future.set_exception(error)
            else:
                place.future.set_result((prompt, handle))


def _encoded(group: list[_Place]) -> list[Any]:
    """Token ids of each conversation, or the error that each alone brings. Never raises."""
    plan = group[0].plan
    try:
        return list(plan.encode([place.conversation for place in group]))
    except Exception as error:
        if len(group) == 1:
            return [error]
        return [found for place in group for found in _encoded([place])]


def _num_chars(place: _Place) -> int:
    contents = (message.get("content") for message in place.conversation)
    return sum(len(content) for content in contents if isinstance(content, str))
