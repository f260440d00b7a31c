"""LlamaIndex classes over the in-process engine.

Importing this package tells LlamaIndex's `load_llm` about `LocalLLM` and its `load_embed_model`
about `LocalEmbedding`; it changes nothing else and loads no model.
"""

from __future__ import annotations

try:
    from llama_index.core.embeddings.loading import RECOGNIZED_EMBEDDINGS
    from llama_index.core.llms.loading import RECOGNIZED_LLMS
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "llama_index":
        raise
    msg = (
        "llm_connectors.llama_index needs llama-index-core. Install it with: "
        "pip install llm-connectors[llama-index]"
    )
    raise ImportError(msg) from error

from llm_connectors.llama_index.batched import batched
from llm_connectors.llama_index.embedding import LocalEmbedding
from llm_connectors.llama_index.errors import (
    ConfigError,
    ConstraintError,
    ContextOverflowError,
    ForeignProcessError,
    NoToolCallError,
    RequestError,
    StructuredOutputError,
    UnsupportedBlockError,
)
from llm_connectors.llama_index.extractors import ExtractorGroup, TitleExtractor
from llm_connectors.llama_index.llm_rerank import LLMRerank
from llm_connectors.llama_index.local_llm import LocalLLM
from llm_connectors.llama_index.queries import (
    aquery_many,
    aretrieve_many,
    query_many,
    retrieve_many,
)
from llm_connectors.llama_index.rerank import LocalRerank
from llm_connectors.llama_index.settings import configure_settings, offline_sentence_splitter
from llm_connectors.llama_index.shared_prefix import with_shared_prefix

__all__ = [
    "ConfigError",
    "ConstraintError",
    "ContextOverflowError",
    "ExtractorGroup",
    "ForeignProcessError",
    "LLMRerank",
    "LocalEmbedding",
    "LocalLLM",
    "LocalRerank",
    "NoToolCallError",
    "RequestError",
    "StructuredOutputError",
    "TitleExtractor",
    "UnsupportedBlockError",
    "aquery_many",
    "aretrieve_many",
    "batched",
    "configure_settings",
    "offline_sentence_splitter",
    "query_many",
    "retrieve_many",
    "with_shared_prefix",
]

RECOGNIZED_LLMS[LocalLLM.class_name()] = LocalLLM
RECOGNIZED_EMBEDDINGS[LocalEmbedding.class_name()] = LocalEmbedding
