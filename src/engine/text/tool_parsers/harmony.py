"""gpt-oss: the harmony format, in which an answer is several messages on named channels.

Source: OpenAI's description of the harmony response format (cookbook, openai/harmony). The
"analysis" channel is reasoning, "final" the answer, a message to `functions.f` a call. What
"commentary" says to nobody is a preamble for the reader. Reads reasoning and calls at once.
"""

from __future__ import annotations

import re

from engine.text.answer_pieces import ReasoningPiece
from engine.text.call_syntax import CallSyntax
from engine.text.tool_parsers.base import Steps, ToolParser
from engine.text.tool_parsers.json_calls import object_error

_CHANNEL, _MESSAGE, _START = "<|channel|>", "<|message|>", "<|start|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", _START, _CHANNEL)
_RECIPIENT = re.compile(r"to=([\w.\-]+)")
_CHANNEL_NAME = re.compile(r"<\|channel\|>\s*(\w+)")


class HarmonyParser(ToolParser):
    """`<|channel|>commentary to=functions.f <|constrain|>json<|message|>{…}<|call|>`."""

    name = "harmony"
    syntax = CallSyntax(
        f"{_CHANNEL}commentary to=functions.",
        f" <|constrain|>json{_MESSAGE}",
        "",
        between=f"<|call|>{_START}assistant",
        is_object=False,
    )
    markers = (_CHANNEL, _MESSAGE, _START, "<|end|>", "<|call|>", "<|return|>", "<|constrain|>")

    def _parse(self) -> Steps:
        # The prompt ends inside a header, and the recipient may come before the channel.
        yield from self._skip_space()
        is_header = (yield from self._starts_with("to=")) is not None
        self._pos = 0
        if is_header:
            yield from self._message()
        while True:
            found = yield from self._text_until((_CHANNEL, _START, "<|end|>", "<|return|>"))
            if found is None:
                return
            if found in ("<|end|>", "<|return|>"):
                self._pos += len(found)
                continue
            yield from self._message()

    def _message(self) -> Steps:
        self._call_start = start = self._pos
        found = yield from self._find(_MESSAGE)
        header = self._buffer[start : self._pos]
        if found is None:
            if _RECIPIENT.search(header):
                self._end_call("the call is cut off before its arguments")
            return  # the markup of a message that never began
        self._pos += len(_MESSAGE)
        recipient = _RECIPIENT.search(header)
        channel = _CHANNEL_NAME.search(header)
        if recipient is not None:
            yield from self._call(self._tool_name(recipient.group(1)))
        elif channel is not None and channel.group(1) == "analysis":
            yield from self._reasoning()
        # Text is passed on by the loop, which stops at the message's end.

    def _tool_name(self, recipient: str) -> str:
        name = recipient.removeprefix("functions.")
        # The content type is sometimes glued to the name.
        if self._tools is not None and name not in self._tools:
            shorter = name.removesuffix("json")
            return shorter if shorter in self._tools else name
        return name

    def _reasoning(self) -> Steps:
        while True:
            end = self._safe_end()
            if end > self._pos:
                self._pieces.append(ReasoningPiece(self._buffer[self._pos : end]))
                self._pos = end
            if self._at_end() or not (yield from self._more()):
                return

    def _call(self, name: str) -> Steps:
        self._begin_call(name)
        start = sent = self._pos
        while True:
            self._pos = self._safe_end()
            self._emit_arguments(self._buffer[sent : self._pos])
            sent = self._pos
            if self._at_end() or not (yield from self._more()):
                break
        arguments = self._buffer[start : self._pos]
        error = None
        if arguments.strip():
            error = object_error(arguments)
        else:
            self._emit_arguments("{}")
        for end in _ENDS[:3]:
            if self._buffer.startswith(end, self._pos):
                self._pos += len(end)
        self._end_call(error)

    def _safe_end(self) -> int:
        """Where the message ends, or up to where it certainly has not ended."""
        places = [place for one in _ENDS if (place := self._buffer.find(one, self._pos)) >= 0]
        if places:
            return min(places)
        if self._is_final:
            return len(self._buffer)
        start = self._buffer.rfind("<", max(self._pos, len(self._buffer) - 12))
        tail = self._buffer[start:]
        is_beginning = start >= 0 and any(one.startswith(tail) for one in _ENDS)
        return start if is_beginning else len(self._buffer)

    def _at_end(self) -> bool:
        return any(self._buffer.startswith(one, self._pos) for one in _ENDS)
