"""What in this installation would stop LlamaIndex from working without a network.

    python -m llm_connectors.llama_index.doctor

prints one line per check and ends with status 1 if something is wrong. It opens no socket, loads no
model and changes nothing.

LlamaIndex's package brings OpenAI's tokenizer files and NLTK's data along. Two environment
variables can point away from them, an installer can leave them out or hard-link them, and
LlamaIndex then downloads at its first use, hangs or fails. Pipelines set up by `configure_settings`
need neither; splitters, memories and prompt helpers built without it do.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

_TIKTOKEN_FILE = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
"""Name of OpenAI's cl100k_base in tiktoken's cache: the SHA-1 of its address."""

_NLTK_DATA = ("corpora/stopwords", "tokenizers/punkt_tab")


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check.

    Attributes:
        name: What was looked at.
        problem: What is wrong and what to do; None where nothing is.
    """

    name: str
    problem: str | None = None


def diagnose(
    environment: Mapping[str, str] = os.environ, static: Path | None = None
) -> list[Finding]:
    """All checks, in the order in which LlamaIndex would trip.

    Args:
        environment: Variables of the process.
        static: Folder of the data that LlamaIndex's package brings along. Default: the installed
            one.
    """
    static = _static_folder() if static is None else static
    checks: dict[str, Callable[[], str | None]] = {
        f"llama-index-core {version('llama-index-core')}": lambda: None,
        "OpenAI's tokenizer files": lambda: _tiktoken(environment, static),
        "NLTK's data": lambda: _nltk(environment, static),
        "NLTK reads its data": lambda: _hard_links(environment, static),
        "default model": _defaults,
    }
    return [Finding(name, check()) for name, check in checks.items()]


def _static_folder() -> Path:
    spec = importlib.util.find_spec("llama_index.core")
    assert spec is not None, "this package imports llama_index.core"
    assert spec.origin is not None, "it is a package with an __init__.py"
    return Path(spec.origin).parent / "_static"


def _tiktoken(environment: Mapping[str, str], static: Path) -> str | None:
    own = environment.get("TIKTOKEN_CACHE_DIR")
    folder = static / "tiktoken_cache" if own is None else Path(own)
    if (folder / _TIKTOKEN_FILE).is_file():
        return None
    if own is not None:
        return (
            f"TIKTOKEN_CACHE_DIR={own} has no cl100k_base, so LlamaIndex would download it. Unset "
            "the variable, copy the file there from LlamaIndex's package, or call "
            "configure_settings before anything else is built."
        )
    return f"{folder} has no cl100k_base: reinstall llama-index-core, or call configure_settings."


def _nltk_folder(environment: Mapping[str, str], static: Path) -> Path:
    own = environment.get("NLTK_DATA")
    return static / "nltk_cache" if own is None else Path(own)


def _nltk(environment: Mapping[str, str], static: Path) -> str | None:
    folder = _nltk_folder(environment, static)
    missing = [
        name
        for name in _NLTK_DATA
        if not any((folder / name).glob("*")) and not (folder / f"{name}.zip").is_file()
    ]
    if not missing:
        return None
    where = f"NLTK_DATA={folder}" if "NLTK_DATA" in environment else str(folder)
    return (
        f"{where} lacks {' and '.join(missing)}; LlamaIndex would download them without a time "
        "limit. Unset NLTK_DATA or reinstall llama-index-core; offline_sentence_splitter needs "
        "neither."
    )


def _hard_links(environment: Mapping[str, str], static: Path) -> str | None:
    """Newer versions of NLTK refuse files that have several names."""
    folder = _nltk_folder(environment, static)
    linked = [
        path
        for name in _NLTK_DATA
        for path in (folder / name).rglob("*")
        if path.is_file() and path.stat().st_nlink > 1
    ]
    if not linked:
        return None
    return (
        f"{len(linked)} of its files are hard links, such as {linked[0]}, which NLTK 3.10 refuses. "
        "Install with copies (uv: --link-mode=copy), or use offline_sentence_splitter."
    )


def _defaults() -> str | None:
    if importlib.util.find_spec("llama_index.llms.openai") is None:
        return None
    return (
        "llama-index-llms-openai is installed: what is built without an llm asks OpenAI. Call "
        "configure_settings first."
    )


def main() -> int:
    """Print the findings; 1 if there is a problem."""
    findings = diagnose()
    for finding in findings:
        sign = "ok     " if finding.problem is None else "PROBLEM"
        sys.stdout.write(f"{sign} {finding.name}\n")
        if finding.problem is not None:
            sys.stdout.write(f"        {finding.problem}\n")
    return int(any(finding.problem is not None for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
