"""Every error a caller of the engine can meet.

The tree::

    EngineError
    ├── ConfigError              a bad or contradictory EngineConfig (also a ValueError)
    ├── ModelNotFoundError       the model name leads nowhere (also a FileNotFoundError)
    ├── UnsupportedModelError    found, but not something this engine can run
    │   └── CheckpointError      files are there, but corrupt, truncated, incomplete or misshapen
    ├── RequestError             a bad request parameter (also a ValueError)
    │   ├── ContextOverflowError prompt + answer do not fit the model's context
    │   └── ConstraintError      a grammar or schema that cannot be enforced
    ├── CapacityError            does not fit this machine's memory
    ├── RequestTimeoutError      the caller's own time limit passed (also a TimeoutError)
    ├── RequestAbortedError      embedding or scoring was given up by its caller
    ├── StepError                a step failed (out of memory, kernel error); the engine goes on
    ├── EngineDeadError          the engine loop, or its process, ended with an error
    └── EngineClosedError        the engine was closed by its owner

Messages say what was received, what is allowed and what to do. `EngineError` derives from plain
`Exception` on purpose: LlamaIndex turns a `ValueError` raised by a model into an empty answer and
a `RuntimeError` into a misleading one, so its connector maps `RequestError` to a class that is
neither.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EngineError(Exception):
    """Base class of every error the engine raises on purpose."""


class ConfigError(EngineError, ValueError):
    """An `EngineConfig` field has a value that cannot work, or two fields contradict each other."""


class ModelNotFoundError(EngineError, FileNotFoundError):
    """The model name is no folder, file, packaged model or reachable hub repository."""


class UnsupportedModelError(EngineError):
    """The model was found, but its architecture, dtype or a feature of it is not supported."""


class CheckpointError(UnsupportedModelError):
    """Model files are corrupt, truncated, incomplete, or hold tensors of the wrong shape."""


class RequestError(EngineError, ValueError):
    """A request parameter is malformed, unknown or out of range."""


class ContextOverflowError(RequestError):
    """Prompt plus requested tokens exceed `max_model_len`; nothing was truncated."""


class ConstraintError(RequestError):
    """A JSON schema, regex, choice or grammar cannot be enforced."""


class CapacityError(EngineError):
    """The model or the request needs more memory than this engine has."""


class RequestTimeoutError(EngineError, TimeoutError):
    """The caller's time limit passed before the request finished."""


class RequestAbortedError(EngineError):
    """A list of texts to embed or score was aborted before it was finished.

    Aborted generation does not raise this: it gives what there is, with `finish_reason` "abort".
    """


class StepError(EngineError):
    """The step this request ran in failed; `__cause__` has the reason. Other requests go on."""


class EngineDeadError(EngineError):
    """The engine loop ended with an error, which is this error's `__cause__`.

    With `placement="process"` also: its process died; the message says how, with its last words.
    """


class EngineClosedError(EngineError):
    """The engine was closed before or while this request was served."""


def nearest_name_hint(name: str, valid_names: Iterable[str]) -> str:
    """` Did you mean 'max_tokens'?` for the valid name nearest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(valid_names), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""
