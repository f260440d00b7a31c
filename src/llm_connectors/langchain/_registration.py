"""Makes `ChatLocal` known to LangChain's `init_chat_model`. Opt-in: nothing happens on import."""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Let `init_chat_model("llm-connectors:<model>")` make a `ChatLocal`. Idempotent.

    LangChain keeps its providers in a table without a door of its own, so this adds an entry; both
    spellings are needed, because it looks the prefix up as it stands and the provider with
    underscores.

    Raises:
        ImportError: The package `langchain` is not installed, or too old or new to know the table.
    """
    try:
        from langchain.chat_models import base
    except ModuleNotFoundError as error:
        msg = "register() needs the package langchain. Install it with: pip install langchain"
        raise ImportError(msg) from error
    providers: Any = getattr(base, "_BUILTIN_PROVIDERS", None)
    if not isinstance(providers, dict):
        msg = "This version of langchain has no table of providers. Use ChatLocal(…) directly."
        raise ImportError(msg)
    entry = ("llm_connectors.langchain", "ChatLocal", _make)
    providers["llm-connectors"] = providers["llm_connectors"] = entry


def _make(cls: type, **kwargs: Any) -> Any:
    return cls(**kwargs)
