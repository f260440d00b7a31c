"""All measurements by one command; what is measured depends on the machine.

    python benchmarks/run.py                                  everything this machine can
    python benchmarks/run.py --only table,busy --shapes llama-135m --placement default,process
    python benchmarks/run.py --resume                         go on where a run was killed
    python benchmarks/run.py --quick --device cpu             prove the harness within a minute

Sections on a GPU: table (the five workloads and the start), busy (beside spinning Python threads),
latency (Poisson arrivals), frameworks (through LangChain and LlamaIndex), growth (running
sequences, context), memory, kernels, embed (vectors beside the usual loop), rounded (the forms of
`quantization=` across batch sizes). On a CPU: cpu (side by
side with transformers), callers (what the caller's side costs per request), host (the same at a
GPU's pace, on a device that only waits), embed, quantised (the demo model in every kind of format).
On both: llama_index (pipelines of LlamaIndex), constrained (64 JSON answers beside the same
requests without a schema).

Every figure is a row, appended to `bench-results/rows.jsonl` the moment it is known. Each job is a
process of its own with a time budget; a job over its budget is killed, its rows stay. At the end
comes the comparison, printed and as `bench-results/comparison.md`. `report.py` makes it again from
the rows, `plot.py` draws them, `report.py --publish` puts both into docs/.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from environment import RESULTS, describe_environment
from plan import Job, Plan
from report import comparison
from rows import load_rows
from workloads import SHAPES, WORKLOADS

# Section -> seconds it may take in all, on the slowest machine it is meant for.
GPU_SECTIONS = {
    "table": 300.0,
    "busy": 150.0,
    "latency": 200.0,
    "frameworks": 150.0,
    "growth": 150.0,
    "memory": 90.0,
    "kernels": 240.0,
    "embed": 120.0,
    "llama_index": 90.0,
    "constrained": 90.0,
    "rounded": 240.0,
}
CPU_SECTIONS = {
    "cpu": 900.0,
    "callers": 120.0,
    "host": 300.0,
    "embed": 240.0,
    "llama_index": 400.0,
    "constrained": 240.0,
    "quantised": 300.0,
}
SECTIONS = {**GPU_SECTIONS, **CPU_SECTIONS}


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help=f"sections, comma-separated, of: {', '.join(SECTIONS)}")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--shapes", help=f"comma-separated, of: {', '.join(SHAPES)}")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="of the table section")
    parser.add_argument("--placement", default="default", help="for example default,process")
    parser.add_argument("--rates", default="2,4,8,16,32", help="of the latency section, requests/s")
    parser.add_argument("--latency-seconds", type=float, default=20.0, help="of arrivals per rate")
    parser.add_argument("--text-model", help="folder with a tokenizer.json (see text_model.py)")
    parser.add_argument("--kv-cache-mib", type=int, help="KV cache of each engine")
    parser.add_argument("--budget", type=float, help="seconds for each section, not its default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; the figures mean nothing")
    parser.add_argument("--resume", action="store_true", help="skip what this commit has rows of")
    parser.add_argument("--commit", help="of the code, where this copy has no repository")
    parser.add_argument("--rows", type=Path, default=RESULTS / "rows.jsonl")
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    return parser


def make_plan(options: argparse.Namespace) -> Plan:
    """What the command line asks for on this machine."""
    environment = describe_environment(options.commit)
    device = options.device
    if device == "auto":
        device = "cuda" if environment["gpu"] else "cpu"
    usual = ["tiny"] if device == "cpu" else [name for name in SHAPES if name != "tiny"]
    kv_cache_mib = options.kv_cache_mib
    if kv_cache_mib is None and device == "cpu":
        kv_cache_mib = 64
    return Plan(
        device=device,
        shapes=_chosen(options.shapes, usual, SHAPES, "shape"),
        workloads=_chosen(options.workloads, list(WORKLOADS), WORKLOADS, "workload"),
        placements=tuple(options.placement.split(",")),
        rates=tuple(sorted(float(rate) for rate in options.rates.split(","))),
        latency_s=options.latency_seconds,
        text_model=options.text_model,
        kv_cache_mib=kv_cache_mib,
        is_quick=options.quick,
        rows_path=str(options.rows.resolve()),
        resume=options.resume,
        environment=environment,
    )


def _chosen(given: str | None, usual: list[str], known: Any, what: str) -> tuple[str, ...]:
    if given is None:
        return tuple(usual)
    names = tuple(name.strip() for name in given.split(",") if name.strip())
    for name in names:
        if name not in known:
            msg = f"There is no {what} {name!r}. There are: {', '.join(known)}."
            raise SystemExit(msg)
    return names


def section_module(name: str) -> Any:
    """The module that measures a section."""
    return importlib.import_module(f"sections.{name}")


def run_section(name: str, plan: Plan, budget_s: float) -> bool:
    """Run a section's jobs one after the other within its budget. False: something is missing."""
    deadline = time.monotonic() + budget_s
    is_complete = True
    for job in section_module(name).jobs(plan):
        rows = plan.open_rows()
        if job.names and all(rows.has(name, row) for row in job.names):
            print(f"== {name} {job.name}: measured before", flush=True)
            continue
        left_s = deadline - time.monotonic()
        if left_s < 5.0:
            print(f"== {name} {job.name}: left out, the section's {budget_s:.0f} s are over")
            is_complete = False
            continue
        is_complete &= run_job(job, plan, left_s)
    return is_complete


def run_job(job: Job, plan: Plan, limit_s: float) -> bool:
    """Run one job in a process of its own, killed with all its children after `limit_s`."""
    print(f"== {job.section} {job.name} (at most {limit_s:.0f} s)", flush=True)
    started_s = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, __file__, "--job", job.section, json.dumps(job.arguments), plan.to_json()],
        start_new_session=True,
    )
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - started_s
    if code != 0:
        why = "over its time" if code is None else f"exit code {code}"
        print(f"== {job.section} {job.name}: ended early after {seconds:.0f} s, {why}", flush=True)
        return False
    print(f"== {job.section} {job.name}: {seconds:.0f} s", flush=True)
    return True


def main() -> None:
    """Measure, then compare."""
    options = make_parser().parse_args()
    if options.job:
        section, arguments, plan_text = options.job
        plan = Plan.from_json(plan_text)
        section_module(section).measure(plan, plan.open_rows(), **json.loads(arguments))
        return
    # Children are in sessions of their own: stopped like this, they must not stay on the GPU.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped. --resume goes on from here."))
    plan = make_plan(options)
    usual = GPU_SECTIONS if plan.device == "cuda" else CPU_SECTIONS
    names = _chosen(options.only, list(usual), SECTIONS, "section")
    print(f"{plan.environment}\nrows: {plan.rows_path}", flush=True)
    missing = [
        name for name in names if not run_section(name, plan, options.budget or SECTIONS[name])
    ]
    text = comparison(load_rows(Path(plan.rows_path)))
    (Path(plan.rows_path).parent / "comparison.md").write_text(text)
    print(text, flush=True)
    if missing:
        raise SystemExit(f"Incomplete: {', '.join(missing)}. --resume measures what is missing.")


if __name__ == "__main__":
    main()
