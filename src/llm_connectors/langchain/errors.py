"""The errors a LangChain caller meets: each is the engine's class and LangChain's at once.

So `except engine.ContextOverflowError` and `except langchain_core.exceptions.ContextOverflowError`
both catch the same failure, LangChain's summarising middleware reacts to it, and its retrying
middleware reads `is_retryable`::

    engine's class                      langchain_core.exceptions       is_retryable
    ConfigError                         ModelInvalidRequestError        no
    RequestError, ConstraintError       ModelInvalidRequestError        no
    ContextOverflowError                ContextOverflowError            no
    ModelNotFoundError                  ModelNotFoundError              no
    UnsupportedModelError, CheckpointError  ModelNotFoundError          no
    RequestTimeoutError                 ModelTimeoutError               yes
    RequestAbortedError                 ModelError                      no
    StepError                           ModelAPIError                   yes
    CapacityError                       ModelAPIError                   no
    EngineDeadError, EngineClosedError  ModelAPIError                   no
    EngineError (any other)             ModelError                      no

A failed step (`StepError`) is worth another try: most requests in it were innocent neighbours, and
memory that was short for one step may be there for the next.

Constructors report bad values as `pydantic.ValidationError`, as all LangChain classes do.
"""

from __future__ import annotations

from langchain_core import exceptions as core

import engine
from llm_connectors._errors import ErrorMap


class EngineError(engine.EngineError, core.ModelError):
    """An engine error without a more specific class."""


class ConfigError(engine.ConfigError, core.ModelInvalidRequestError):
    """An engine option is bad, or the model is loaded already with other options."""


class ModelNotFoundError(engine.ModelNotFoundError, core.ModelNotFoundError):
    """The model name is no folder, file, packaged model or reachable hub repository."""


class UnsupportedModelError(engine.UnsupportedModelError, core.ModelNotFoundError):
    """The model was found, but the engine cannot run it."""


class CheckpointError(engine.CheckpointError, UnsupportedModelError):
    """The model's files are corrupt, truncated or incomplete."""


class RequestError(engine.RequestError, core.ModelInvalidRequestError):
    """A message, an option or a call is malformed, unknown or out of range."""


class ContextOverflowError(engine.ContextOverflowError, core.ContextOverflowError):
    """Prompt plus requested tokens exceed the model's context; nothing was truncated."""


class ConstraintError(engine.ConstraintError, core.ModelInvalidRequestError):
    """A schema, regex, choice or grammar cannot be enforced."""


class CapacityError(engine.CapacityError, core.ModelAPIError):
    """The model or the request needs more memory than there is."""

    is_retryable = False


class RequestTimeoutError(engine.RequestTimeoutError, core.ModelTimeoutError):
    """`timeout` passed before the answer was finished; the request was aborted."""


class RequestAbortedError(engine.RequestAbortedError, core.ModelError):
    """A list of texts to embed or score was aborted by its caller."""


class StepError(engine.StepError, core.ModelAPIError):
    """The engine step this request ran in failed; the engine goes on."""


class EngineDeadError(engine.EngineDeadError, core.ModelAPIError):
    """The engine ended with an error, which is this error's `__cause__`."""

    is_retryable = False


class EngineClosedError(engine.EngineClosedError, core.ModelAPIError):
    """The engine was closed before or while the request was served."""

    is_retryable = False


LANGCHAIN_ERRORS = ErrorMap(
    {
        engine.EngineError: EngineError,
        engine.ConfigError: ConfigError,
        engine.ModelNotFoundError: ModelNotFoundError,
        engine.UnsupportedModelError: UnsupportedModelError,
        engine.CheckpointError: CheckpointError,
        engine.RequestError: RequestError,
        engine.ContextOverflowError: ContextOverflowError,
        engine.ConstraintError: ConstraintError,
        engine.CapacityError: CapacityError,
        engine.RequestTimeoutError: RequestTimeoutError,
        engine.RequestAbortedError: RequestAbortedError,
        engine.StepError: StepError,
        engine.EngineDeadError: EngineDeadError,
        engine.EngineClosedError: EngineClosedError,
    }
)
