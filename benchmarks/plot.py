"""Rows as pictures: throughput, step time and latency, as small SVG files.

    python benchmarks/plot.py [--rows FILE] [--folder docs/plots]

Draws what the file has rows of: throughput against running sequences, step time against context,
latency percentiles against arrival rate. Needs matplotlib (in the dev extra).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from environment import ROOT
from report import PUBLISHED, provenance
from rows import Row, latest, load_rows

FOLDER = ROOT / "docs" / "plots"
_SIZE_INCHES = (6.0, 3.6)


def draw_all(rows: list[Row], folder: Path) -> list[Path]:
    """Draw every plot there are rows of; the files made."""
    import matplotlib as mpl

    mpl.use("svg")
    # Same rows, same bytes: no date, ids from a fixed salt, text as text.
    mpl.rcParams.update({"svg.hashsalt": "benchmarks", "svg.fonttype": "none", "font.size": 9})
    folder.mkdir(parents=True, exist_ok=True)
    made = [draw(rows, folder) for draw in (_throughput, _step_time, _latency)]
    return [path for path in made if path is not None]


def _throughput(rows: list[Row], folder: Path) -> Path | None:
    found = [row for row in latest(rows, "growth").values() if "running" in row]
    lines = _lines(found, "running", lambda row: _engine(row))
    return _draw(
        folder / "throughput.svg",
        found,
        lines,
        "running sequences",
        "output tokens per second",
        "Throughput against running sequences",
    )


def _step_time(rows: list[Row], folder: Path) -> Path | None:
    found = [row for row in latest(rows, "growth").values() if "context" in row]
    lines = _lines(found, "context", lambda row: f"{_engine(row)}, B = {row['batch']}")
    return _draw(
        folder / "step_time.svg",
        found,
        lines,
        "tokens of context",
        "milliseconds per decode step",
        "Step time against context",
    )


def _latency(rows: list[Row], folder: Path) -> Path | None:
    found = list(latest(rows, "latency").values())
    lines: dict[str, list[tuple[float, float]]] = {}
    for label, what in (("ttft", "first token"), ("itl", "between tokens")):
        for percent in (50, 95, 99):
            name = f"{label}_p{percent}_ms"
            having = [row for row in found if name in row]
            for engine, points in _lines(having, "rate", _engine, name).items():
                lines[f"{engine}: {what} p{percent}"] = points
    return _draw(
        folder / "latency.svg",
        found,
        lines,
        "requests per second",
        "milliseconds",
        "Latency at Poisson arrivals",
    )


def _engine(row: Row) -> str:
    placement = row.get("placement", "default")
    return str(row["shape"]) if placement == "default" else f"{row['shape']}, {placement}"


def _lines(
    rows: list[Row], x_name: str, name_of: Any, y_name: str = "value"
) -> dict[str, list[tuple[float, float]]]:
    """Name -> (x, y) points in order of x."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(name_of(row), []).append((row[x_name], row[y_name]))
    return {name: sorted(points) for name, points in lines.items()}


def _draw(
    path: Path,
    rows: list[Row],
    lines: dict[str, list[tuple[float, float]]],
    x_label: str,
    y_label: str,
    title: str,
) -> Path | None:
    """One plot with logarithmic axes; None without rows."""
    if not lines:
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate(lines.items()):
        xs, ys = zip(*points, strict=True)
        style = ("-", "--", ":")[number % 3] if len(lines) > 4 else "-"
        axes.plot(xs, ys, style, marker="o", markersize=3, linewidth=1.2, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title)
    axes.grid(visible=True, which="major", linewidth=0.3)
    axes.legend(fontsize=7, frameon=False)
    figure.text(0.995, 0.005, provenance(rows).strip(), fontsize=5, ha="right", alpha=0.6)
    figure.savefig(path, metadata={"Date": None})
    return path


def _short(number: float) -> str:
    return f"{number / 1024:g}k" if number >= 1024 else f"{number:g}"


def main() -> None:
    """Draw and name the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, default=PUBLISHED)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    for path in draw_all(load_rows(options.rows), options.folder):
        print(path)


if __name__ == "__main__":
    main()
