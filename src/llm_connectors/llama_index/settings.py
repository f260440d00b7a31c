"""`configure_settings`: make LlamaIndex count, split and pack with the local model's tokens."""

from __future__ import annotations

import re
import warnings

from llama_index.core import Settings
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.constants import DEFAULT_CHUNK_SIZE
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.indices.prompt_helper import ChatPromptHelper, PromptHelper
from llama_index.core.node_parser import SentenceSplitter

from llm_connectors.llama_index.embedding import LocalEmbedding
from llm_connectors.llama_index.errors import ConfigError, RequestError
from llm_connectors.llama_index.local_llm import LocalLLM

# A sentence ends after closing punctuation and white space that no lower-case letter follows, after
# CJK punctuation (no space needed), or at an empty line.
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*\s+(?=[^\sa-z])|[。！？]+[”’」』）]*\s*|\n\s*\n")
_MOCK_EMBED_DIM = 8


def offline_sentence_splitter(
    llm: LocalLLM, *, chunk_size: int | None = None, chunk_overlap: int | None = None
) -> SentenceSplitter:
    """A `SentenceSplitter` that counts with the model's tokenizer and finds sentences by regex.

    The stock splitter counts with OpenAI's tokenizer and loads NLTK data, which offline machines
    and hard-linked installations fail at.

    Args:
        llm: Whose tokens are counted.
        chunk_size: Tokens per chunk. Default: LlamaIndex's 1024, or half of what the context
            leaves beside the answer where that is less, so that two chunks fit a prompt.
        chunk_overlap: Tokens shared by neighbouring chunks. Default: a fifth of `chunk_size`.
    """
    if chunk_size is None:
        room = llm.metadata.context_window - llm.metadata.num_output
        chunk_size = max(1, min(DEFAULT_CHUNK_SIZE, room // 2))
    return SentenceSplitter(
        chunk_size=chunk_size,
        chunk_overlap=chunk_size // 5 if chunk_overlap is None else chunk_overlap,
        tokenizer=llm.token_fn,
        chunking_tokenizer_fn=split_sentences,
    )


def split_sentences(text: str) -> list[str]:
    """Sentences of `text`, white space included: joined they give `text` again."""
    sentences: list[str] = []
    start = 0
    for match in _SENTENCE_END.finditer(text):
        sentences.append(text[start : match.end()])
        start = match.end()
    if start < len(text):
        sentences.append(text[start:])
    return sentences


def configure_settings(
    llm: LocalLLM,
    embed: BaseEmbedding | str | None = None,
    *,
    num_output: int | None = None,
) -> None:
    """Set LlamaIndex's global `Settings` for `llm`. Call it before building anything.

    Splitters, memories and prompt helpers copy the tokenizer when they are built; without this
    they count with OpenAI's and pack prompts that overflow the model. Sets `llm`, `tokenizer`,
    both prompt helpers (context window less what the chat template adds), `node_parser`,
    `transformations` and `embed_model`. Starts the engine if it is not running yet.

    Args:
        llm: The model to use.
        embed: The embedding model, or the name of one for `LocalEmbedding`, such as
            "all-minilm-l6-v2". Default: the one already set; where there is none, a
            `MockEmbedding`, which ranks nothing, with a warning. Never OpenAI's.
        num_output: Tokens kept free for each answer, which then also is the `max_tokens` of the
            installed model. Default: `llm.max_tokens`.

    Raises:
        ConfigError: The context window has no room for a prompt beside the answer, or `llm` or
            `embed` is something else.
    """
    if not isinstance(llm, LocalLLM):
        msg = f"llm is a {type(llm).__name__}, not a LocalLLM. Pass LocalLLM('<model>')."
        raise ConfigError(msg)
    if embed is not None and not isinstance(embed, str | BaseEmbedding):
        msg = (
            f"embed is a {type(embed).__name__}, neither an embedding model nor the name of one "
            "such as 'all-minilm-l6-v2'."
        )
        raise ConfigError(msg)
    if num_output is not None:
        llm = llm.with_options(max_tokens=num_output)
    metadata = llm.metadata
    window = metadata.context_window - _template_overhead(llm)
    if window <= metadata.num_output:
        msg = (
            f"An answer of {metadata.num_output} tokens and the chat template leave no room for a "
            f"prompt in a context of {metadata.context_window} tokens. Lower num_output."
        )
        raise ConfigError(msg)
    token_fn = llm.token_fn
    Settings.llm = llm
    Settings.tokenizer = token_fn
    Settings.prompt_helper = PromptHelper(
        context_window=window, num_output=metadata.num_output, tokenizer=token_fn
    )
    Settings.chat_prompt_helper = ChatPromptHelper(
        context_window=window, num_output=metadata.num_output, tokenizer=token_fn
    )
    Settings.node_parser = offline_sentence_splitter(llm)
    Settings.transformations = [Settings.node_parser]
    _set_embed_model(LocalEmbedding(embed) if isinstance(embed, str) else embed)


def _set_embed_model(embed: BaseEmbedding | None) -> None:
    if embed is None:
        # Not Settings.embed_model: reading that would build OpenAI's default.
        embed = Settings._embed_model
        if embed is None or isinstance(embed, MockEmbedding):
            warnings.warn(
                "No embedding model is set: every node gets the same vector from MockEmbedding, "
                "so vector retrieval ranks nothing. Pass embed=..., or retrieve by keyword.",
                stacklevel=3,
            )
    Settings.embed_model = embed or MockEmbedding(embed_dim=_MOCK_EMBED_DIM)


def _template_overhead(llm: LocalLLM) -> int:
    """Tokens the chat template adds to the usual prompts beyond the text of their messages."""
    if not llm.metadata.is_chat_model:
        return len(llm.engine.tokenize(""))
    text = "text"
    roles = [llm.metadata.system_role] * (2 if llm.system_prompt else 1)
    overheads = [_overhead(llm, [MessageRole.USER], text)]
    try:
        overheads.append(_overhead(llm, [*roles, MessageRole.USER], text))
    except RequestError:
        # The template takes no such sequence of roles, so no such prompt will be packed either.
        return overheads[0]
    return max(overheads)


def _overhead(llm: LocalLLM, roles: list[MessageRole], text: str) -> int:
    messages = [ChatMessage(content=text, role=role) for role in roles]
    return llm.count_messages(messages) - len(roles) * len(llm.token_fn(text))
