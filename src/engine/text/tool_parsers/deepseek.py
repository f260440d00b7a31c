"""DeepSeek V3, R1 and V3.1: calls between markers of their own.

Source: the chat templates of deepseek-ai/DeepSeek-V3-0324, DeepSeek-R1-0528 (type, separator,
name, fenced JSON) and DeepSeek-V3.1 (name, separator, JSON).
"""

from __future__ import annotations

from engine.text.call_syntax import CallSyntax
from engine.text.tool_parsers.base import BrokenCall, Steps
from engine.text.tool_parsers.json_calls import JsonCallParser

_ALL_BEGIN = "<｜tool▁calls▁begin｜>"
_ALL_END = "<｜tool▁calls▁end｜>"
_BEGIN = "<｜tool▁call▁begin｜>"
_END = "<｜tool▁call▁end｜>"
_SEPARATOR = "<｜tool▁sep｜>"


class DeepSeekParser(JsonCallParser):
    """`<｜tool▁call▁begin｜>f<｜tool▁sep｜>{…}<｜tool▁call▁end｜>` in a pair of outer markers."""

    name = "deepseek"
    syntax = CallSyntax(
        f"{_BEGIN}function{_SEPARATOR}",
        "\n```json\n",
        f"\n```{_END}",
        begin=_ALL_BEGIN,
        end=_ALL_END,
        is_object=False,
    )
    markers = (_ALL_BEGIN, _ALL_END, _BEGIN, _END, _SEPARATOR)

    def _parse(self) -> Steps:
        while (opener := (yield from self._text_until((_ALL_BEGIN, _BEGIN)))) is not None:
            self._call_start = self._pos
            if opener == _ALL_BEGIN:
                self._pos += len(opener)
                yield from self._skip_space()
            try:
                yield from self._calls()
            except BrokenCall as broken:
                yield from self._give_up(str(broken), (_ALL_END,))

    def _calls(self) -> Steps:
        num_calls = 0
        while True:
            start = self._pos
            yield from self._skip_space()
            marker = yield from self._starts_with(_BEGIN, _ALL_END)
            if marker != _BEGIN:
                if marker is None:
                    self._pos = start
                if not num_calls:
                    raise BrokenCall("the calls have no beginning")
                return
            self._call_start = start
            num_calls += 1
            yield from self._call()

    def _call(self) -> Steps:
        start = self._pos
        if (yield from self._find(_SEPARATOR, _END, _ALL_END)) != _SEPARATOR:
            raise BrokenCall("the call is cut off before its arguments")
        name = self._buffer[start : self._pos].strip()
        self._pos += len(_SEPARATOR)
        if (yield from self._skip_space()) != "{":
            # The older form: what stood before the separator was the call's type.
            start = self._pos
            yield from self._find("\n", "{", _END)
            name = self._buffer[start : self._pos].strip()
            yield from self._skip_space()
            yield from self._starts_with("```json")
        if not name:
            raise BrokenCall("the call names no tool")
        self._begin_call(name)
        yield from self._skip_space()
        yield from self._stream_arguments()
        yield from self._skip_space()
        yield from self._starts_with("```")
        yield from self._skip_space()
        yield from self._starts_with(_END)
        self._end_call()
