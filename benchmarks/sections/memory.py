"""What an engine takes of the GPU, whether steady steps allocate, and what `close` gives back."""

from __future__ import annotations

import time

from plan import Job, Plan, first_token, fixed_length
from rows import RowFile
from sections.growth import random_requests
from workloads import SHAPES

SECTION = "memory"
NUM_STEPS = 200


def jobs(plan: Plan) -> list[Job]:
    """One job per shape. Only an engine in this process shows its allocator."""
    if plan.device != "cuda":
        return []
    return [
        Job(
            SECTION,
            shape,
            {"shape": shape},
            tuple(
                f"{shape}/{what}" for what in ("used-share", "steady-allocations", "left-behind")
            ),
        )
        for shape in plan.shapes
    ]


def measure(plan: Plan, rows: RowFile, *, shape: str) -> None:
    """Three figures: the share filled, allocations in 200 decode steps, GiB left after `close`."""
    import torch

    # The context, the libraries and the kernels stay as long as the process.
    with plan.make_engine(shape, kv_cache_memory_bytes=1 << 30, max_model_len=4096) as engine:
        first_token(engine)
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    free_before, total = torch.cuda.mem_get_info()
    requests = random_requests(32, 128, NUM_STEPS + 40, SHAPES[shape]["vocab_size"])
    prompts = [prompt for prompt, _ in requests]
    with plan.make_engine(shape) as engine:
        first_token(engine)
        engine.generate(prompts, fixed_length(8))  # captures
        asked = engine.config.gpu_memory_utilization
        free, _ = torch.cuda.mem_get_info()
        rows.add(
            SECTION,
            f"{shape}/used-share",
            (total - free) / total,
            "of the GPU",
            shape=shape,
            asked=asked,
            kv_blocks=engine.stats().kv_blocks_total,
            kv_cache_gib=engine.stats().kv_cache_bytes / 2**30,
            weights_gib=engine.stats().weight_bytes / 2**30,
            peak_allocated_gib=torch.cuda.max_memory_allocated() / 2**30,
        )
        handles = engine.submit_many(prompts, fixed_length(NUM_STEPS + 40))
        start = engine.stats().steps
        while engine.stats().steps < start + 20:  # the prompts are through
            time.sleep(0.001)
        before, before_steps = _num_allocations(), engine.stats().steps
        while engine.stats().steps < before_steps + NUM_STEPS:
            time.sleep(0.001)
        made, steps = _num_allocations() - before, engine.stats().steps - before_steps
        for handle in handles:
            handle.result()
        rows.add(
            SECTION,
            f"{shape}/steady-allocations",
            made / steps,
            "allocations/step",
            shape=shape,
            allocations=made,
            steps=steps,
        )
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free_after, _ = torch.cuda.mem_get_info()
    rows.add(
        SECTION,
        f"{shape}/left-behind",
        (free_before - free_after) / 2**30,
        "GiB",
        shape=shape,
    )


def _num_allocations() -> int:
    """Blocks handed out by torch's allocator since the process started."""
    import torch

    return int(torch.cuda.memory_stats()["allocation.all.allocated"])
