"""The five workloads on the three model shapes, on one GPU, beside the published figures.

    python benchmarks/workloads_gpu.py [--shapes llama-135m] [--workloads single chat] [--repeats 2]

Random weights of real shapes, greedy, end-of-sequence ignored, at most 512 running sequences.
Wall seconds from handing all requests over to the last output; the prefix cache is emptied before
every repeat.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from environment import print_table, write_rows
from workloads import SHAPES, WORKLOADS, chat, model_dir, tokens_in, tokens_out

from engine import Engine, SamplingParams

# Wall seconds on one H100: (vLLM 0.26, SGLang 0.5.17, our goal).
REFERENCE: dict[tuple[str, str], tuple[float, float, float]] = {
    ("llama-135m", "single"): (0.637, 0.462, 0.13),
    ("llama-135m", "mixed"): (6.82, 3.63, 1.8),
    ("llama-135m", "chat"): (13.0, 6.80, 2.2),
    ("llama-135m", "rag"): (0.610, 0.335, 0.20),
    ("llama-135m", "longprompt"): (0.336, 0.310, 0.28),
    ("qwen3-0.6b", "single"): (0.538, 0.418, 0.19),
    ("qwen3-0.6b", "mixed"): (7.50, 7.63, 6.4),
    ("qwen3-0.6b", "chat"): (11.1, 8.11, 5.0),
    ("qwen3-0.6b", "rag"): (0.787, 0.677, 0.40),
    ("qwen3-0.6b", "longprompt"): (0.789, 0.779, 0.74),
    ("llama-8b", "single"): (1.672, 1.633, 1.45),
    ("llama-8b", "mixed"): (16.8, 17.0, 15.3),
    ("llama-8b", "chat"): (20.3, 18.6, 16.5),
    ("llama-8b", "rag"): (1.277, 1.573, 0.75),
    ("llama-8b", "longprompt"): (3.93, 3.99, 3.85),
}


def run(engine: Engine, requests: list[tuple[list[int], int]]) -> float:
    """Seconds for all requests together."""
    prompts = [prompt for prompt, _ in requests]
    params = [
        SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for _, count in requests
    ]
    started_s = time.perf_counter()
    outputs = engine.generate(prompts, params)
    wall_s = time.perf_counter() - started_s
    assert sum(output.usage.completion_tokens for output in outputs) == tokens_out(requests)
    return wall_s


def measure_shape(shape: str, names: list[str], repeats: int) -> list[dict[str, Any]]:
    """Rows of one shape; the first one is the start time."""
    started_s = time.perf_counter()
    engine = Engine(
        model_dir(shape), load_format="dummy", device="cuda", max_num_seqs=512, dtype="bfloat16"
    )
    with engine:
        engine.generate([5, 6, 7], SamplingParams(max_tokens=1, ignore_eos=True))
        start_s = time.perf_counter() - started_s
        rows: list[dict[str, Any]] = [
            {"shape": shape, "workload": "start", "seconds": start_s, "unit": "s"}
        ]
        vocab = SHAPES[shape]["vocab_size"]
        # Compiles and captures what a real server would have met before.
        run(engine, chat(vocab, n=64, seed=99))
        for name in names:
            requests = WORKLOADS[name](vocab)
            walls, steps, host_ms = [], 0, 0.0
            for _ in range(repeats):
                engine.reset_prefix_cache()
                before = engine.stats()
                walls.append(run(engine, requests))
                after = engine.stats()
                steps = after.steps - before.steps
                host_ms = (
                    after.host_ms_per_step * after.steps - before.host_ms_per_step * before.steps
                ) / max(steps, 1)
            rows.append(
                {
                    "shape": shape,
                    "workload": name,
                    "dtype": "bfloat16",
                    "seconds": statistics.median(walls),
                    "best_seconds": min(walls),
                    "unit": "s",
                    "prompt_tokens": tokens_in(requests),
                    "output_tokens": tokens_out(requests),
                    "output_tokens_per_s": tokens_out(requests) / statistics.median(walls),
                    "steps": steps,
                    "host_ms_per_step": host_ms,
                    "kv_cache_gib": after.kv_cache_bytes / 2**30,
                    "reference_vllm_s": REFERENCE[shape, name][0],
                    "reference_sglang_s": REFERENCE[shape, name][1],
                    "goal_s": REFERENCE[shape, name][2],
                }
            )
            print(f"{shape} {name}: {[round(wall, 3) for wall in walls]} s", flush=True)
    return rows


def main() -> None:
    """Measure, write the rows, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shape in options.shapes:
        rows += measure_shape(shape, options.workloads, options.repeats)
        # After each shape, so that a run cut short leaves what it has.
        write_rows("workloads_gpu", rows[-len(options.workloads) - 1 :])
    print_table(
        ["shape", "workload", "ours s", "vLLM", "SGLang", "goal", "tok/s", "steps", "host ms/step"],
        [
            [
                row["shape"],
                row["workload"],
                f"{row['seconds']:.3f}",
                row.get("reference_vllm_s", ""),
                row.get("reference_sglang_s", ""),
                row.get("goal_s", ""),
                f"{row['output_tokens_per_s']:.0f}" if "output_tokens_per_s" in row else "",
                row.get("steps", ""),
                f"{row['host_ms_per_step']:.2f}" if "host_ms_per_step" in row else "",
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
