"""Text, reasoning and tool calls of an answer, read out of what the model writes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from llama_index.core.base.llms.types import ToolCallBlock

from engine import CallEnd, CallPiece, ReasoningPiece, TextPiece
from llm_connectors._answer_plan import AnswerStream
from llm_connectors.llama_index.tools import new_call_id


class AnswerParts:
    """Text, reasoning and calls of one answer, put together while it is being written.

    Args:
        reader: Parts them; None for an answer that is text as it stands.

    Attributes:
        text: The text up to now.
        thinking: The reasoning up to now.
    """

    def __init__(self, reader: AnswerStream | None) -> None:
        self._reader = reader
        self.text = ""
        self.thinking = ""
        self._calls: dict[int, _Call] = {}
        self._broken: list[dict[str, Any]] = []

    def feed(self, text: str, finish_reason: str | None) -> tuple[str, str, bool]:
        """Take the answer's next part.

        Args:
            text: As it came from the model.
            finish_reason: Set on the last part.

        Returns:
            New text, new reasoning, and whether a call went on.
        """
        if self._reader is None:
            self.text += text
            return text, "", False
        pieces = self._reader.feed(text)
        if finish_reason is not None:
            pieces += self._reader.finish(is_complete=finish_reason == "stop")
        text = thinking = ""
        has_call = False
        for piece in pieces:
            match piece:
                case TextPiece(new):
                    text += new
                case ReasoningPiece(new):
                    thinking += new
                case CallPiece(index, name, new):
                    has_call = True
                    call = self._calls.setdefault(index, _Call())
                    call.name = name if name is not None else call.name
                    call.arguments += new
                case CallEnd(index, raw, error):
                    has_call = True
                    self._end_call(index, raw, error)
        self.text += text
        self.thinking += thinking
        return text, thinking, has_call

    def _end_call(self, index: int, raw: str, error: str | None) -> None:
        call = self._calls.get(index)
        if call is not None and error is None:
            call.is_whole = True
            return
        # Half a call must not be made, so it is reported beside the answer instead.
        name = self._calls.pop(index).name if call is not None else None
        self._broken.append({"name": name, "text": raw, "error": error})

    @property
    def calls(self) -> list[ToolCallBlock]:
        """Calls up to now whose tool is known; of one being written the arguments are text."""
        return [call.block() for call in self._calls.values() if call.name]

    def complete(self, raw: dict[str, Any]) -> None:
        """Put what the calls came to into the metadata of the whole answer."""
        if self._calls and raw["finish_reason"] == "stop":
            raw["finish_reason"] = "tool_calls"
        if self._broken:
            raw["invalid_tool_calls"] = self._broken


@dataclass(slots=True)
class _Call:
    """A call that is being written."""

    name: str | None = None
    arguments: str = ""
    is_whole: bool = False
    call_id: str = field(default_factory=new_call_id)

    def block(self) -> ToolCallBlock:
        kwargs: dict[str, Any] | str = self.arguments
        if self.is_whole:
            kwargs = json.loads(self.arguments, strict=False)
        return ToolCallBlock(
            tool_call_id=self.call_id, tool_name=self.name or "", tool_kwargs=kwargs
        )
