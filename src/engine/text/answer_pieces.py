"""What an answer is made of once its markup is read: text, reasoning and tool calls."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class TextPiece:
    """New text of the answer."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class ReasoningPiece:
    """New text of the reasoning before the answer."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallPiece:
    """A tool call begins, or goes on.

    Attributes:
        index: Which call of the answer, from 0.
        name: The tool's name on the call's first piece, None on later ones.
        arguments: New JSON text of the arguments; may be empty.
    """

    index: int
    name: str | None
    arguments: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallEnd:
    """A tool call is over. Comes exactly once for each index.

    Attributes:
        index: Which call. A broken one may end without ever having begun.
        raw: The call as the model wrote it.
        error: What is wrong with it; None for a call whose arguments are a JSON object.
    """

    index: int
    raw: str
    error: str | None = None


Piece = TextPiece | ReasoningPiece | CallPiece | CallEnd


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole tool call.

    Attributes:
        index: Which call of the answer, from 0.
        name: The tool; None where a broken call did not get that far.
        arguments: JSON text; of a broken call, what there is of it.
        raw: The call as the model wrote it.
        error: None for a call that can be made.
    """

    index: int
    name: str | None
    arguments: str
    raw: str
    error: str | None = None

    def parsed_arguments(self) -> dict[str, Any]:
        """The arguments of a call without an error."""
        parsed: dict[str, Any] = json.loads(self.arguments, strict=False)
        return parsed


@dataclasses.dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """A whole answer, taken apart.

    Attributes:
        text: What is for the reader.
        reasoning: What the model thought before it.
        calls: Tool calls in order, broken ones among them.
    """

    text: str
    reasoning: str
    calls: tuple[ToolCall, ...]


def assemble(pieces: Iterable[Piece]) -> ParsedAnswer:
    """The answer that `pieces` are of. They must be complete: each call has its end."""
    texts: list[str] = []
    reasoning: list[str] = []
    names: dict[int, str] = {}
    arguments: dict[int, list[str]] = {}
    calls: list[ToolCall] = []
    for piece in pieces:
        match piece:
            case TextPiece(text):
                texts.append(text)
            case ReasoningPiece(text):
                reasoning.append(text)
            case CallPiece(index, name, new):
                if name is not None:
                    names[index] = name
                arguments.setdefault(index, []).append(new)
            case CallEnd(index, raw, error):
                joined = "".join(arguments.get(index, ()))
                calls.append(ToolCall(index, names.get(index), joined, raw, error))
    return ParsedAnswer("".join(texts), "".join(reasoning), tuple(calls))
