"""Rows as Markdown tables: the comparison of a run, and the tables of docs/PERFORMANCE.md.

    python benchmarks/report.py [--rows FILE]       print the comparison
    python benchmarks/report.py --publish FILE      take over rows for the documents, then --docs
    python benchmarks/report.py --docs              rewrite the tables in docs/PERFORMANCE.md

Published rows lie in `benchmarks/published.jsonl`, the newest of each figure. A table stands
between `<!-- rows: NAME -->` and `<!-- end -->`; what is there is never written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environment import RESULTS, ROOT
from reference import (
    BUSY_LOSS_GOALS,
    CONSTRAINED_GOAL,
    CPU_BUSY_GOAL,
    CPU_GOALS,
    FRAMEWORK_GOALS,
    HOST_MS_PER_STEP_GOAL,
    SPINNER_KEEPS_GOAL,
    START_S,
    WORKLOADS_H100,
)
from rows import Row, latest, load_rows
from workloads import SHAPES, WORKLOADS

PUBLISHED = ROOT / "benchmarks" / "published.jsonl"
DOCUMENT = ROOT / "docs" / "PERFORMANCE.md"
_BLOCK = re.compile(r"(<!-- rows: ([a-z]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(header: list[str], lines: list[list[Any]]) -> str:
    """A Markdown table; None is an empty cell."""
    cells = [["" if cell is None else str(cell) for cell in line] for line in lines]
    text = ["| " + " | ".join(line) + " |" for line in (header, *cells)]
    text.insert(1, "|" + "---|" * len(header))
    return "\n".join(text) + "\n"


def table(rows: list[Row]) -> str:
    """The five workloads and the start beside other engines and the goals."""
    found = latest(rows, "table")
    lines = []
    for placement, shape in _groups(found):
        prefix = shape if placement == "default" else f"{shape}@{placement}"
        start = found.get(f"{prefix}/start")
        if start:
            goal = _met(start["value"], START_S.goal)
            beaten = f"{START_S.best / start['value']:.1f}×"
            lines.append([prefix, "start", f"{start['value']:.1f}", None, "60-90", "57"])
            lines[-1] += [goal, beaten, None, None, start["kv_blocks"], _gib(start)]
        for workload in WORKLOADS:
            first = found.get(f"{prefix}/{workload}/first")
            if first is None:
                continue
            second = found.get(f"{prefix}/{workload}/second")
            row = second or first
            known = WORKLOADS_H100.get((shape, workload))
            lines.append(
                [
                    prefix,
                    workload,
                    f"{first['value']:.3f}",
                    f"{second['value']:.3f}" if second else None,
                    f"{known.vllm:g}" if known else None,
                    f"{known.sglang:g}" if known else None,
                    _met(row["value"], known.goal) if known else None,
                    f"{known.best / row['value']:.2f}×" if known else None,
                    f"{row['output_tokens_per_s']:.0f}",
                    _met(row["host_ms_per_step"], HOST_MS_PER_STEP_GOAL, "{:.2f}", False),
                    row["kv_blocks"],
                    _gib(row),
                ]
            )
    header = ["shape", "workload", "first, s", "second, s", "vLLM", "SGLang", "goal"]
    header += ["of the better", "output tok/s", "host ms/step", "KV blocks", "GPU GiB"]
    return markdown(header, lines)


def busy(rows: list[Row]) -> str:
    """`chat` beside spinning threads."""
    lines = []
    for row in latest(rows, "busy").values():
        goal = BUSY_LOSS_GOALS.get((row["placement"], row["spinners"]))
        kept = _percent(row["kept_share"])
        own = row["spinner_kept_share"]
        own_goal = f" (≥ {_percent(SPINNER_KEEPS_GOAL)})" if row["spinners"] == 1 else ""
        lines.append(
            [
                f"{row['shape']}, {row['placement']}",
                row["spinners"],
                f"{row['value']:.2f}",
                f"{row['output_tokens_per_s']:.0f}",
                kept if goal is None else f"{kept} (≥ {_percent(1 - goal)})",
                None if own is None else f"{_percent(own)}{own_goal}",
                f"{row['host_ms_per_step']:.2f}",
            ]
        )
    header = ["engine", "spinning threads", "chat, s", "output tok/s", "throughput kept (goal)"]
    return markdown([*header, "spinner's own speed kept (goal)", "host ms/step"], lines)


def latency(rows: list[Row]) -> str:
    """Percentiles per arrival rate."""
    names = [f"{label}_p{percent}_ms" for label in ("ttft", "itl") for percent in (50, 95, 99)]
    lines = [
        [
            f"{row['shape']}, {row['placement']}",
            f"{row['rate']:g}",
            row["requests"],
            *(f"{row[name]:.1f}" if name in row else None for name in names),
            f"{row['output_tokens_per_s']:.0f}",
        ]
        for row in latest(rows, "latency").values()
    ]
    header = ["engine", "requests/s", "requests"]
    for label in ("first token", "between tokens"):
        header += [f"{label} p50, ms", "p95", "p99"]
    return markdown([*header, "output tok/s"], lines)


def frameworks(rows: list[Row]) -> str:
    """Text in, text out through the connectors, beside the engine on the same texts."""
    lines = []
    for row in latest(rows, "frameworks").values():
        goal = FRAMEWORK_GOALS.get(row["case"])
        over = row["seconds_of_engine"] and row["value"] / row["seconds_of_engine"] - 1
        lines.append(
            [
                f"{row['shape']}, {row['placement']}",
                row["case"],
                row["requests"],
                f"{row['value']:.3f}",
                f"{over:+.1%}" if row["case"] != row["against"] else None,
                None if goal is None else f"≤ {goal:+.0%}",
                f"{row['output_tokens_per_s']:.0f}",
            ]
        )
    header = ["engine", "case", "requests", "seconds", "over the engine", "goal", "output tok/s"]
    return markdown(header, lines)


def growth(rows: list[Row]) -> str:
    """Throughput against running sequences and step time against context."""
    found = latest(rows, "growth").values()
    engines = list(dict.fromkeys((row["shape"], row["placement"]) for row in found))
    sizes: dict[tuple[str, int], dict[tuple[str, str], str]] = {}
    for row in found:
        if "running" in row:
            size, shown = ("tok/s", row["running"]), f"{row['value']:.0f}"
        else:
            size = (f"ms/step at B = {row['batch']}", row["context"])
            shown = f"{row['value']:.2f}"
        sizes.setdefault(size, {})[row["shape"], row["placement"]] = shown
    lines = [
        [what, number, *(cells.get(engine) for engine in engines)]
        for (what, number), cells in sizes.items()
    ]
    names = [f"{shape}, {placement}" for shape, placement in engines]
    return markdown(["figure", "running sequences, or tokens of context", *names], lines)


def cpu(rows: list[Row]) -> str:
    """This engine beside its peers, quiet and with a busy neighbour."""
    found = [row for row in latest(rows, "cpu").values() if "figure" in row]
    by_line: dict[tuple[bool, str], dict[str, float]] = {}
    for row in found:
        line = by_line.setdefault((row["busy_neighbour"], row["figure"]), {})
        line[row["peer"]] = row["value"]
    peers = list(dict.fromkeys(row["peer"] for row in found))
    lines = []
    for (is_busy, figure), values in sorted(by_line.items()):
        ours, theirs = values.get("ours"), values.get("transformers")
        ratio = f"{ours / theirs:.2f}" if ours and theirs else None
        shown = [f"{values[peer]:.4g}" if peer in values else None for peer in peers]
        quiet = by_line.get((False, figure), {}).get("ours")
        lines.append([figure, *shown, ratio, _cpu_goal(figure, ours)])
        if is_busy:
            lines[-1][0] = f"{figure}, busy neighbour"
            lines[-1][-1] = _share_kept(figure, ours, quiet)
    imports = [row for row in latest(rows, "cpu").values() if "module" in row]
    text = markdown(["figure", *peers, "ours / transformers", "goal"], lines)
    if imports:
        taken = ", ".join(f"`{row['module']}` {row['value']:.3f} s" for row in imports)
        text += f"\nImport: {taken}.\n"
    return text


def _cpu_goal(figure: str, ours: float | None) -> str | None:
    if figure not in CPU_GOALS:
        return None
    side, goal = CPU_GOALS[figure]
    is_met = ours is not None and (ours >= goal if side == "≥" else ours <= goal)
    return f"{side} {goal:g}" + (" ✓" if is_met else "")


def _share_kept(figure: str, busy: float | None, quiet: float | None) -> str | None:
    """The share of the quiet speed kept; times are the inverse of speeds."""
    if not busy or not quiet:
        return None
    share = busy / quiet if figure.endswith("tok_s") else quiet / busy
    return f"{_percent(share)} kept (≥ {_percent(CPU_BUSY_GOAL)})"


def constrained(rows: list[Row]) -> str:
    """JSON answers beside the same requests without a schema."""
    lines = []
    for row in latest(rows, "constrained").values():
        goal = f" (≤ {CONSTRAINED_GOAL:+.0%})" if row["case"] == "constrained" else ""
        over = f"{row['over_free']:+.1%}{goal}"
        lines.append(
            [
                f"{row['shape']}, {row['placement']}",
                row["case"],
                row["requests"],
                f"{row['value']:.3f}",
                None if row["case"].endswith("free") else over,
                f"{row['output_tokens_per_s']:.0f}",
                row["steps"],
            ]
        )
    header = ["engine", "case", "requests", "seconds", "over free text (goal)", "output tok/s"]
    return markdown([*header, "steps"], lines)


def host(rows: list[Row]) -> str:
    """The caller's side at a GPU's pace."""
    lines = [
        [
            row["name"],
            row["requests"],
            f"{row['value']:.2f}",
            f"{row['over']:+.0%}",
            f"{1e6 * row['caller_cpu_s'] / row['requests']:.0f}",
        ]
        for row in latest(rows, "host").values()
    ]
    header = ["case", "requests", "seconds", "over Engine.generate", "caller, µs/request"]
    return markdown(header, lines)


def simple(section: str) -> Callable[[list[Row]], str]:
    """Name, value and unit of every row of a section."""

    def write(rows: list[Row]) -> str:
        lines = [
            [row["name"], f"{row['value']:.4g}", row["unit"]]
            for row in latest(rows, section).values()
        ]
        return markdown(["figure", "value", "unit"], lines)

    return write


def embed(rows: list[Row]) -> str:
    """This engine beside the usual loop of padded batches."""
    found = latest(rows, "embed")
    lines = []
    for row in found.values():
        if row["peer"] != "ours":
            continue
        figure = row["name"].rpartition("/")[2]
        loop = found.get(f"{row['model']}/loop/{figure.removeprefix('gathered_')}")
        times = None
        if loop:
            ratio = row["value"] / loop["value"]
            times = f"{1 / ratio if row['unit'] == 'ms' else ratio:.2f}×"
        lines.append(
            [
                f"{row['model']}, {row['dtype']}",
                figure,
                f"{row['value']:.4g} {row['unit']}",
                loop and f"{loop['value']:.4g}",
                times,
            ]
        )
    return markdown(["model", "figure", "ours", "padded batches of 32", "faster"], lines)


def quantised(rows: list[Row]) -> str:
    """A format per row."""
    found = latest(rows, "quantised")
    figures = ("load_s", "weights_mib", "peak_rss_mib", "decode_tok_s")
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in found.values()):
        values = [found.get(f"{kind}/{figure}") for figure in figures]
        lines.append([kind, *(row and f"{row['value']:.4g}" for row in values)])
    return markdown(
        ["format", "load, s", "weights, MiB", "peak memory, MiB", "decode, tok/s"], lines
    )


def rounded(rows: list[Row]) -> str:
    """A figure per row, a kind of weights per column; times beside the first column's."""
    found = latest(rows, "rounded")
    kinds = list(dict.fromkeys(row["kind"] for row in found.values()))
    lines = []
    for shape, figure in dict.fromkeys((row["shape"], row["figure"]) for row in found.values()):
        line: list[str | None] = [shape, figure]
        base = found.get(f"{shape}/{kinds[0]}/{figure}")
        for kind in kinds:
            row = found.get(f"{shape}/{kind}/{figure}")
            text = row and f"{row['value']:.4g} {row['unit']}"
            if row and row.get("floor_share"):
                text = f"{text}, {_percent(row['floor_share'])} of floor"
                if base and base is not row:
                    text = f"{text}, {base['value'] / row['value']:.2f}×"
            line.append(text)
        lines.append(line)
    return markdown(["shape", "figure", *kinds], lines)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "table": table,
    "busy": busy,
    "latency": latency,
    "frameworks": frameworks,
    "growth": growth,
    "memory": simple("memory"),
    "callers": simple("callers"),
    "llama_index": simple("llama_index"),
    "host": host,
    "cpu": cpu,
    "embed": embed,
    "constrained": constrained,
    "quantised": quantised,
    "rounded": rounded,
}


