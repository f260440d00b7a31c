"""`Recorder`: the events and spans of a `with` block."""

from __future__ import annotations

from collections import Counter
from typing import Any

import llama_index_instrumentation as instrument
from llama_index_instrumentation.event_handlers import BaseEventHandler
from llama_index_instrumentation.span.base import BaseSpan
from llama_index_instrumentation.span_handlers import BaseSpanHandler


class _Events(BaseEventHandler):
    kept: list[Any] = []  # noqa: RUF012

    def handle(self, event: Any, **_: Any) -> None:
        self.kept.append(event)


class _Spans(BaseSpanHandler[BaseSpan]):
    parents: dict[str, str | None] = {}  # noqa: RUF012
    ends: list[str] = []  # noqa: RUF012

    def new_span(self, id_: str, *_: Any, parent_span_id: str | None = None, **__: Any) -> BaseSpan:
        self.parents[id_] = parent_span_id
        return BaseSpan(id_=id_, parent_id=parent_span_id)

    def prepare_to_exit_span(self, id_: str, *_: Any, **__: Any) -> BaseSpan:
        self.ends.append(id_)
        return self.open_spans[id_]

    def prepare_to_drop_span(self, id_: str, *_: Any, **__: Any) -> BaseSpan:
        self.ends.append(id_)
        return self.open_spans[id_]


class Recorder:
    """Keeps what instrumentation says within a `with` block.

    Attributes:
        events: In order.
        parents: Span id -> id of the span around it, or None.
        ends: Ids of spans, each time one ends or is dropped.
    """

    def __init__(self) -> None:
        self._events, self._spans = _Events(kept=[]), _Spans()
        self.events = self._events.kept
        self._spans.parents, self._spans.ends = {}, []
        self.parents, self.ends = self._spans.parents, self._spans.ends

    @property
    def counts(self) -> Counter[str]:
        """Events by the name of their class, those of spans left out."""
        names = (type(event).__name__ for event in self.events)
        return Counter(name for name in names if not name.startswith("Span"))

    def __enter__(self) -> Recorder:
        dispatcher = instrument.get_dispatcher()
        dispatcher.add_event_handler(self._events)
        dispatcher.add_span_handler(self._spans)
        return self

    def __exit__(self, *_: object) -> None:
        dispatcher = instrument.get_dispatcher()
        dispatcher.event_handlers.remove(self._events)
        dispatcher.span_handlers.remove(self._spans)
