"""Build the parts of an engine that embeds or scores; the twin of `engine.build`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engine.build import device_context, resolve_device, resolve_dtype, take_stream
from engine.config import DEFAULT_MAX_NUM_SEQS, EngineConfig, ResolvedConfig
from engine.core.pooling_scheduler import PoolingScheduler
from engine.errors import ConfigError, UnsupportedModelError
from engine.loader.checkpoint import Checkpoint, SafetensorsCheckpoint, open_checkpoint
from engine.loader.embedding_layout import (
    DenseLayer,
    EmbeddingLayout,
    read_embedding_layout,
    score_activation,
)
from engine.loader.quantised_checkpoint import warn_of_expansion
from engine.loader.resolve import ModelFiles, resolve_model
from engine.model_text import ModelText, load_model_text
from engine.models.decoder import Decoder, weight_bytes
from engine.models.decoder_backbone import DecoderBackbone
from engine.models.encoder import Encoder
from engine.models.encoder_config import EncoderConfig, HeadConfig
from engine.models.encoder_families import (
    ENCODER_ARCHITECTURES,
    check_one_label,
    encoder_config,
)
from engine.models.pooled_model import DenseStep, HeadlessWeights, PooledModel, ScoreHead
from engine.models.registry import decoder_config, supported_architectures
from engine.pooling_facts import PoolingFacts
from engine.runner.memory import check_model_fits
from engine.runner.pooling_runner import PoolingRunner
from engine.runner.threads import in_short_lived_thread, set_own_num_threads
from engine.task import architecture_of, causal_architecture, choose_task

_GPU_STEP_TOKENS = 16384
_CPU_STEP_TOKENS = 1024
_GPU_STEPS_IN_FLIGHT = 2
_MOST_TEXTS = 4096
"""Of one step, unless `max_num_seqs` is set: its default is meant for running answers."""
_DECODER_HEAD = "score"


@dataclass(slots=True)
class PoolingParts:
    """What one engine is made of; see `build_pooling_parts`. Fields as in `EngineParts`."""

    files: ModelFiles
    resolved: ResolvedConfig
    text: ModelText
    facts: PoolingFacts
    vocab_size: int
    model: PooledModel
    weight_bytes: int
    scheduler: PoolingScheduler
    runner: PoolingRunner
    stream: torch.cuda.Stream | None

    def release_model(self) -> None:
        """Drop the weights; the last thing that is done with these parts."""
        del self.model


def build_pooling_parts(config: EngineConfig) -> PoolingParts:
    """Load the model and everything around it. Blocks for as long as that takes.

    Raises:
        EngineError: As `build_parts`.
    """
    device = resolve_device(config.device)
    if device.type != "cpu":
        return _build(config, device)

    def build_on_cpu() -> PoolingParts:
        set_own_num_threads(1)
        return _build(config, device)

    return in_short_lived_thread(build_on_cpu)


def _build(config: EngineConfig, device: torch.device) -> PoolingParts:
    files = resolve_model(
        config.model,
        revision=config.revision,
        local_files_only=config.local_files_only,
        load_format=config.load_format,
    )
    kind = choose_task(config.task, files)
    assert kind != "generate", "such models have a host of their own"
    architecture = architecture_of(files)
    is_encoder = architecture in ENCODER_ARCHITECTURES
    layout = read_embedding_layout(
        files.path if files.kind == "folder" else None,
        default_pooling="mean" if is_encoder else "last",
    )
    dtype = resolve_dtype(config.dtype, _with_dtype(files, config, device), device)
    stream = take_stream(device) if device.type == "cuda" else None
    with (
        device_context(device, stream),
        torch.inference_mode(),
        open_checkpoint(files, load_format=config.load_format) as checkpoint,
    ):
        loader = _Loader(config, files, layout, checkpoint, device, dtype)
        loaded = loader.encoder() if is_encoder else loader.decoder(architecture, kind)
        max_tokens = _max_tokens(config, layout, loaded.max_positions)
        step_tokens = config.max_num_batched_tokens or (
            _GPU_STEP_TOKENS if device.type == "cuda" else _CPU_STEP_TOKENS
        )
        is_set = config.max_num_seqs != DEFAULT_MAX_NUM_SEQS
        max_texts = config.max_num_seqs if is_set else _MOST_TEXTS
        facts = PoolingFacts(
            kind=kind,
            width=1 if kind == "score" else loaded.width,
            max_tokens=max_tokens,
            normalizes=layout.normalizes and kind == "embed",
            lower_case=layout.lower_case,
            prompts=dict(layout.prompts),
            default_prompt_name=layout.default_prompt_name,
            activation=score_activation(files.config) if kind == "score" else "",
        )
        resolved = ResolvedConfig(
            requested=config,
            device=device,
            dtype=dtype,
            max_model_len=max_tokens,
            max_num_seqs=max_texts,
            max_num_batched_tokens=step_tokens,
            block_size=1,
            num_kv_blocks=0,
            enable_prefix_caching=False,
            max_steps_in_flight=_GPU_STEPS_IN_FLIGHT if stream is not None else 1,
        )
    return PoolingParts(
        files=files,
        resolved=resolved,
        text=load_model_text(config, files),
        facts=facts,
        vocab_size=loaded.vocab_size,
        model=loaded.model,
        weight_bytes=loaded.weight_bytes,
        scheduler=PoolingScheduler(step_tokens, max_texts),
        runner=PoolingRunner(loaded.model, device, config.num_threads),
        stream=stream,
    )


@dataclass(slots=True)
class _Loaded:
    """A model with its weights, and what is known of it. `width` is that of its vectors."""

    model: PooledModel
    vocab_size: int
    width: int
    max_positions: int
    weight_bytes: int


@dataclass(slots=True)
class _Loader:
    """Makes the model of one checkpoint."""

    config: EngineConfig
    files: ModelFiles
    layout: EmbeddingLayout
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype

    def encoder(self) -> _Loaded:
        """An encoder with its pooling or its head."""
        description: EncoderConfig = encoder_config(self.files.config)
        num_bytes = description.num_parameters * self.dtype.itemsize
        check_model_fits(num_bytes, 0, self.device, self.config)
        warn_of_expansion(self.checkpoint, num_bytes)
        if self.config.batch_invariant and self.device.type == "cuda":
            self._check_invariant(description)
        encoder = Encoder(
            description, self.device, self.dtype, batch_invariant=self.config.batch_invariant
        )
        encoder.load(self.checkpoint)
        return self._pooled(
            encoder,
            description.head,
            description.vocab_size,
            description.hidden_size,
            description.max_positions,
            num_bytes,
        )

    def _check_invariant(self, description: EncoderConfig) -> None:
        if self.dtype is torch.float32 or description.num_position_buckets:
            what = "in float32" if self.dtype is torch.float32 else description.architecture
            msg = (
                f"batch_invariant=True is not there for encoders {what} on a GPU, where rows are "
                "padded to the longest text. Use dtype='bfloat16' or 'float16' with another model."
            )
            raise ConfigError(msg)

    def decoder(self, architecture: str, kind: str) -> _Loaded:
        """A decoder that only reads, without the head of a language model."""
        causal = causal_architecture(architecture)
        if causal not in supported_architectures():
            known = sorted({*supported_architectures(), *ENCODER_ARCHITECTURES})
            msg = f"{architecture!r} cannot embed or score texts. Supported are {', '.join(known)}."
            raise UnsupportedModelError(msg)
        head = None
        if kind == "score":
            check_one_label(self.files.config)
            head = HeadConfig(pooling="last", out=_DECODER_HEAD, out_bias=False)
        # Tied: nothing asks for logits, so the head of a language model is neither needed nor read.
        description = dataclasses.replace(
            decoder_config({**self.files.config, "architectures": [causal]}),
            tie_word_embeddings=True,
        )
        num_bytes = weight_bytes(description, self.dtype, self.device)
        check_model_fits(num_bytes, 0, self.device, self.config)
        warn_of_expansion(self.checkpoint, num_bytes)
        decoder = Decoder(
            description, self.device, self.dtype, batch_invariant=self.config.batch_invariant
        )
        decoder.load(HeadlessWeights(self.checkpoint, [f"{_DECODER_HEAD}.weight"]))
        decoder.lm_head.packed = None  # a copy of the embedding on a CPU
        return self._pooled(
            DecoderBackbone(decoder),
            head,
            description.vocab_size,
            description.hidden_size,
            description.max_position_embeddings,
            num_bytes,
        )

    def _pooled(
        self,
        backbone: Encoder | DecoderBackbone,
        head_config: HeadConfig | None,
        vocab_size: int,
        hidden_size: int,
        max_positions: int,
        num_bytes: int,
    ) -> _Loaded:
        pooling, dense, head = self.layout.pooling, self.layout.dense, None
        if head_config is not None:
            head = ScoreHead(head_config, hidden_size, self.device, self.dtype)
            head.load(self.checkpoint)
            pooling, dense = (head_config.pooling,), ()
        elif self.config.pooling != "auto":
            pooling = (self.config.pooling,)
        width = hidden_size * len(pooling)
        for layer in dense:
            if layer.in_features != width:
                msg = f"{layer.folder} takes {layer.in_features} features, but gets {width}."
                raise UnsupportedModelError(msg)
            width = layer.out_features
        model = PooledModel(backbone, pooling, [self._dense_step(layer) for layer in dense], head)
        return _Loaded(model, vocab_size, width, max_positions, num_bytes)

    def _dense_step(self, layer: DenseLayer) -> DenseStep:
        shape = (layer.out_features, layer.in_features)
        weight = torch.empty(shape, device=self.device)
        bias = torch.empty(layer.out_features, device=self.device) if layer.bias else None
        with SafetensorsCheckpoint([layer.folder / "model.safetensors"]) as checkpoint:
            checkpoint.read_into("linear.weight", weight)
            if bias is not None:
                checkpoint.read_into("linear.bias", bias)
        return DenseStep(weight, bias, layer.activation)


def _with_dtype(files: ModelFiles, config: EngineConfig, device: torch.device) -> ModelFiles:
    """`files` whose config names the dtype that "auto" should start from.

    Configs of older models name none: transformers then takes that of the weights. And a CPU that
    has no fast float16 gets float32 here, not bfloat16: vectors are compared by small differences.
    """
    stored: Any = files.config.get("dtype") or files.config.get("torch_dtype")
    if stored is None and files.kind == "folder" and files.weight_files:
        with SafetensorsCheckpoint(files.weight_files[:1]) as checkpoint:
            stored = checkpoint.stored_dtype()
    if device.type == "cpu" and str(stored).removeprefix("torch.") == "float16":
        stored = "float32"
    changed: Mapping[str, Any] = {**files.config, "dtype": stored or "bfloat16"}
    return dataclasses.replace(files, config=dict(changed))


def _max_tokens(config: EngineConfig, layout: EmbeddingLayout, max_positions: int) -> int:
    """Longest text: asked for, else what the model was made for, at most its positions."""
    if config.max_model_len is None:
        return min(layout.max_tokens or max_positions, max_positions)
    if config.max_model_len > max_positions:
        msg = (
            f"max_model_len={config.max_model_len} is more than the {max_positions} positions that "
            f"{config.model!r} has. Use at most {max_positions}."
        )
        raise ConfigError(msg)
    return config.max_model_len
