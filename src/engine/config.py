"""`EngineConfig`: every option of an engine, declared once. `ResolvedConfig`: what they came to."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError, nearest_name_hint

if TYPE_CHECKING:
    import torch

DTYPE_NAMES = ("auto", "bfloat16", "float16", "float32")
LOAD_FORMATS = ("auto", "dummy")
PLACEMENTS = ("thread", "process")
QUANTIZATIONS = ("int4", "int8", "fp8")
TASKS = ("auto", "generate", "embed")
DEFAULT_MAX_NUM_SEQS = 256
KV_CACHE_DTYPES = ("auto", "fp8", "int8")
POOLINGS = ("auto", "cls", "last", "max", "mean")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of one engine. Frozen and comparable: equal configs share an engine.

    Attributes:
        model: A Hugging Face folder, a `.gguf` file, a packaged model ("smollm2-135m",
            "all-minilm-l6-v2"), or a hub id.
        task: "auto" does what the model is made for: encoders, folders in the layout of
            sentence-transformers and models with one score embed or score, all others generate.
            "embed" makes embeddings with a model that generates; "generate" the other way round.
        pooling: How a text's tokens become one vector: "auto" as the model's files say, else "mean"
            over all tokens (encoders) or the state of the "last" (decoders); or "cls", "max".
        tokenizer: Folder or `tokenizer.json` to use instead of the model's own.
        chat_template: Jinja source to use instead of the model's own.
        revision: Hub branch, tag or commit. Default: the hub's default branch.
        local_files_only: Never ask the network; also on when HF_HUB_OFFLINE is set.
        trust_remote_code: Whether Python code that a model's folder brings may run, with all rights
            of this process, where neither the engine nor transformers has its architecture.
            Default off.
        load_format: "auto" reads the checkpoint; "dummy" makes random weights from `config.json`
            alone, for benchmarks (prompts and outputs are then token ids).
        device: "auto" (cuda where there is a GPU, else cpu), "cpu", "cuda" or "cuda:<index>".
        dtype: Weights and activations: "auto" is the checkpoint's own where the device computes it
            fast, else bfloat16 or float32; or "bfloat16", "float16", "float32". With "auto" on a
            CPU, quantised GGUF weights stay quantised: less memory, faster up to about 16 running
            sequences; a dtype that is named expands them, which is faster beyond. Other quantised
            checkpoints stay quantised whatever the dtype of activations.
        quantization: Round the plain weights of a model that generates while they are loaded, layer
            by layer: "int4" (4.5 bits a weight), "int8", or "fp8" (e4m3; on a GPU, rows of long
            prompts are rounded to e4m3, too). The output projection gets 8 bits at least, an
            embedding of its own and norms stay as they are. Default: weights as the checkpoint
            has them; one that is quantised already is run so, and needs no option.
        max_model_len: Most tokens of prompt and answer together. Default: the model's own limit,
            lowered to what the KV cache holds.
        max_num_seqs: Most sequences running at once, 1 to 4096. Further ones wait. Default 256.
            Where texts are embedded or scored, most texts of one step; 4096 unless it is set.
        max_num_batched_tokens: Token budget of one step, prompt chunks included. Default 8192 on a
            GPU (large matrix products stay efficient), 1024 on a CPU (a step stays short enough
            for smooth streaming); where texts are embedded or scored 16384 on a GPU.
        gpu_memory_utilization: Share of the GPU's total memory this engine may fill, in (0, 1].
            Default 0.85.
        kv_cache_memory_bytes: Size of the KV cache instead of a share. Default on a CPU: room for
            `max_num_seqs` sequences, at most 1 GiB or a quarter of the free memory.
        num_kv_blocks: Size of the KV cache in blocks; mostly for tests of tiny caches.
        kv_cache_dtype: What the KV cache stores: "auto" (default) the model's own dtype; "int8" or
            "fp8" (e4m3) 8 bits and a scale for each token and head, which makes room for nearly
            twice as many tokens beside bfloat16. Answers change a little: "int8" is several times
            closer to the unrounded ones than "fp8". "fp8" needs compute capability 8.9 on a GPU.
        block_size: Tokens per KV block, a power of two >= 16. Default 64 on a GPU (an attention
            tile is a block), 64 on a CPU.
        enable_prefix_caching: Reuse the KV blocks of equal prompt prefixes. Default on.
        enforce_eager: Never capture CUDA graphs. Slower; for debugging. Default off.
        batch_invariant: On a GPU use kernels whose result for one sequence does not depend on its
            batch neighbours, so that greedy and seeded answers repeat exactly whatever else runs.
            Slower; default off. On a CPU this always holds and the option changes nothing. Encoders
            on a GPU have it in half precision only.
        num_threads: CPU threads of the engine thread's operations. Default: the cores this
            process may use and others leave free, up to 16, looked at several times a second.
        placement: Where the engine loop runs. "thread" (default): in a thread of this process.
            "process": in a child process behind the same `Engine`; a busy application and the
            engine then do not slow each other down, a crash of the engine cannot take the
            application with it, and `close` gives back all GPU memory. Costs one process (a second
            Python with torch) per engine, and about 0.2 ms per request. Not on Windows.
        seed: Base of the seeds drawn for requests that bring none. Default: from the system.

    Raises:
        ConfigError: A value is out of range, or two contradict each other.
    """

    model: str
    task: str = "auto"
    pooling: str = "auto"
    tokenizer: str | None = None
    chat_template: str | None = None
    revision: str | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False
    load_format: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = DEFAULT_MAX_NUM_SEQS
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float = 0.85
    kv_cache_memory_bytes: int | None = None
    num_kv_blocks: int | None = None
    kv_cache_dtype: str = "auto"
    block_size: int | None = None
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    batch_invariant: bool = False
    num_threads: int | None = None
    placement: str = "thread"
    seed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", self._model_name())
        object.__setattr__(self, "dtype", self._dtype_name())
        _one_of("load_format", self.load_format, LOAD_FORMATS)
        _one_of("task", self.task, TASKS)
        _one_of("pooling", self.pooling, POOLINGS)
        _one_of("dtype", self.dtype, DTYPE_NAMES)
        _one_of("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _one_of("placement", self.placement, PLACEMENTS)
        if self.quantization is not None:
            _one_of("quantization", self.quantization, QUANTIZATIONS)
        if not isinstance(self.device, str) or self.device.split(":")[0] not in (
            "auto",
            "cpu",
            "cuda",
        ):
            msg = f"device={self.device!r} must be 'auto', 'cpu', 'cuda' or 'cuda:<index>'."
            raise ConfigError(msg)
        if not isinstance(self.trust_remote_code, bool):
            msg = f"trust_remote_code={self.trust_remote_code!r} must be True or False."
            raise ConfigError(msg)
        _in_range("max_model_len", self.max_model_len, 1, None)
        _in_range("max_num_seqs", self.max_num_seqs, 1, 4096)
        _in_range("max_num_batched_tokens", self.max_num_batched_tokens, 1, None)
        _in_range("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1, None)
        _in_range("num_kv_blocks", self.num_kv_blocks, 2, None)
        _in_range("num_threads", self.num_threads, 1, None)
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            msg = f"gpu_memory_utilization={share!r} must be in (0, 1]."
            raise ConfigError(msg)
        size = self.block_size
        if size is not None and (not isinstance(size, int) or size < 16 or size & (size - 1)):
            msg = f"block_size={size!r} must be a power of two >= 16."
            raise ConfigError(msg)
        if self.kv_cache_memory_bytes is not None and self.num_kv_blocks is not None:
            msg = "kv_cache_memory_bytes and num_kv_blocks both size the KV cache. Give one."
            raise ConfigError(msg)

    def _model_name(self) -> str:
        if not isinstance(self.model, str | os.PathLike) or not os.fspath(self.model):
            msg = f"model={self.model!r} must be a non-empty name or path."
            raise ConfigError(msg)
        return os.fspath(self.model)

    def _dtype_name(self) -> str:
        """`torch.bfloat16` and "bf16" are accepted for "bfloat16"."""
        name = str(self.dtype).removeprefix("torch.")
        return {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}.get(
            name, name
        )

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Names of all options, in declaration order."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_kwargs(cls, **options: Any) -> EngineConfig:
        """Build from a dict of options.

        Raises:
            ConfigError: A name is unknown (the nearest valid one is suggested) or a value is bad.
        """
        for name in options:
            if name not in cls.field_names():
                hint = nearest_name_hint(name, cls.field_names())
                msg = f"Unknown engine option {name!r}.{hint}"
                raise ConfigError(msg)
        return cls(**options)

    def differing_fields(self, other: EngineConfig) -> dict[str, tuple[Any, Any]]:
        """Field name -> (own value, other's value) for every field that differs."""
        return {
            name: (getattr(self, name), getattr(other, name))
            for name in self.field_names()
            if getattr(self, name) != getattr(other, name)
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """An `EngineConfig` after the model, the device and the memory have been looked at.

    Attributes:
        requested: The config it came from.
        device: Where the model runs.
        dtype: Of weights and activations.
        kv_cache_dtype: Of the KV cache: `dtype`, or int8 or float8_e4m3fn with scales.
        max_model_len: Tokens of prompt and answer together that one sequence may have.
        max_num_seqs: Sequences running at once.
        max_num_batched_tokens: Token budget of one step, >= `max_num_seqs`.
        block_size: Tokens per KV block.
        num_kv_blocks: Blocks in the KV cache; block 0 is never handed out (padding goes there).
        enable_prefix_caching: Whether prompts reuse each other's blocks.
        max_steps_in_flight: Steps launched before the first one's result is read; 1 on a CPU.
    """

    requested: EngineConfig
    device: torch.device
    dtype: torch.dtype
    kv_cache_dtype: torch.dtype
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_kv_blocks: int
    enable_prefix_caching: bool
    max_steps_in_flight: int


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        msg = f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}."
        raise ConfigError(msg)


def _in_range(name: str, value: Any, low: int, high: int | None) -> None:
    if value is None:
        return
    limit = f">= {low}" if high is None else f"in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int):
        msg = f"{name}={value!r} must be an integer {limit}."
        raise ConfigError(msg)
    if value < low or (high is not None and value > high):
        msg = f"{name}={value} must be {limit}."
        raise ConfigError(msg)
