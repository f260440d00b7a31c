"""Load time, memory and decoding of the demo model in every kind of quantised format, on a CPU.

* load_s: process start to first token; weights_mib: as the engine counts them; peak_rss_mib: after
  the first tokens
* decode_tok_s: one request, 32 tokens in, 64 out; tokens per second after the first
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cpu_peers import make_single
from plan import Job, Plan
from rows import RowFile
from sections.cpu import process_age_s

SECTION = "quantised"
KINDS = ("gguf", "bfloat16", "gptq", "awq", "w4a16", "w8a8", "fp8-rows", "nf4", "llm-int8")


def jobs(plan: Plan) -> list[Job]:
    """One job per format; each loads in a process of its own."""
    kinds = KINDS[:1] if plan.is_quick else KINDS
    return [
        Job(SECTION, f"{kind}/all", {"kind": kind}, (f"{kind}/peak_rss_mib",)) for kind in kinds
    ]


def measure(plan: Plan, rows: RowFile, *, kind: str) -> None:
    """All figures of one format."""
    with tempfile.TemporaryDirectory() as folder:
        model, written_s = "smollm2-135m", 0.0
        if kind != "gguf":
            started_s = time.perf_counter()
            script = Path(__file__).parents[1] / "quantised_models.py"
            subprocess.run([sys.executable, script, kind, folder], check=True)
            model, written_s = folder, time.perf_counter() - started_s
        for figure, value, unit in _figures(model, written_s, plan.is_quick):
            rows.add(SECTION, f"{kind}/{figure}", value, unit, kind=kind, figure=figure)


def _figures(model: str, written_s: float, is_quick: bool) -> list[tuple[str, float, str]]:
    from engine import Engine, SamplingParams

    with Engine(model, device="cpu") as engine:

        def seconds(count: int) -> float:
            [(prompt, _)] = make_single(32, count)
            engine.reset_prefix_cache()
            params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
            started_s = time.perf_counter()
            engine.generate(prompt, params)
            return time.perf_counter() - started_s

        seconds(1)
        load_s = process_age_s() - written_s
        new_tokens = 4 if is_quick else 64
        seconds(new_tokens)
        first_s = min(seconds(1) for _ in range(3))
        decode_s = max(1e-6, min(seconds(new_tokens + 1) for _ in range(3)) - first_s)
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return [
            ("load_s", load_s, "s"),
            ("weights_mib", engine.stats().weight_bytes / 2**20, "MiB"),
            ("decode_tok_s", new_tokens / decode_s, "tok/s"),
            ("peak_rss_mib", peak_mib, "MiB"),
        ]
