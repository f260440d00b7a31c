"""Build an engine's parts from its config: device, dtype, model, memory, scheduler, runner."""

from __future__ import annotations

import logging
import threading
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from engine.config import EngineConfig, ResolvedConfig
from engine.core.scheduler import Scheduler
from engine.errors import ConfigError, UnsupportedModelError
from engine.kernels.kv_cache import bytes_of_head
from engine.loader.checkpoint import Checkpoint, open_checkpoint
from engine.loader.quantised_checkpoint import warn_of_expansion
from engine.loader.resolve import ModelFiles, resolve_model
from engine.model_text import ModelText, load_model_text
from engine.models.any_model import AnyConfig, AnyModel, describe_model, make_model, weight_bytes
from engine.models.decoder import Decoder, shapes_of
from engine.models.description import DecoderConfig
from engine.models.quantised_loading import CodesPlan, plan_codes, runs_in_codes
from engine.models.quantiser import Quantiser
from engine.models.transformers_model import ModelSizes
from engine.runner.memory import (
    check_model_fits,
    describe_bytes,
    fits,
    num_kv_blocks,
    run_largest_step,
)
from engine.runner.model_runner import ModelRunner
from engine.runner.threads import in_short_lived_thread, set_own_num_threads

logger = logging.getLogger(__name__)

_GPU_BLOCK_SIZE = 64
_CPU_BLOCK_SIZE = 64
_GPU_STEP_TOKENS = 8192
_CPU_STEP_TOKENS = 1024
_MOST_CAPTURED_STEPS_IN_FLIGHT = 32
"""Beside several busy threads of the application; otherwise a few are enough (`LaunchAhead`).
Beside four the interpreter comes back after 20 ms on average, and one time in four after more than
25, which 16 steps of a small model do not outlast."""
_EAGER_STEPS_IN_FLIGHT = 2
_COALESCED_SHARE = 16
"""1 / share of the batch that may stay empty for some steps on a GPU (see `Scheduler`)."""


@dataclass(slots=True)
class EngineParts:
    """What one engine is made of; see `build_parts`."""

    files: ModelFiles
    resolved: ResolvedConfig
    text: ModelText
    model: AnyModel
    weight_bytes: int
    scheduler: Scheduler
    runner: ModelRunner
    stream: torch.cuda.Stream | None

    def release_model(self) -> None:
        """Drop the weights; the last thing that is done with these parts."""
        del self.model


def build_parts(config: EngineConfig) -> EngineParts:
    """Load the model and everything around it. Blocks for as long as that takes.

    Raises:
        ConfigError: Device, dtype or sizes that cannot work.
        ModelNotFoundError: The name leads nowhere.
        UnsupportedModelError: Architecture or checkpoint cannot be run.
        CapacityError: Weights or KV cache do not fit.
    """
    device = resolve_device(config.device)
    if device.type == "cpu":
        return in_short_lived_thread(lambda: _build_on_cpu(config, device))
    return _build_parts(config, device)


def _build_on_cpu(config: EngineConfig, device: torch.device) -> EngineParts:
    # Loading is Python, NumPy and passes over memory. Two threads win nothing, and spin for each
    # other for seconds beside a busy process.
    set_own_num_threads(1)
    return _build_parts(config, device)


def _build_parts(config: EngineConfig, device: torch.device) -> EngineParts:
    files = resolve_model(
        config.model,
        revision=config.revision,
        local_files_only=config.local_files_only,
        load_format=config.load_format,
        with_code=config.trust_remote_code,
    )
    model_config = describe_model(
        files.config,
        files.path if files.kind == "folder" else None,
        trust_remote_code=config.trust_remote_code,
    )
    dtype = resolve_dtype(config.dtype, files, device)
    limit = model_config.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        msg = (
            f"max_model_len={config.max_model_len} is more than the {limit} positions that "
            f"{config.model!r} was made for. Use at most {limit}."
        )
        raise ConfigError(msg)
    text = load_model_text(config, files)

    stream = take_stream(device) if device.type == "cuda" else None
    with device_context(device, stream), torch.inference_mode():
        with open_checkpoint(files, load_format=config.load_format) as checkpoint:
            codes = quantiser = None
            if config.quantization is not None:
                quantiser = _make_quantiser(config.quantization, model_config, dtype)
            if isinstance(model_config, DecoderConfig) and (
                quantiser is not None or runs_quantised(config, files, device, dtype)
            ):
                codes = _plan_codes(model_config, checkpoint, device, dtype, config, quantiser)
            num_weight_bytes = (
                weight_bytes(model_config, dtype, device) if codes is None else codes.num_bytes
            )
            kv_bytes = _fewest_kv_bytes(config, model_config, device, dtype)
            room_bytes = 0 if codes is None else codes.room_bytes
            check_model_fits(num_weight_bytes + room_bytes, kv_bytes, device, config)
            model = make_model(
                model_config,
                device,
                dtype,
                max_model_len=config.max_model_len,
                batch_invariant=config.batch_invariant,
            )
            if codes is None:
                warn_of_expansion(checkpoint, num_weight_bytes)
            if isinstance(model, Decoder):
                factory = None if codes is None else codes.factory(model.step_rows)
                model.load(checkpoint, factory, quantiser)
            else:
                model.load(checkpoint)
        resolved = _resolve_sizes(config, model, device, dtype)
        scheduler = Scheduler(
            max_num_seqs=resolved.max_num_seqs,
            max_num_batched_tokens=resolved.max_num_batched_tokens,
            max_model_len=resolved.max_model_len,
            block_size=resolved.block_size,
            num_blocks=resolved.num_kv_blocks,
            enable_prefix_caching=resolved.enable_prefix_caching,
            coalesced_rows=config.max_num_seqs // _COALESCED_SHARE if stream is not None else 0,
            finds_prefix_groups=stream is not None,
            guesses_in_text=stream is not None,
        )
        runner = ModelRunner(model, resolved, scheduler.table)
        runner.warm_up()
    return EngineParts(
        files=files,
        resolved=resolved,
        text=text,
        model=model,
        weight_bytes=num_weight_bytes,
        scheduler=scheduler,
        runner=runner,
        stream=stream,
    )


