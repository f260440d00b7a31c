"""Models from the Hugging Face hub: the local cache first, then the network."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from engine.errors import ModelNotFoundError

HUB_NAME: Final = re.compile(
    r"(?P<repo>[a-z\d][\w.-]*/[\w.-]+)(:(?P<file>[^:]+\.gguf))?", re.IGNORECASE
)
"""`org/name`, or `org/name:file.gguf` for one GGUF file of a repository."""

_CONFIG_PATTERNS: Final = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_WEIGHT_PATTERNS: Final = ["*.safetensors"]
# Nested folders hold copies in other formats, but for the numbered ones of sentence-transformers
# (`1_Pooling`); consolidated files are a second copy of the weights.
_IGNORED_PATTERNS: Final = ["[!0-9]*/*", "*/*/*", "consolidated*"]


def hub_folder(
    repo_id: str,
    *,
    revision: str | None,
    local_files_only: bool,
    is_complete: Callable[[Path], bool],
    with_weights: bool,
    with_code: bool = False,
) -> Path:
    """The local folder of a repository's config, tokenizer and safetensors files.

    Args:
        repo_id: `org/name`.
        revision: Branch, tag or commit; None is the default branch.
        local_files_only: Look in the cache only.
        is_complete: Whether a cached folder has all that is needed. One that has not goes to the
            network.
        with_weights: Whether to download the weights too.
        with_code: Whether to download Python code too. Nothing is run.

    Raises:
        ModelNotFoundError: Not in the cache and not to be had from the hub, with the reason.
    """
    patterns = _CONFIG_PATTERNS + (_WEIGHT_PATTERNS if with_weights else [])
    patterns += ["*.py"] if with_code else []
    get = _snapshot(repo_id, revision, patterns, _IGNORED_PATTERNS)
    return _cached_or_fetched(repo_id, revision, local_files_only, get, is_complete)


def hub_file(repo_id: str, filename: str, *, revision: str | None, local_files_only: bool) -> Path:
    """The local path of one file of a repository.

    Raises:
        ModelNotFoundError: Not in the cache and not to be had from the hub, with the reason.
    """
    what = f"{repo_id}:{filename}"
    # Not hf_hub_download: without a network that one tries six times, for 23 seconds.
    get = _snapshot(repo_id, revision, [glob.escape(filename)], [])
    folder = _cached_or_fetched(
        what, revision, local_files_only, get, lambda folder: (folder / filename).is_file()
    )
    if not (folder / filename).is_file():
        msg = f"Hub model {what!r}: the repository has no file {filename!r}."
        raise ModelNotFoundError(msg)
    return folder / filename


def cached_repo_ids() -> list[str]:
    """Ids of the model repositories in the local cache."""
    cache = Path(constants.HF_HUB_CACHE)
    if not cache.is_dir():
        return []
    folders = (path.name for path in cache.iterdir() if path.name.startswith("models--"))
    return sorted(name.removeprefix("models--").replace("--", "/", 1) for name in folders)


def _snapshot(
    repo_id: str, revision: str | None, patterns: list[str], ignored: list[str]
) -> Callable[[bool], Path]:
    """A function that gives the repository's local folder, from the cache alone if told so."""

    def get(cache_only: bool) -> Path:
        folder = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            local_files_only=cache_only,
            allow_patterns=patterns,
            ignore_patterns=ignored,
        )
        return Path(folder)

    return get


def _cached_or_fetched(
    what: str,
    revision: str | None,
    local_files_only: bool,
    get: Callable[[bool], Path],
    is_complete: Callable[[Path], bool],
) -> Path:
    cached: Path | None = None
    try:
        cached = get(True)
        if is_complete(cached):
            return cached
        in_cache = f"the cached copy {cached} is incomplete"
    except LocalEntryNotFoundError:
        in_cache = f"it is not in the cache {constants.HF_HUB_CACHE}"
    except HFValidationError as error:
        msg = f"{what!r} is no valid hub id: {_first_line(error)}."
        raise ModelNotFoundError(msg) from error
    except OSError as error:
        in_cache = f"the cache {constants.HF_HUB_CACHE} cannot be read ({_first_line(error)})"
    at = "" if revision is None else f" at revision {revision!r}"
    if local_files_only or constants.HF_HUB_OFFLINE:
        why = "local_files_only=True" if local_files_only else "HF_HUB_OFFLINE is set"
        msg = f"Hub model {what!r}{at}: {in_cache}, and the network is not asked ({why})."
        raise ModelNotFoundError(msg)
    try:
        return get(False)
    except Exception as error:
        msg = f"Hub model {what!r}{at}: {in_cache}, and {_reason(error)}."
        raise ModelNotFoundError(msg) from error


def _reason(error: Exception) -> str:
    """Why the hub gave nothing, in one clause."""
    if isinstance(error, GatedRepoError):
        return "it is gated: accept its licence on the hub, then `hf auth login` or set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return "the hub has no such revision of it"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such repository (a private one needs `hf auth login` or HF_TOKEN)"
    if isinstance(error, HfHubHTTPError):
        return f"the hub answered with an error ({_first_line(error)})"
    return f"the hub cannot be reached ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].removeprefix("Got: ").rstrip(".") if lines else type(error).__name__
