"""LangChain classes over the in-process engine.

- `ChatLocal`: a chat model.
- `LocalLLM`: text completion with raw prompts.
- `register_model`, `unregister_model`: models that a call may choose by name.
- `register`: lets LangChain's `init_chat_model` make a `ChatLocal`.
- `LocalDecisions`: typed answers with exact probabilities; needs langchain-core 1.8.
- `LocalEmbeddings`: vectors of texts.
- `LocalRerank`: a document compressor and cross-encoder.
- `errors`: classes that are both the engine's and LangChain's.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llm_connectors._aliases import register_model, unregister_model
from llm_connectors.langchain._registration import register

if TYPE_CHECKING:
    from llm_connectors.langchain.chat_models import ChatLocal
    from llm_connectors.langchain.decisions import LocalDecisions
    from llm_connectors.langchain.embeddings import LocalEmbeddings
    from llm_connectors.langchain.llms import LocalLLM
    from llm_connectors.langchain.rerank import LocalRerank

__all__ = [
    "ChatLocal",
    "LocalDecisions",
    "LocalEmbeddings",
    "LocalLLM",
    "LocalRerank",
    "register",
    "register_model",
    "unregister_model",
]

_LAZY = {
    "ChatLocal": "llm_connectors.langchain.chat_models",
    "LocalDecisions": "llm_connectors.langchain.decisions",
    "LocalEmbeddings": "llm_connectors.langchain.embeddings",
    "LocalLLM": "llm_connectors.langchain.llms",
    "LocalRerank": "llm_connectors.langchain.rerank",
}
"""Names whose modules load langchain-core; importing the package stays cheap."""


def __getattr__(name: str) -> Any:
    module_name = _LAZY.get(name)
    if module_name is None:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "langchain_core":
            raise
        if error.name == "langchain_core.decisions":
            msg = f"{name} needs langchain-core 1.8 or later: pip install 'langchain-core>=1.8'"
            raise ImportError(msg) from error
        msg = f"{name} needs langchain-core. Install it with: pip install llm-connectors[langchain]"
        raise ImportError(msg) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