_idle_streams: dict[torch.device, list[torch.cuda.Stream]] = {}
_idle_streams_lock = threading.Lock()


def take_stream(device: torch.device) -> torch.cuda.Stream:
    """A CUDA stream for one engine, one that a closed engine left behind where there is one.

    The libraries keep a workspace of up to 128 MiB per stream for the life of the process, so
    streams are used again instead of made anew.
    """
    with _idle_streams_lock:
        idle = _idle_streams.setdefault(device, [])
        return idle.pop() if idle else torch.cuda.Stream(device)


def return_stream(device: torch.device, stream: torch.cuda.Stream) -> None:
    """Let the next engine on `device` have the stream of a closed one."""
    with _idle_streams_lock:
        _idle_streams[device].append(stream)


def device_context(
    device: torch.device, stream: torch.cuda.Stream | None
) -> AbstractContextManager[Any]:
    """Make `device` and the engine's own stream current for the calling thread, for a while.

    An own stream keeps the engine's work apart from the application's on the same GPU.
    """
    stack = ExitStack()
    if stream is not None:
        stack.enter_context(torch.cuda.device(device))
        stack.enter_context(torch.cuda.stream(stream))
    return stack


def resolve_device(name: str) -> torch.device:
    """The device a config means.

    Raises:
        ConfigError: It is not there.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        msg = f"device={name!r} is not a device: {error}."
        raise ConfigError(msg) from error
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index or 0
    if index >= count:
        there = f"there are {count} CUDA devices" if count else "no CUDA device is usable"
        msg = f"device={name!r} was asked for, but {there}. Use device='auto' or 'cpu'."
        raise ConfigError(msg)
    return torch.device("cuda", index)


def resolve_dtype(name: str, files: ModelFiles, device: torch.device) -> torch.dtype:
    """The dtype of weights, activations and KV cache.

    "auto" takes the checkpoint's own where the device is fast with it: quantised files become
    bfloat16; float16 on a CPU and bfloat16 on hardware without it become what is there.

    Raises:
        ConfigError: The device does not have the dtype that was asked for.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        if (
            dtype is torch.bfloat16
            and device.type == "cuda"
            and not torch.cuda.is_bf16_supported(including_emulation=False)
        ):
            msg = f"dtype='bfloat16' is not there on {device}. Use 'float16' or 'auto'."
            raise ConfigError(msg)
        return dtype
    stored = files.config.get("dtype") or files.config.get("torch_dtype") or "bfloat16"
    if str(stored).removeprefix("torch.") == "float32":
        return torch.float32
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        is_half = str(stored).removeprefix("torch.") == "float16"
        return torch.bfloat16 if has_bfloat16 and not is_half else torch.float16
    return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32


def runs_quantised(
    config: EngineConfig, files: ModelFiles, device: torch.device, dtype: torch.dtype
) -> bool:
    """Whether weights that the files have in codes are computed with as they are.

    A Hugging Face checkpoint in codes always is: its dtype is that of activations. For a GGUF file,
    a dtype that is asked for means weights of that dtype.
    """
    if config.load_format == "dummy" or (files.gguf is not None and config.dtype != "auto"):
        return False
    return runs_in_codes(device, dtype, is_needed=files.gguf is None)


def _make_quantiser(name: str, model_config: AnyConfig, dtype: torch.dtype) -> Quantiser:
    if not isinstance(model_config, DecoderConfig):
        msg = (
            f"quantization={name!r} needs an architecture that the engine has itself; this one "
            "runs through transformers. Leave quantization out."
        )
        raise UnsupportedModelError(msg)
    shapes = {name: tuple(view.shape) for name, view in shapes_of(model_config).named_weights()}
    return Quantiser(name, dtype, shapes, is_tied=model_config.tie_word_embeddings)


