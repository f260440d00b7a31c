"""How much of the device the KV cache may have: profile one full step, give it the rest."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from engine.config import EngineConfig
from engine.errors import CapacityError
from engine.kernels.metadata import AttentionMetadata
from engine.models.any_model import AnyModel

_CPU_DEFAULT_LIMIT_BYTES = 1 << 30


def describe_bytes(num_bytes: float) -> str:
    """`1.50 GiB` for people."""
    return f"{num_bytes / 2**30:.2f} GiB"


def available_host_bytes() -> int:
    """Memory that new allocations can get without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as meminfo:
            for line in meminfo:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        # macOS: half of what is installed, because nothing tells what is free.
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        # Not known on this platform: assume a small laptop.
        return 4 << 30


def check_model_fits(
    weight_bytes: int, kv_bytes: int, device: torch.device, config: EngineConfig
) -> None:
    """Refuse a model that cannot fit, before anything is loaded.

    Args:
        weight_bytes: Of the weights as they will stand in memory, quantised or not.
        kv_bytes: The smallest KV cache that will do; 0 where there is none.
        device: Of the model.
        config: `gpu_memory_utilization`, and the name for the error.

    Raises:
        CapacityError: With the numbers.
    """
    if fits(weight_bytes + kv_bytes, device, config):
        return
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        what = (
            f"{device} has {describe_bytes(free)} free of {describe_bytes(total)} "
            f"(gpu_memory_utilization={config.gpu_memory_utilization})"
        )
    else:
        what = f"this machine has {describe_bytes(available_host_bytes())} free"
    kv = f" and the smallest KV cache {describe_bytes(kv_bytes)}" if kv_bytes else ""
    msg = (
        f"The weights of {config.model!r} need {describe_bytes(weight_bytes)} in memory{kv}, but "
        f"{what}. Use a smaller model, dtype or max_model_len, or free memory first."
    )
    raise CapacityError(msg)


def fits(num_bytes: int, device: torch.device, config: EngineConfig) -> bool:
    """Whether so much memory can be had on the device now."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return num_bytes <= min(free, int(total * config.gpu_memory_utilization))
    return num_bytes <= available_host_bytes()


def num_kv_blocks(
    config: EngineConfig,
    device: torch.device,
    block_bytes: int,
    tokens_wanted: int,
    block_size: int,
    run_step: Callable[[], Any],
) -> int:
    """Blocks the KV cache gets.

    Args:
        config: `num_kv_blocks` and `kv_cache_memory_bytes` win over everything else.
        device: The model's device; the weights are on it already.
        block_bytes: Bytes of one block over all layers.
        tokens_wanted: `max_num_seqs` times the longest sequence; a CPU takes no more than that.
        block_size: Tokens per block.
        run_step: Runs the largest possible step once, so that its peak can be measured.

    Raises:
        CapacityError: Not even two blocks fit.
    """
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    if config.kv_cache_memory_bytes is not None:
        budget = config.kv_cache_memory_bytes
    elif device.type == "cuda":
        budget = _gpu_budget(config, device, run_step)
    else:
        budget = min(_CPU_DEFAULT_LIMIT_BYTES, available_host_bytes() // 4)
        # One block is reserved, hence + 1.
        budget = min(budget, (-(-tokens_wanted // block_size) + 1) * block_bytes)
    if budget < 2 * block_bytes:
        msg = (
            f"{describe_bytes(max(budget, 0))} are left for the KV cache, but its two smallest "
            f"blocks need {describe_bytes(2 * block_bytes)}. Raise gpu_memory_utilization or "
            "kv_cache_memory_bytes, or lower max_num_batched_tokens."
        )
        raise CapacityError(msg)
    return budget // block_bytes


def _gpu_budget(config: EngineConfig, device: torch.device, run_step: Callable[[], Any]) -> int:
    """Share of the GPU minus what is in use by anybody and what the largest step adds to it."""
    from engine.kernels.compile_ahead import without_launches

    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    # What counts are allocations.
    with without_launches():
        run_step()
    torch.cuda.synchronize(device)
    activation_bytes = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    # Whatever runs beside us on this GPU is in `total - free` too and is left alone.
    in_use = total - free
    # Captured steps keep their activations, eager ones (prompt logprobs) need their own. Graphs,
    # fragmentation and the libraries' workspaces come on top.
    num_kinds = 1 if config.enforce_eager else 2
    reserve_bytes = num_kinds * activation_bytes + activation_bytes // 8 + (512 << 20)
    return int(total * config.gpu_memory_utilization) - in_use - reserve_bytes


def run_largest_step(model: AnyModel, num_tokens: int, num_seqs: int, block_size: int) -> None:
    """Run the largest step once, eagerly, on throw-away KV blocks.

    Args:
        model: With weights on its device.
        num_tokens: Token budget of a step.
        num_seqs: Sequences that sample in it.
        block_size: Tokens per block.
    """
    device, dtype = model.device, model.dtype
    shape = model.kv_cache_shape(2, block_size)
    kv_caches = [
        (
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
        )
        for _ in range(model.config.num_layers)
    ]
    one = torch.tensor([num_tokens], dtype=torch.int32, device=device)
    metadata = AttentionMetadata(
        positions=torch.arange(num_tokens, device=device) % block_size,
        slot_mapping=torch.full((num_tokens,), -1, dtype=torch.int64, device=device),
        block_table=torch.ones((1, -(-num_tokens // block_size)), dtype=torch.int32, device=device),
        seq_lens=one,
        query_lens=one,
        query_start_loc=torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
        num_decodes=0,
        max_query_len=num_tokens,
        max_seq_len=num_tokens,
        seq_lens_host=[num_tokens],
        query_lens_host=[num_tokens],
        block_table_host=[[1] * -(-num_tokens // block_size)],
    )
    input_ids = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    hidden = model.forward(input_ids, kv_caches, metadata)
    logits = model.compute_logits(hidden[:num_seqs])
    # What sampling adds: one float32 copy of the logits and its softmax.
    torch.softmax(logits.float(), dim=-1)
