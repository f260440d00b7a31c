"""The ranges of pyproject.toml are those that were tested: their lowest versions and the pins."""

from __future__ import annotations

import re

from packaging.version import Version
from version_ranges import LEFT_OUT, ROOT, pins, ranges


def test_the_lowest_versions_are_the_floors() -> None:
    floors = {
        name: next(part.version for part in one.specifier if part.operator == ">=")
        for name, one in ranges().items()
    }
    lowest = pins("constraints-lowest.txt")
    assert set(lowest) == set(floors)
    assert {name: Version(lowest[name]) for name in lowest} == {
        name: Version(floor) for name, floor in floors.items()
    }


def test_the_pinned_versions_are_in_their_ranges() -> None:
    pinned = pins("constraints.txt")
    for name, one in ranges().items():
        assert one.specifier.contains(pinned[name]), one


def test_the_table_of_versions_names_floors_and_pins() -> None:
    lowest, pinned = pins("constraints-lowest.txt"), pins("constraints.txt")
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.]+)[^|]*\| ([\d.]+)", text, re.MULTILINE)
    assert len(rows) >= 8
    floors = {"torch": "2.11", "triton": "3.6", "python": "3.11"}
    for name, low, tested in rows:
        assert low == lowest.get(name, floors.get(name)), name
        assert tested == pinned.get(name, tested), name
    assert {name for name, *_ in rows} >= LEFT_OUT