def _plan_codes(
    model_config: DecoderConfig,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    config: EngineConfig,
    quantiser: Quantiser | None,
) -> CodesPlan:
    """The quickest products that fit the memory; the smallest where none does."""
    plan_of = partial(
        plan_codes,
        shapes_of(model_config),
        checkpoint,
        device,
        dtype,
        batch_invariant=config.batch_invariant,
        quantiser=quantiser,
    )
    plan = plan_of(saves_memory=False)
    kv_bytes = _fewest_kv_bytes(config, model_config, device, dtype)
    if fits(plan.num_bytes + plan.room_bytes + kv_bytes, device, config):
        return plan
    small = plan_of(saves_memory=True)
    if small.num_bytes < plan.num_bytes:
        logger.warning(
            "%s takes %s with quick products, for which there is no room: weights stay packed "
            "(%s) and are expanded for every product, which is slow for few sequences",
            config.model,
            describe_bytes(plan.num_bytes),
            describe_bytes(small.num_bytes),
        )
        return small
    return plan


def _fewest_kv_bytes(
    config: EngineConfig, model_config: AnyConfig, device: torch.device, dtype: torch.dtype
) -> int:
    """The KV cache that was asked for, else that of one sequence.

    A sequence of `max_model_len` tokens where that is set, else of one block: the longest sequence
    is then lowered to what the cache holds.
    """
    if config.num_kv_blocks is None and config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    if not isinstance(model_config, DecoderConfig):
        return 0
    block_size = config.block_size or (
        _GPU_BLOCK_SIZE if device.type == "cuda" else _CPU_BLOCK_SIZE
    )
    # Block 0 is padding's.
    num_blocks = config.num_kv_blocks or 1 + -(-(config.max_model_len or 1) // block_size)
    kv_cache_dtype = resolve_kv_cache_dtype(config.kv_cache_dtype, dtype, device)
    return num_blocks * block_size * kv_bytes_per_token(model_config, kv_cache_dtype)


def _cpu_has_bfloat16() -> bool:
    """True where bfloat16 matrix products beat float32: AVX-512 BF16, AMX, Arm with bf16."""
    capabilities = torch.backends.cpu.get_cpu_capability()
    if capabilities.startswith("AVX512"):
        return bool(torch.cpu._is_avx512_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and "AVX" not in capabilities


def kv_bytes_per_token(config: DecoderConfig | ModelSizes, kv_cache_dtype: torch.dtype) -> int:
    """Bytes of K and V of one token over all layers."""
    num_heads = 2 * config.num_layers * config.num_kv_heads
    return num_heads * bytes_of_head(config.head_dim, kv_cache_dtype)


def resolve_kv_cache_dtype(name: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the KV cache of a model of `dtype`.

    Raises:
        ConfigError: The device does not have the one that was asked for.
    """
    if name == "auto":
        return dtype
    if name == "int8":
        return torch.int8
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(device)
        msg = (
            f"kv_cache_dtype='fp8' needs a GPU of compute capability 8.9 or above, and {device} "
            f"has {major}.{minor}. Use 'int8', which is also more precise, or 'auto'."
        )
        raise ConfigError(msg)
    return torch.float8_e4m3fn


def _steps_in_flight(config: EngineConfig, model: AnyModel, device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    is_eager = config.enforce_eager or not isinstance(model, Decoder)
    return _EAGER_STEPS_IN_FLIGHT if is_eager else _MOST_CAPTURED_STEPS_IN_FLIGHT


def _resolve_sizes(
    config: EngineConfig, model: AnyModel, device: torch.device, dtype: torch.dtype
) -> ResolvedConfig:
    is_cuda = device.type == "cuda"
    block_size = config.block_size or (_GPU_BLOCK_SIZE if is_cuda else _CPU_BLOCK_SIZE)
    step_tokens = config.max_num_batched_tokens or (
        _GPU_STEP_TOKENS if is_cuda else _CPU_STEP_TOKENS
    )
    kv_cache_dtype = resolve_kv_cache_dtype(config.kv_cache_dtype, dtype, device)
    longest = config.max_model_len or model.config.max_position_embeddings
    step_tokens = min(step_tokens, longest * config.max_num_seqs)
    blocks = num_kv_blocks(
        config,
        device,
        block_bytes=kv_bytes_per_token(model.config, kv_cache_dtype) * block_size,
        tokens_wanted=longest * config.max_num_seqs,
        block_size=block_size,
        run_step=lambda: run_largest_step(
            model,
            step_tokens,
            min(config.max_num_seqs, step_tokens),
            block_size,
            kv_cache_dtype,
        ),
    )
    # Block 0 is padding's. A longer sequence than the cache holds could never finish.
    max_model_len = min(longest, (blocks - 1) * block_size)
    if config.max_model_len is None and max_model_len < longest:
        logger.info(
            "max_model_len lowered from %d to %d tokens, what the KV cache holds",
            longest,
            max_model_len,
        )
    return ResolvedConfig(
        requested=config,
        device=device,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=max_model_len if config.max_model_len is None else config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=step_tokens,
        block_size=block_size,
        num_kv_blocks=blocks,
        enable_prefix_caching=config.enable_prefix_caching,
        max_steps_in_flight=_steps_in_flight(config, model, device),
    )
