"""An in-process LLM engine: continuous batching, paged KV cache, Triton attention."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from engine.config import EngineConfig
from engine.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    ConstraintError,
    ContextOverflowError,
    EngineClosedError,
    EngineDeadError,
    EngineError,
    ModelNotFoundError,
    RequestAbortedError,
    RequestError,
    RequestTimeoutError,
    StepError,
    UnsupportedModelError,
    nearest_name_hint,
)
from engine.outputs import (
    CompletionOutput,
    Delta,
    Logprob,
    PoolingOutput,
    RequestMetrics,
    RequestOutput,
    Usage,
)
from engine.sampling_params import SamplingParams
from engine.stats import EngineStats

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.handle import RequestHandle, merge_deltas
    from engine.llm import LLM
    from engine.pooling_handle import PoolingHandle
    from engine.text.answer_format import AnswerFormat, check_parser_names
    from engine.text.answer_pieces import (
        CallEnd,
        CallPiece,
        ParsedAnswer,
        Piece,
        ReasoningPiece,
        TextPiece,
        ToolCall,
        assemble,
    )
    from engine.text.call_syntax import CallSyntax
    from engine.text.reasoning import AnswerReader

__all__ = [
    "LLM",
    "AnswerFormat",
    "AnswerReader",
    "CallEnd",
    "CallPiece",
    "CallSyntax",
    "CapacityError",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "ConstraintError",
    "ContextOverflowError",
    "Delta",
    "Engine",
    "EngineClosedError",
    "EngineConfig",
    "EngineDeadError",
    "EngineError",
    "EngineStats",
    "Logprob",
    "ModelNotFoundError",
    "ParsedAnswer",
    "Piece",
    "PoolingHandle",
    "PoolingOutput",
    "ReasoningPiece",
    "RequestAbortedError",
    "RequestError",
    "RequestHandle",
    "RequestMetrics",
    "RequestOutput",
    "RequestTimeoutError",
    "SamplingParams",
    "StepError",
    "TextPiece",
    "ToolCall",
    "UnsupportedModelError",
    "Usage",
    "assemble",
    "check_parser_names",
    "merge_deltas",
    "nearest_name_hint",
]

_LAZY = {
    "Engine": "engine.engine",
    "LLM": "engine.llm",
    "PoolingHandle": "engine.pooling_handle",
    "RequestHandle": "engine.handle",
    "merge_deltas": "engine.handle",
    "AnswerFormat": "engine.text.answer_format",
    "check_parser_names": "engine.text.answer_format",
    "AnswerReader": "engine.text.reasoning",
    "CallSyntax": "engine.text.call_syntax",
    "CallEnd": "engine.text.answer_pieces",
    "CallPiece": "engine.text.answer_pieces",
    "ParsedAnswer": "engine.text.answer_pieces",
    "Piece": "engine.text.answer_pieces",
    "ReasoningPiece": "engine.text.answer_pieces",
    "TextPiece": "engine.text.answer_pieces",
    "ToolCall": "engine.text.answer_pieces",
    "assemble": "engine.text.answer_pieces",
}
"""Names whose modules load torch or jinja2; importing the package stays cheap."""


def __getattr__(name: str) -> Any:
    module_name = _LAZY.get(name)
    if module_name is None:
        msg = f"module 'engine' has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(importlib.import_module(module_name), name)


def __dir__() -> list[str]:
    return sorted(__all__)
