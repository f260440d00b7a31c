"""Parting a model's reasoning from its answer while both are being written."""

from __future__ import annotations

from collections.abc import Mapping

from engine.errors import ConfigError, nearest_name_hint
from engine.text.answer_pieces import Piece, ReasoningPiece, TextPiece
from engine.text.tool_parsers.base import ToolParser

REASONING_MARKS: Mapping[str, tuple[str, str]] = {
    "think": ("<think>", "</think>"),
    "mistral": ("[THINK]", "[/THINK]"),
    "granite": ("Here is my thought process:", "Here is my response:"),
    "gemma": ("<|channel>thought", "<channel|>"),
}
"""Style -> what begins and what ends the reasoning. "harmony" is read with the tool calls.

think: DeepSeek R1, Qwen3, SmolLM3, Granite 4 and most others; mistral: Magistral; granite:
Granite 3.2 with `thinking`; gemma: Gemma 4. Read from these models' chat templates.
"""

REASONING_STYLES: tuple[str, ...] = (*REASONING_MARKS, "harmony", "none")
"""What `reasoning_parser=` takes beside "auto"."""


def choose_reasoning(template: str | None) -> str:
    """The style of a model, from the marks its chat template knows; "none" for none of them."""
    if not template:
        return "none"
    if "<|channel|>" in template and "<|message|>" in template:
        return "harmony"
    for style, (opener, closer) in REASONING_MARKS.items():
        if opener in template or closer in template:
            return style
    return "none"


def check_reasoning_style(style: str) -> None:
    """Refuse a style nobody knows.

    Raises:
        ConfigError: It is not in `REASONING_STYLES`.
    """
    if style not in REASONING_STYLES:
        hint = nearest_name_hint(style, REASONING_STYLES)
        msg = f"reasoning_parser={style!r} is unknown; there are {', '.join(REASONING_STYLES)}."
        raise ConfigError(msg + hint)


class ReasoningSplitter:
    """Parts an answer at its reasoning marks, however it is cut into pieces.

    Reasoning stands at the answer's start or nowhere: the same words later are text. White space
    next to the marks is dropped. Without marks the answer is passed on as it is.

    Args:
        style: A key of `REASONING_MARKS`.
        is_open: The prompt ended with the opening mark, so the answer begins inside.
    """

    def __init__(self, style: str, *, is_open: bool) -> None:
        self._opener, self._closer = REASONING_MARKS[style]
        self._state = "inside" if is_open else "before"
        self._held = ""
        self._has_reasoning = False

    def feed(self, text: str) -> tuple[str, str]:
        """New reasoning and new text of the answer, in this order."""
        self._held += text
        reasoning = ""
        if self._state == "before":
            self._look_for_opener(is_final=False)
        if self._state == "inside":
            reasoning = self._take_reasoning()
        return reasoning, self._take_text()

    def finish(self) -> tuple[str, str]:
        """The rest. An answer that ends inside its reasoning has no text."""
        if self._state == "before":
            self._look_for_opener(is_final=True)
        if self._state == "inside":
            rest, self._held = self._held.rstrip(), ""
            return rest if self._has_reasoning else rest.lstrip(), ""
        return "", self._take_text()

    def _look_for_opener(self, *, is_final: bool) -> None:
        start = self._held.lstrip()
        if start.startswith(self._opener):
            self._held = start[len(self._opener) :]
            self._state = "inside"
        elif is_final or not self._opener.startswith(start):
            self._state = "text"

    def _take_reasoning(self) -> str:
        if not self._has_reasoning:
            self._held = self._held.lstrip()
        place = self._held.find(self._closer)
        if place >= 0:
            reasoning = self._held[:place].rstrip()
            self._held = self._held[place + len(self._closer) :]
            self._state = "after"
        else:
            kept = len(self._held)
            for length in range(min(len(self._closer) - 1, kept), 0, -1):
                if self._closer.startswith(self._held[-length:]):
                    kept -= length
                    break
            reasoning = self._held[:kept].rstrip()
            self._held = self._held[len(reasoning) :]
        self._has_reasoning = self._has_reasoning or bool(reasoning)
        return reasoning

    def _take_text(self) -> str:
        if self._state == "after":
            self._held = self._held.lstrip()
            if self._held:
                self._state = "text"
        if self._state != "text":
            return ""
        text, self._held = self._held, ""
        return text


class AnswerReader:
    """Reads one answer as it is written: first its reasoning, then its text and tool calls.

    Args:
        splitter: Parts the reasoning; None for a model without, or whose tool parser does it.
        tool_parser: Reads the calls; None where no tools were offered.
    """

    def __init__(self, splitter: ReasoningSplitter | None, tool_parser: ToolParser | None) -> None:
        self._splitter = splitter
        self._tool_parser = tool_parser

    def feed(self, text: str) -> list[Piece]:
        """What `text`, the answer's next part, makes certain."""
        if self._splitter is None:
            return self._read(text)
        reasoning, rest = self._splitter.feed(text)
        return [*_reasoning(reasoning), *self._read(rest)]

    def finish(self) -> list[Piece]:
        """The rest, once the answer is complete. Call it once, last."""
        pieces: list[Piece] = []
        if self._splitter is not None:
            reasoning, rest = self._splitter.finish()
            pieces = [*_reasoning(reasoning), *self._read(rest)]
        if self._tool_parser is not None:
            pieces += self._tool_parser.finish()
        return pieces

    def _read(self, text: str) -> list[Piece]:
        if not text:
            return []
        return [TextPiece(text)] if self._tool_parser is None else self._tool_parser.feed(text)


def _reasoning(text: str) -> list[Piece]:
    return [ReasoningPiece(text)] if text else []
