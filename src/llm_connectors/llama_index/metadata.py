"""`LLMMetadata` read from the running engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_index.core.base.llms.types import LLMMetadata, MessageRole

from engine import EngineError
from llm_connectors.llama_index.errors import ConfigError

if TYPE_CHECKING:
    from engine import Engine

_UNKNOWN_NUM_OUTPUT = -1
"""LlamaIndex's number for "no limit set"; its prompt helpers then reserve 256 tokens."""


def build_metadata(
    engine: Engine,
    max_tokens: int | None,
    context_window: int | None,
    chat_template: str | None,
    tool_parser: str = "auto",
) -> LLMMetadata:
    """The model's limits and abilities.

    Args:
        engine: The running engine.
        max_tokens: New tokens per answer; None where only the context limits them.
        context_window: The user's own limit, or None for the engine's.
        chat_template: The user's own template, or None for the model's.
        tool_parser: "auto", or the user's own choice, which says that the model can call tools.

    Raises:
        ConfigError: There is no such parser, or `context_window` is not in [1, the engine's limit].
    """
    limit = engine.max_model_len
    if context_window is not None and not 1 <= context_window <= limit:
        msg = (
            f"context_window={context_window} must be in [1, {limit}], the limit of the running "
            "engine. Raise it with engine_kwargs={'max_model_len': ...}, or leave it out."
        )
        raise ConfigError(msg)
    is_chat_model = chat_template is not None or engine.has_chat_template
    return LLMMetadata(
        context_window=limit if context_window is None else context_window,
        num_output=_UNKNOWN_NUM_OUTPUT if max_tokens is None else max_tokens,
        is_chat_model=is_chat_model,
        is_function_calling_model=is_chat_model
        and (tool_parser != "auto" or _shows_tools(engine, chat_template)),
        model_name=engine.model_name,
        system_role=_system_role(engine, chat_template) if is_chat_model else MessageRole.SYSTEM,
    )


def _shows_tools(engine: Engine, chat_template: str | None) -> bool:
    """Whether the template has a place for tools, as those of models trained on calls do."""
    return engine.answer_format(chat_template).template_shows_tools


def _system_role(engine: Engine, chat_template: str | None) -> MessageRole:
    """SYSTEM, or USER for templates that refuse a system message (Gemma's does)."""
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    try:
        engine.apply_chat_template(messages, chat_template=chat_template)
    except EngineError:
        return MessageRole.USER
    return MessageRole.SYSTEM
