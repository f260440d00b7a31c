"""Times the sampler: batch sizes x vocabularies x variants, against torch's own ways.

`python benchmarks/bench_sampler.py` prints microseconds per call of `Sampler.sample` on the GPU,
in a CUDA graph as the engine runs it, or per call on the CPU where there is no GPU. The last
columns are what it replaces: `argmax`, and the usual sort, softmax, cumulative sum and draw.
"""

from __future__ import annotations

import argparse
import functools
import platform
import time
from collections.abc import Callable
from typing import Any

import torch

from engine.runner.sampler import Sampler
from engine.sampling_params import SamplingParams

VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "random": {"temperature": 0.8},
    "top_k 50": {"top_k": 50},
    "top_p .9": {"top_p": 0.9},
    "k20 p.8": {"top_k": 20, "top_p": 0.8, "temperature": 0.7},
    "min_p .05": {"min_p": 0.05},
    "greedy+pen": {"temperature": 0.0, "repetition_penalty": 1.1},
    "k20 p.8+pen": {"top_k": 20, "top_p": 0.8, "presence_penalty": 1.0},
}


def _time_gpu_us(function: Callable[[], Any], calls: int) -> float:
    """Mean time of a call inside a CUDA graph of `calls` calls, best of three replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    graph.replay()
    times = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return min(times)


def _time_cpu_us(function: Callable[[], Any], calls: int) -> float:
    function()
    times = []
    for _ in range(calls):
        start_s = time.perf_counter()
        function()
        times.append((time.perf_counter() - start_s) * 1e6)
    return min(times)


def sample_by_sorting(logits: torch.Tensor) -> torch.Tensor:
    """Top-k 50 and top-p 0.9 the common way, as the baseline."""
    values, order = torch.sort(logits.float(), dim=-1, descending=True)
    values[:, 50:] = -torch.inf
    probabilities = torch.softmax(values, dim=-1)
    beyond = probabilities.cumsum(-1) - probabilities > 0.9
    noise = torch.empty_like(probabilities).exponential_()
    drawn = (probabilities.masked_fill(beyond, 0.0) / noise).argmax(-1, keepdim=True)
    return order.gather(1, drawn)[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=3.0, help="standard deviation of the logits")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    name = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
    time_us = _time_gpu_us if on_gpu else _time_cpu_us
    print(f"{name}, torch {torch.__version__}, {dtype}, N(0, {options.scale}) logits; us per call")
    columns = [*VARIANTS, "argmax", "sort"]
    print(f"{'V':>7} {'R':>4} " + " ".join(f"{column:>11}" for column in columns))
    for vocab_size in (49_152, 128_256, 151_936):
        for num_rows in (1, 32, 256, 512) if on_gpu else (1, 16):
            logits = (torch.randn(num_rows, vocab_size, device=device) * options.scale).to(dtype)
            rows = torch.arange(num_rows, device=device)
            positions = rows + 100
            figures = []
            for fields in VARIANTS.values():
                sampler = Sampler(vocab_size, num_rows, device)
                for row in range(num_rows):
                    params = SamplingParams(**fields)
                    sampler.set_row(row, params, seed=row, prompt_token_ids=range(300))
                sampler.flush()
                variant = sampler.variant(rows.cpu().numpy())
                call = functools.partial(sampler.sample, logits, rows, positions, variant)
                figures.append(time_us(call, 10 if on_gpu else 5))
            figures.append(time_us(functools.partial(logits.argmax, -1), 5))
            figures.append(time_us(functools.partial(sample_by_sorting, logits), 2))
            line = " ".join(f"{figure:11.1f}" for figure in figures)
            print(f"{vocab_size:7} {num_rows:4} {line}", flush=True)


if __name__ == "__main__":
    main()
