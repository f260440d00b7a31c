"""The errors a LlamaIndex caller meets while a request is served.

LlamaIndex swallows or disguises two built-in families: a `ValueError` or `TypeError` raised by a
model becomes the answer "Empty Response" in the Refine and Compact synthesizers, and a
`RuntimeError` becomes "Detected nested async" wherever sync code runs coroutines
(`llama_index.core.async_utils.asyncio_run`). The engine's `RequestError` and `ConfigError` are
also `ValueError`s, so this package gives them twins that are `EngineError`s and nothing else::

    engine.EngineError
    ├── RequestError              for engine.RequestError
    │   ├── ContextOverflowError  for engine.ContextOverflowError
    │   ├── ConstraintError       for engine.ConstraintError
    │   └── UnsupportedBlockError a content block the model cannot read
    ├── AnswerError               an answer that is not what was asked for
    │   ├── NoToolCallError       a call was expected and none came
    │   └── StructuredOutputError an answer does not fit the class it was asked for
    └── ConfigError               for engine.ConfigError, met when the engine is started late
        └── ForeignProcessError   a pickled model used in another process

All other engine errors (`CapacityError`, `RequestTimeoutError`, `EngineClosedError`, ...) reach
the caller as they are.
"""

from __future__ import annotations

import engine
from engine import EngineError
from llm_connectors._errors import ErrorMap


class RequestError(EngineError):
    """A request parameter is malformed, unknown or out of range."""


class ContextOverflowError(RequestError):
    """Prompt plus requested tokens exceed the context window; nothing was truncated."""


class ConstraintError(RequestError):
    """A JSON schema, regex, choice or grammar cannot be enforced."""


class UnsupportedBlockError(RequestError):
    """A message holds a content block that the model cannot read; nothing was dropped."""


class AnswerError(EngineError):
    """The model answered, but not with what was asked for."""


class NoToolCallError(AnswerError):
    """A tool call was expected and none came."""


class StructuredOutputError(AnswerError):
    """The answer does not fit the class it was asked for, or was cut off before its end."""


class ConfigError(EngineError):
    """Options that cannot work, or that differ from those of the engine already loaded."""


class ForeignProcessError(ConfigError):
    """A model object was carried into another process, where its engine is not."""


_SAME: tuple[type[EngineError], ...] = (
    EngineError,
    engine.ModelNotFoundError,
    engine.UnsupportedModelError,
    engine.CheckpointError,
    engine.CapacityError,
    engine.RequestTimeoutError,
    engine.RequestAbortedError,
    engine.StepError,
    engine.EngineDeadError,
    engine.EngineClosedError,
    UnsupportedBlockError,
    NoToolCallError,
    StructuredOutputError,
    ForeignProcessError,
)

ERRORS = ErrorMap(
    {
        **{error_class: error_class for error_class in _SAME},
        engine.RequestError: RequestError,
        engine.ContextOverflowError: ContextOverflowError,
        engine.ConstraintError: ConstraintError,
        engine.ConfigError: ConfigError,
    }
)
"""Engine errors -> what a LlamaIndex caller is shown."""
