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
    from engine.handle import RequestHandle
    from engine.llm import LLM
    from engine.pooling_handle import PoolingHandle

__all__ = [
    "LLM",
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
    "PoolingHandle",
    "PoolingOutput",
    "RequestAbortedError",
    "RequestError",
    "RequestHandle",
    "RequestMetrics",
    "RequestOutput",
    "RequestTimeoutError",
    "SamplingParams",
    "StepError",
    "UnsupportedModelError",
    "Usage",
    "nearest_name_hint",
]

_LAZY = {
    "Engine": "engine.engine",
    "LLM": "engine.llm",
    "PoolingHandle": "engine.pooling_handle",
    "RequestHandle": "engine.handle",
}
"""Names whose modules load torch; importing the package stays cheap."""


def __getattr__(name: str) -> Any:
    module_name = _LAZY.get(name)
    if module_name is None:
        msg = f"module 'engine' has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(importlib.import_module(module_name), name)


def __dir__() -> list[str]:
    return sorted(__all__)
