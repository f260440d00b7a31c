"""Which causal language model of transformers a checkpoint is, before any of it is built."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine.errors import UnsupportedModelError


@dataclasses.dataclass(frozen=True, eq=False)
class TransformersConfig:
    """A model of transformers.

    Attributes:
        architecture: The checkpoint's own name for it.
        model_class: transformers' class.
        hf_config: Its config; this engine's own copy.
        vocab_size: V.
        max_position_embeddings: Positions the checkpoint was made for.
    """

    architecture: str
    model_class: Any
    hf_config: Any
    vocab_size: int
    max_position_embeddings: int

    @property
    def sliding_window(self) -> int | None:
        """Tokens that some layers see; None where all see everything."""
        if not getattr(self.hf_config, "use_sliding_window", True):
            return None
        return getattr(self.hf_config, "sliding_window", None) or None

    @property
    def is_chunked(self) -> bool:
        """Whether some layers attend within chunks of the sequence."""
        return "chunked_attention" in (getattr(self.hf_config, "layer_types", None) or ())

    def num_sliding_layers(self, num_layers: int, max_model_len: int) -> int:
        """Layers whose window matters for sequences of `max_model_len` tokens."""
        if self.sliding_window is None or self.sliding_window >= max_model_len:
            return 0
        layer_types = getattr(self.hf_config, "layer_types", None)
        return num_layers if layer_types is None else layer_types.count("sliding_attention")

    def num_parameters(self) -> int:
        """Numbers in the model, tied ones once; nothing is allocated."""
        with torch.device("meta"):
            model = self.model_class(self.hf_config)
        return sum(parameter.numel() for parameter in model.parameters())


def transformers_config(
    config: Mapping[str, Any], folder: Path, *, trust_remote_code: bool
) -> TransformersConfig:
    """The model of a Hugging Face folder whose architecture the decoder does not have.

    Args:
        config: Its `config.json`.
        folder: With the code too, where it brings some.
        trust_remote_code: Whether that code may run.

    Raises:
        UnsupportedModelError: transformers has no such causal language model, the model brings code
            that is not trusted, or does not take attention functions.
    """
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    architecture = str((config.get("architectures") or [None])[0])
    known = _class_names(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    auto_map = config.get("auto_map")
    code = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, Mapping) else None
    if code is not None and not (trust_remote_code or architecture in known):
        msg = (
            f"{folder} brings code of its own for {architecture!r} ({code}). With "
            "trust_remote_code=True it would run, with all rights of this process."
        )
        raise UnsupportedModelError(msg)
    if code is None and architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=1, cutoff=0.6)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        msg = (
            f"Architecture {architecture!r} is neither one of the engine's own nor a causal "
            f"language model of the installed transformers.{hint}"
        )
        raise UnsupportedModelError(msg)
    uses_code = code is not None and trust_remote_code
    try:
        hf_config = AutoConfig.from_pretrained(
            folder, trust_remote_code=uses_code, local_files_only=True
        )
        model_class = _model_class(architecture, str(code), folder, uses_code=uses_code)
    except UnsupportedModelError:
        raise
    except Exception as error:
        msg = f"transformers cannot read {folder} as {architecture!r}: {error}"
        raise UnsupportedModelError(msg) from error
    return _checked(architecture, model_class, hf_config)


def _class_names(mapping: Mapping[str, Any]) -> list[str]:
    names: list[str] = []
    for value in mapping.values():
        names += [value] if isinstance(value, str) else list(value)
    return names


def _model_class(architecture: str, code: str, folder: Path, *, uses_code: bool) -> Any:
    import transformers

    if not uses_code:
        return getattr(transformers, architecture)
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(code, str(folder), local_files_only=True)


def _checked(architecture: str, model_class: Any, hf_config: Any) -> TransformersConfig:
    problem = ""
    text_config = hf_config.get_text_config(decoder=True)
    if getattr(hf_config, "quantization_config", None) is not None:
        problem = "is quantised, which is not supported; use unquantised weights"
    elif text_config is not hf_config:
        problem = "is a model of several kinds of input, and only text is supported"
    elif getattr(model_class, "_is_stateful", False):
        problem = "keeps a state beside keys and values, as state space models do"
    elif not getattr(model_class, "_supports_attention_backend", False):
        problem = "does not take attention functions (its `_supports_attention_backend` is off)"
    sizes = {}
    for name in ("vocab_size", "max_position_embeddings"):
        sizes[name] = getattr(text_config, name, None)
        if not problem and not isinstance(sizes[name], int):
            problem = f"has a config without {name}"
    if problem:
        msg = f"{architecture} {problem}, so it cannot run in transformers' code either."
        raise UnsupportedModelError(msg)
    return TransformersConfig(
        architecture=architecture,
        model_class=model_class,
        hf_config=hf_config,
        vocab_size=int(sizes["vocab_size"] or 0),
        max_position_embeddings=int(sizes["max_position_embeddings"] or 0),
    )