def provenance(rows: list[Row]) -> str:
    """One line that says where rows come from."""
    facts = []
    for name in ("commit", "date", "gpu", "driver", "torch", "triton"):
        values = dict.fromkeys(str(row.get(name)) for row in rows if row.get(name))
        if values:
            facts.append(f"{name} {', '.join(values)}")
    return "; ".join(facts) + ".\n"


def section_text(name: str, rows: list[Row]) -> str:
    """A section's table and where its rows come from."""
    own = list(latest(rows, name).values())
    return f"{TABLES[name](rows)}\nRows: {provenance(own)}"


def comparison(rows: list[Row]) -> str:
    """All tables that have rows, as a document."""
    present = [name for name in TABLES if latest(rows, name)]
    return "\n".join(f"## {name}\n\n{section_text(name, rows)}" for name in present)


def update_document(text: str, rows: list[Row]) -> str:
    """`text` with each marked table made anew; tables without rows stay as they are."""

    def replace(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        if name not in TABLES:
            msg = f"There is no table {name!r}. There are: {', '.join(TABLES)}."
            raise ValueError(msg)
        if not latest(rows, name):
            return match.group()
        return f"{opening}\n{section_text(name, rows)}\n{closing}"

    return _BLOCK.sub(replace, text)


def publish(path: Path, target: Path = PUBLISHED) -> None:
    """Take the newest row of each figure over into `target`. Quick runs are refused.

    Raises:
        ValueError: A row comes from a quick run or an unknown commit.
    """
    new = load_rows(path)
    for row in new:
        if row.get("is_quick") or not row.get("commit"):
            msg = f"{row['section']} {row['name']} is from a quick run or has no commit."
            raise ValueError(msg)
    rows = [*load_rows(target), *new]
    kept = [row for name in TABLES for row in latest(rows, name).values()]
    target.write_text("".join(json.dumps(row) + "\n" for row in kept))


def _groups(found: dict[str, Row]) -> list[tuple[str, str]]:
    """(placement, shape) pairs there are rows of, in the order of the reference table."""
    order = list(SHAPES)
    pairs = {(row["placement"], row["shape"]) for row in found.values()}
    return sorted(pairs, key=lambda pair: (pair[0], order.index(pair[1])))


def _met(value: float, goal: float, form: str = "{:g}", show_goal: bool = True) -> str:
    """The goal, or the value, with a tick where the value keeps it."""
    tick = " ✓" if value <= goal else ""
    return form.format(goal if show_goal else value) + tick


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _gib(row: Row) -> str | None:
    return None if row.get("gpu_used_gib") is None else f"{row['gpu_used_gib']:.1f}"


def main() -> None:
    """Print, publish or rewrite."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, default=RESULTS / "rows.jsonl")
    parser.add_argument("--publish", type=Path, help="rows to take over")
    parser.add_argument("--docs", action="store_true")
    options = parser.parse_args()
    if options.publish:
        publish(options.publish)
    if options.publish or options.docs:
        DOCUMENT.write_text(update_document(DOCUMENT.read_text(), load_rows(PUBLISHED)))
    else:
        print(comparison(load_rows(options.rows)))


if __name__ == "__main__":
    main()
