"""A streamed answer as LangChain's chunks: text, reasoning and tool calls as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.messages import AIMessageChunk, ToolCallChunk
from langchain_core.outputs import ChatGenerationChunk

from engine import CallEnd, CallPiece, Delta, Piece, ReasoningPiece, RequestOutput, TextPiece
from llm_connectors._answer_plan import AnswerPlan, AnswerStream
from llm_connectors.langchain._fields import CallOptions
from llm_connectors.langchain._outputs import (
    chat_chunk,
    finish_reason,
    last_chunk_info,
    logprobs_info,
    usage_metadata,
)
from llm_connectors.langchain._tool_calls import new_call_id, unparsable_end


class ChunkMaker:
    """Makes the chunks of one answer. Not thread-safe.

    Text and reasoning come in chunks of their own; a call's first chunk has its name and id, the
    later ones its arguments. The last chunk has nothing but usage and metadata.

    Args:
        options: The call's.
        plan: How the answer is read.
        stream: Reads it; None for plain text.
        is_v1: Content is to be a list of blocks.
        with_usage: Put the token counts on the last chunk.
    """

    def __init__(
        self,
        options: CallOptions,
        plan: AnswerPlan,
        stream: AnswerStream | None,
        *,
        is_v1: bool,
        with_usage: bool,
    ) -> None:
        self._options = options
        self._plan = plan
        self._stream = stream
        self._is_v1 = is_v1
        self._with_usage = with_usage
        self._reasoning: list[str] = []
        self._calls: dict[int, tuple[str, str]] = {}  # index -> id, arguments so far
        self._good_calls = 0
        self._block: tuple[str, int] = ("", -1)  # kind and index of the last content block

    def chunks(self, delta: Delta, output: RequestOutput | None) -> list[ChatGenerationChunk]:
        """Chunks of what is new.

        Args:
            delta: What is new.
            output: The finished request, with its last delta.
        """
        params = self._plan.params
        if self._stream is None:
            usage = None
            if output is not None and self._with_usage:
                usage = usage_metadata(output.usage, self._plan.cached_block_size)
            return [chat_chunk(delta, output, self._options.model, params, usage)]
        pieces = self._stream.feed(delta.text)
        if output is not None:
            pieces += self._stream.finish(is_complete=delta.finish_reason == "stop")
        chunks = [ChatGenerationChunk(message=one) for one in self._messages(pieces)]
        logprobs = logprobs_info(delta, params)
        if logprobs and output is None:
            chunks = chunks or [ChatGenerationChunk(message=AIMessageChunk(content=""))]
            chunks[0].generation_info = logprobs
        if output is not None:
            chunks.append(self._last(delta, output))
        return chunks

    def _last(self, delta: Delta, output: RequestOutput) -> ChatGenerationChunk:
        usage = None
        if self._with_usage:
            reasoning = self._plan.count_tokens("".join(self._reasoning))
            usage = usage_metadata(output.usage, self._plan.cached_block_size, reasoning)
        message = AIMessageChunk(
            content=[] if self._is_v1 else "", usage_metadata=usage, chunk_position="last"
        )
        info = last_chunk_info(delta, output, self._options.model, self._plan.params)
        info["finish_reason"] = finish_reason(delta.finish_reason, has_calls=self._good_calls > 0)
        return ChatGenerationChunk(message=message, generation_info=info)

    def _messages(self, pieces: list[Piece]) -> list[AIMessageChunk]:
        messages: list[AIMessageChunk] = []
        for piece in merged(pieces):
            match piece:
                case TextPiece(text):
                    messages.append(self._text(text))
                case ReasoningPiece(text):
                    self._reasoning.append(text)
                    messages.append(self._reasoning_chunk(text))
                case CallPiece(index, name, arguments):
                    messages.append(self._call(index, name, arguments))
                case CallEnd(error=None):
                    self._good_calls += 1
                case CallEnd(index, raw):
                    messages.append(self._broken(index, raw))
        return messages

    def _text(self, text: str) -> AIMessageChunk:
        if not self._is_v1:
            return AIMessageChunk(content=text)
        return self._block_chunk({"type": "text", "text": text, "index": self._index("text")})

    def _reasoning_chunk(self, text: str) -> AIMessageChunk:
        if not self._is_v1:
            return AIMessageChunk(content="", additional_kwargs={"reasoning_content": text})
        index = self._index("reasoning")
        return self._block_chunk({"type": "reasoning", "reasoning": text, "index": index})

    def _call(self, index: int, name: str | None, arguments: str) -> AIMessageChunk:
        is_new = index not in self._calls
        call_id, so_far = self._calls.setdefault(index, (new_call_id(), ""))
        self._calls[index] = (call_id, so_far + arguments)
        return self._call_chunk(index, name, arguments, call_id if is_new else None)

    def _broken(self, index: int, raw: str) -> AIMessageChunk:
        if index in self._calls:
            return self._call_chunk(index, None, unparsable_end(self._calls[index][1]), None)
        return self._call_chunk(index, None, raw + unparsable_end(raw), new_call_id())

    def _call_chunk(
        self, index: int, name: str | None, arguments: str, call_id: str | None
    ) -> AIMessageChunk:
        chunk = ToolCallChunk(
            type="tool_call_chunk", name=name, args=arguments, id=call_id, index=index
        )
        if not self._is_v1:
            return AIMessageChunk(content="", tool_call_chunks=[chunk])
        return self._block_chunk({**chunk, "index": self._index(f"call {index}")}, [chunk])

    def _block_chunk(
        self, block: dict[str, Any], calls: Sequence[ToolCallChunk] = ()
    ) -> AIMessageChunk:
        return AIMessageChunk(
            content=[block],
            tool_call_chunks=list(calls),
            response_metadata={"output_version": "v1"},
        )

    def _index(self, kind: str) -> int:
        """Place of the content block that `kind` goes into: the last one, or a new one."""
        if self._block[0] != kind:
            self._block = (kind, self._block[1] + 1)
        return self._block[1]


def merged(pieces: list[Piece]) -> list[Piece]:
    """Neighbouring pieces of one kind as one: fewer, larger chunks when the reader lags."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        match last, piece:
            case TextPiece(before), TextPiece(text):
                joined[-1] = TextPiece(before + text)
            case ReasoningPiece(before), ReasoningPiece(text):
                joined[-1] = ReasoningPiece(before + text)
            case CallPiece(index, name, before), CallPiece(same, None, text) if index == same:
                joined[-1] = CallPiece(index, name, before + text)
            case _:
                joined.append(piece)
    return joined
