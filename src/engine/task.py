"""What an engine does with a model: generate text, embed texts, or score pairs of texts."""

from __future__ import annotations

from typing import Literal

from engine.config import EngineConfig
from engine.errors import ConfigError, UnsupportedModelError
from engine.loader.embedding_layout import MODULES_FILE
from engine.loader.resolve import ModelFiles, resolve_model
from engine.models.encoder_families import ENCODER_ARCHITECTURES
from engine.models.registry import supported_architectures

Task = Literal["generate", "embed", "score"]

_CAUSAL = "ForCausalLM"
_SCORES = "ForSequenceClassification"


def task_of(config: EngineConfig) -> Task:
    """What the engine of `config` does; reads the model's files, but no weights.

    Raises:
        EngineError: As `resolve_model`.
        UnsupportedModelError: The model cannot do what `config.task` asks for.
        ConfigError: An option has no meaning for what it does.
    """
    files = resolve_model(
        config.model,
        revision=config.revision,
        local_files_only=config.local_files_only,
        load_format=config.load_format,
    )
    task = choose_task(config.task, files)
    _check_options(config, task)
    return task


def _check_options(config: EngineConfig, task: Task) -> None:
    """Refuse options that would have no effect."""
    if task == "generate":
        if config.pooling != "auto":
            msg = (
                f"pooling={config.pooling!r} is for models that embed, and {config.model!r} "
                "generates. Add task='embed' to make embeddings with it."
            )
            raise ConfigError(msg)
        return
    if config.quantization is not None:
        msg = (
            f"quantization={config.quantization!r} is for models that generate, and "
            f"{config.model!r} embeds or scores. Leave it out."
        )
        raise ConfigError(msg)
    for name in ("kv_cache_memory_bytes", "num_kv_blocks", "block_size"):
        if getattr(config, name) is not None:
            msg = (
                f"{name}={getattr(config, name)!r} sizes a KV cache, and an engine that embeds or "
                "scores has none. Leave it out."
            )
            raise ConfigError(msg)
    if config.kv_cache_dtype != "auto":
        msg = (
            f"kv_cache_dtype={config.kv_cache_dtype!r} is for models that generate: an engine that "
            "embeds or scores keeps no KV cache. Leave it out."
        )
        raise ConfigError(msg)
    if task == "score" and config.pooling != "auto":
        msg = f"pooling={config.pooling!r} cannot be chosen for a model that scores: its head says."
        raise ConfigError(msg)


def choose_task(asked: str, files: ModelFiles) -> Task:
    """The task of a model, `asked` being `EngineConfig.task`.

    Raises:
        UnsupportedModelError: The model cannot do it.
    """
    architecture = architecture_of(files)
    if architecture.endswith(_SCORES):
        if asked != "auto":
            msg = (
                f"{files.name!r} ({architecture}) scores texts and cannot {asked}. Use task='auto'."
            )
            raise UnsupportedModelError(msg)
        return "score"
    if architecture in ENCODER_ARCHITECTURES:
        if asked == "generate":
            msg = (
                f"{files.name!r} ({architecture}) is an encoder and cannot generate text. Use "
                "Engine.embed, or a model that generates."
            )
            raise UnsupportedModelError(msg)
        return "embed"
    if asked == "generate":
        return "generate"
    is_bare = architecture not in supported_architectures() and (
        causal_architecture(architecture) in supported_architectures()
    )
    has_layout = files.gguf is None and (files.path / MODULES_FILE).is_file()
    return "embed" if asked == "embed" or has_layout or is_bare else "generate"


def architecture_of(files: ModelFiles) -> str:
    """The config's first architecture; "" where it names none."""
    names = files.config.get("architectures")
    return str(names[0]) if isinstance(names, list | tuple) and names else ""


def causal_architecture(architecture: str) -> str:
    """The name of the same decoder with a language model's head."""
    for ending in (_SCORES, _CAUSAL, "Model"):
        if architecture.endswith(ending):
            return architecture.removesuffix(ending) + _CAUSAL
    return architecture
