"""A streamed answer as LangChain's protocol events ("v3"), without chunks in between.

message-start, then for each block content-block-start, -delta …, -finish, then message-finish. A
block is finished before the next one starts.
"""

from __future__ import annotations

import json
from typing import Any, cast

from langchain_protocol.protocol import MessagesData

from engine import CallEnd, CallPiece, Delta, Piece, ReasoningPiece, RequestOutput, TextPiece
from llm_connectors._answer_plan import AnswerPlan, AnswerStream
from llm_connectors.langchain._chunks import merged
from llm_connectors.langchain._fields import CallOptions
from llm_connectors.langchain._outputs import (
    PROVIDER,
    finish_reason,
    last_chunk_info,
    usage_metadata,
)
from llm_connectors.langchain._tool_calls import broken_call, call_block, new_call_id


class EventMaker:
    """Makes the events of one answer. Not thread-safe.

    Args:
        options: The call's.
        plan: How the answer is read.
        stream: Reads it; None for plain text.
        with_usage: Put the token counts on the last event.
    """

    def __init__(
        self,
        options: CallOptions,
        plan: AnswerPlan,
        stream: AnswerStream | None,
        *,
        with_usage: bool,
    ) -> None:
        self._options = options
        self._plan = plan
        self._stream = stream
        self._with_usage = with_usage
        self._kind = ""
        self._index = -1
        self._parts: list[str] = []
        self._call: dict[str, Any] = {}
        self._reasoning: list[str] = []
        self._good_calls = 0

    def start(self, message_id: str | None) -> MessagesData:
        """The first event."""
        metadata = {"provider": PROVIDER, "model": self._options.model}
        return _event("message-start", role="ai", id=message_id or "", metadata=metadata)

    def events(self, delta: Delta, output: RequestOutput | None) -> list[MessagesData]:
        """Events of what is new, with `output` the last ones as well."""
        pieces: list[Piece] = []
        if self._stream is None:
            pieces = [TextPiece(delta.text)] if delta.text else []
        else:
            pieces = self._stream.feed(delta.text)
            if output is not None:
                pieces += self._stream.finish(is_complete=delta.finish_reason == "stop")
        events = [event for piece in merged(pieces) for event in self._of_piece(piece)]
        if output is not None:
            events += [*self._close(), self._finish(delta, output)]
        return events

    def _finish(self, delta: Delta, output: RequestOutput) -> MessagesData:
        info = last_chunk_info(delta, output, self._options.model, self._plan.params)
        info["finish_reason"] = finish_reason(delta.finish_reason, has_calls=self._good_calls > 0)
        fields: dict[str, Any] = {"metadata": info}
        if self._with_usage:
            reasoning = self._plan.count_tokens("".join(self._reasoning))
            fields["usage"] = usage_metadata(output.usage, self._plan.cached_block_size, reasoning)
        return _event("message-finish", **fields)

    def _of_piece(self, piece: Piece) -> list[MessagesData]:
        match piece:
            case TextPiece(text):
                delta = {"type": "text-delta", "text": text}
                return [*self._open("text", {"type": "text", "text": ""}), self._delta(text, delta)]
            case ReasoningPiece(text):
                self._reasoning.append(text)
                delta = {"type": "reasoning-delta", "reasoning": text}
                opened = self._open("reasoning", {"type": "reasoning", "reasoning": ""})
                return [*opened, self._delta(text, delta)]
            case CallPiece(index, name, arguments):
                events = self._open_call(index, name)
                if arguments:
                    delta = {"type": "tool-call-delta", "args": arguments}
                    events.append(self._delta(arguments, delta))
                return events
            case CallEnd(index, raw, error):
                return self._end_call(index, raw, error)

    def _delta(self, text: str, delta: dict[str, Any]) -> MessagesData:
        self._parts.append(text)
        return _event("content-block-delta", index=self._index, delta=delta)

    def _open(self, kind: str, content: dict[str, Any]) -> list[MessagesData]:
        """Start a block, unless it is open."""
        if self._kind == kind:
            return []
        closed = self._close()
        self._kind = kind
        self._index += 1
        self._parts = []
        return [*closed, _event("content-block-start", index=self._index, content=content)]

    def _open_call(self, index: int, name: str | None) -> list[MessagesData]:
        if self._kind != f"call {index}":
            self._call = {"id": new_call_id(), "name": name}
        block = {"type": "tool_call_chunk", **self._call, "args": "", "index": index}
        return self._open(f"call {index}", block)

    def _end_call(self, index: int, raw: str, error: str | None) -> list[MessagesData]:
        opened = self._open_call(index, None)
        arguments = "".join(self._parts)
        name, call_id = self._call["name"], self._call["id"]
        if error is None and name is not None:
            self._good_calls += 1
            content = call_block(name, call_id, json.loads(arguments, strict=False))
        else:
            content = {**broken_call(name, arguments or raw, error), "id": call_id}
        self._kind = ""
        finished = _event("content-block-finish", index=self._index, content=content)
        return [*opened, finished]

    def _close(self) -> list[MessagesData]:
        """Finish the block of text or reasoning that is open; a call is finished by its own end."""
        if not self._kind:
            return []
        field = "text" if self._kind == "text" else "reasoning"
        content = {"type": field, field: "".join(self._parts)}
        self._kind = ""
        return [_event("content-block-finish", index=self._index, content=content)]


def _event(event: str, **fields: Any) -> MessagesData:
    return cast("MessagesData", {"event": event, **fields})
