"""The text side of a model: tokenizer, chat template, ids that end an answer. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.text.chat_template import ChatTemplate
from engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.loader.resolve import ModelFiles


@dataclass(frozen=True, slots=True)
class ModelText:
    """What turns text into prompts of one model.

    Attributes:
        tokenizer: None for a dummy model without one: prompts and outputs are then token ids.
        chat_template: None where the model brings none.
        eos_token_ids: Ids that end an answer: those the model's files name and the tokenizer's.
        model_type: As in the model's config.json; None where it names none.
    """

    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    eos_token_ids: tuple[int, ...]
    model_type: str | None = None


def load_model_text(config: EngineConfig, files: ModelFiles) -> ModelText:
    """The text side of the model in `files`, with what `config` puts in its place.

    Raises:
        CheckpointError: The tokenizer's files are damaged.
        UnsupportedModelError: They are of a kind that is not read.
    """
    tokenizer = _load_tokenizer(config, files)
    eos_token_ids = set(files.eos_token_ids)
    if tokenizer is not None:
        eos_token_ids |= tokenizer.eos_token_ids
    return ModelText(
        tokenizer,
        _load_chat_template(config, tokenizer),
        tuple(sorted(eos_token_ids)),
        files.config.get("model_type"),
    )


def _load_tokenizer(config: EngineConfig, files: ModelFiles) -> Tokenizer | None:
    if config.tokenizer is not None:
        return Tokenizer.from_folder(config.tokenizer)
    if files.gguf is not None:
        return Tokenizer.from_gguf_metadata(files.gguf.metadata)
    if config.load_format == "dummy" and not (files.path / "tokenizer.json").exists():
        return None
    return Tokenizer.from_folder(files.path)


def _load_chat_template(config: EngineConfig, tokenizer: Tokenizer | None) -> ChatTemplate | None:
    if tokenizer is None:
        return None
    source = config.chat_template or tokenizer.chat_templates
    return ChatTemplate(source, tokenizer) if source else None
