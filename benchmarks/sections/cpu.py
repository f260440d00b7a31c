"""This engine beside transformers on a CPU: the demo model, each peer in a process of its own.

Wants an otherwise quiet machine; the rows record the load average. Rates count wanted tokens over
wall time, prefill included.

* decode_tok_s: one request, 32 tokens in, 128 out; tokens per second after the first
* ttft_1024_s: one request, 1024 tokens in; seconds to the first token
* w16_tok_s, w64_tok_s: 16 or 64 requests, 32-256 in, 16-128 out. Static batches are left-padded
  groups of 16, each run to its longest.
* load_s: process start to first token; peak_rss_mib: after w16
* `+busy`: the same beside one process that only burns CPU time
* import: `import engine`, `import llm_connectors`, `import transformers`, best of five
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from cpu_peers import PEERS, make_requests, make_single
from plan import Job, Plan, Requests
from rows import RowFile

SECTION = "cpu"
MODULES = ("engine", "llm_connectors", "transformers")
_SHORT_FIGURES = ("decode_tok_s", "ttft_1024_s", "w16_tok_s")
_UNITS = {"tok_s": "tok/s", "s": "s", "mib": "MiB"}


def jobs(plan: Plan) -> list[Job]:
    """One job per peer and neighbour, and one for the imports."""
    peers = ("ours",) if plan.is_quick else tuple(PEERS)
    pairs = [(peer, False) for peer in peers]
    pairs += [(peer, True) for peer in peers if peer != "transformers-cb" and not plan.is_quick]
    found = [
        Job(
            SECTION,
            _row_name(peer, busy, "all"),
            {"peer": peer, "busy": busy},
            (_row_name(peer, busy, "w16_tok_s"),),
        )
        for peer, busy in pairs
    ]
    names = tuple(f"import/{module}" for module in MODULES)
    return [*found, Job(SECTION, "imports", {"peer": None, "busy": False}, names)]


def _row_name(peer: str, busy: bool, figure: str) -> str:
    return f"{peer}+busy/{figure}" if busy else f"{peer}/{figure}"


def measure(plan: Plan, rows: RowFile, *, peer: str | None, busy: bool) -> None:
    """All figures of one peer, or the imports."""
    if peer is None:
        for module in MODULES:
            rows.add(SECTION, f"import/{module}", import_seconds(module), "s", module=module)
        return
    with ExitStack() as stack:
        if busy:
            spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(spinner.wait)
            stack.callback(spinner.kill)
        for figure, value in figures(peer, plan.is_quick, is_short=busy):
            unit = next(unit for end, unit in _UNITS.items() if figure.endswith(end))
            rows.add(
                SECTION,
                _row_name(peer, busy, figure),
                value,
                unit,
                peer=peer,
                figure=figure,
                busy_neighbour=busy,
            )


def figures(peer_name: str, is_quick: bool, *, is_short: bool) -> list[tuple[str, float]]:
    """(figure, value) of one peer, loaded in this process."""
    peer = PEERS[peer_name]()
    peer.run(make_single(8, 1))
    found = [("load_s", process_age_s())]
    repeats = 1 if is_quick or is_short else 3
    new_tokens, prompt_tokens, many, most = (4, 32, 4, 0) if is_quick else (128, 1024, 16, 64)

    def median_s(requests: Requests) -> float:
        peer.run(requests[:1] if len(requests) == 1 else make_requests(4, 9))
        return statistics.median(peer.run(requests) for _ in range(repeats))

    if peer_name != "transformers-cb":
        prefill_s = median_s(make_single(32, 1))
        decode_s = max(1e-6, median_s(make_single(32, new_tokens + 1)) - prefill_s)
        found.append(("decode_tok_s", new_tokens / decode_s))
        found.append(("ttft_1024_s", median_s(make_single(prompt_tokens, 1))))
    requests = make_requests(many, 16)
    found.append(("w16_tok_s", sum(count for _, count in requests) / median_s(requests)))
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found.append(("peak_rss_mib", peak_mib))
    if most and not is_short and peer_name != "transformers-cb":
        requests = make_requests(most, 64)
        found.append(("w64_tok_s", sum(count for _, count in requests) / peer.run(requests)))
    return [one for one in found if one[0] in _SHORT_FIGURES] if is_short else found


def import_seconds(module: str) -> float:
    """Time to import a module in a fresh interpreter, best of five."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    return min(
        float(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(5)
    )


def process_age_s() -> float:
    """Seconds since this process was started, to 10 ms."""
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_s = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
