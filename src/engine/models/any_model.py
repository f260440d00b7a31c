"""One door to both ways of running a model: the decoder, and transformers' own code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine.errors import ConfigError
from engine.models import decoder
from engine.models.config_reader import NotNativeError
from engine.models.decoder import Decoder
from engine.models.description import DecoderConfig
from engine.models.registry import decoder_config, is_native
from engine.models.text_part import has_text_part, text_part_config
from engine.models.transformers_config import TransformersConfig, transformers_config
from engine.models.transformers_model import TransformersModel

AnyModel = Decoder | TransformersModel
AnyConfig = DecoderConfig | TransformersConfig


def describe_model(
    hf_config: Mapping[str, Any], folder: Path | None, *, trust_remote_code: bool
) -> AnyConfig:
    """What a checkpoint is: the decoder's where the decoder has it, else transformers'.

    Args:
        hf_config: Its `config.json`.
        folder: A Hugging Face folder; None for a file that transformers cannot read (GGUF).
        trust_remote_code: Whether code that the folder brings may run, where it is needed.

    Raises:
        UnsupportedModelError: Neither can run it; says why.
    """
    if has_text_part(hf_config):
        return text_part_config(hf_config)
    if folder is None or is_native(hf_config) or not hf_config.get("architectures"):
        try:
            return decoder_config(hf_config)
        except NotNativeError:
            if folder is None:
                raise
    return transformers_config(hf_config, folder, trust_remote_code=trust_remote_code)


def weight_bytes(config: AnyConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Memory that the loaded weights of a model take, known before anything is allocated."""
    if isinstance(config, DecoderConfig):
        return decoder.weight_bytes(config, dtype, device)
    return config.num_parameters() * dtype.itemsize


def make_model(
    config: AnyConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    max_model_len: int | None,
    batch_invariant: bool,
) -> AnyModel:
    """The model without its weights; see `Decoder` and `TransformersModel`.

    Raises:
        ConfigError: `batch_invariant` was asked for where it cannot be promised.
        UnsupportedModelError: The model needs what the device's kernels do not have.
    """
    if isinstance(config, DecoderConfig):
        return Decoder(
            config, device, dtype, max_model_len=max_model_len, batch_invariant=batch_invariant
        )
    if batch_invariant:
        msg = (
            f"batch_invariant=True cannot be promised for {config.architecture}, which runs in "
            "transformers' own code. Leave it out."
        )
        raise ConfigError(msg)
    return TransformersModel(config, device, dtype, max_model_len=max_model_len)
