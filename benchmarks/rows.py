"""Benchmark rows: one JSON object per line, appended as they are measured.

A row is one figure: `section` and `name` say what, `value` and `unit` how much, the environment
where; anything else is detail. A run that is killed loses nothing but the figure in the making.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]

REQUIRED = (
    "commit",
    "gpu",
    "driver",
    "torch",
    "triton",
    "dtype",
    "section",
    "name",
    "value",
    "unit",
)
_SAME_MEASUREMENT = ("commit", "gpu", "torch", "triton", "is_quick")


class RowFile:
    """Appends rows to a file and knows which it has.

    Args:
        path: Made with its folder if missing.
        environment: Put into every row (see `environment.describe_environment`).
        resume: Treat figures that the file has from this commit and machine as measured.
    """

    def __init__(self, path: Path, environment: Row, *, resume: bool = False) -> None:
        self.path = path
        self._environment = environment
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        known = load_rows(path) if resume else []
        self._measured = {
            (row["section"], row["name"])
            for row in known
            if all(row.get(name) == environment.get(name) for name in _SAME_MEASUREMENT)
        }

    def has(self, section: str, name: str) -> bool:
        """True where the figure needs no measuring."""
        return (section, name) in self._measured

    def add(self, section: str, name: str, value: float, unit: str, **details: Any) -> Row:
        """Append one row and return it. It is on disk when this returns."""
        row = {
            **self._environment,
            "dtype": "bfloat16",
            "section": section,
            "name": name,
            "value": value,
            "unit": unit,
            **details,
        }
        check_row(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._measured.add((section, name))
        shown = f"{value:.4g} {unit}"
        print(f"{section} {name}: {shown}", flush=True)
        return row


def check_row(row: Row) -> None:
    """Refuse a row that could not be traced back later.

    Raises:
        ValueError: A field is missing, or the value is no finite number.
    """
    missing = [name for name in REQUIRED if name not in row]
    if missing:
        msg = f"The row {row.get('name')!r} lacks {', '.join(missing)}."
        raise ValueError(msg)
    value = row["value"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        msg = f"The row {row['name']!r} has the value {value!r}, which is no finite number."
        raise ValueError(msg)


def load_rows(path: Path) -> list[Row]:
    """All rows of a file, oldest first. A last line that a killed run left half written is skipped.

    Raises:
        ValueError: A line in the middle is no row.
    """
    if not path.exists():
        return []
    rows: list[Row] = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            msg = f"{path}:{number} is no row: {error}."
            raise ValueError(msg) from error
        rows.append(row)
    return rows


def _drop_torn_line(path: Path) -> None:
    """Remove what a killed run left of its last row, so that the next one starts a line."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)


def latest(rows: list[Row], section: str) -> dict[str, Row]:
    """The newest row of each name in a section, in order of first appearance."""
    found: dict[str, Row] = {}
    for row in rows:
        if row.get("section") == section:
            found[row["name"]] = row
    return found
