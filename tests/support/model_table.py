"""The table of docs/MODELS.md, made from what the tests compare.

`python tests/support/model_table.py` writes it; a test keeps the two equal.
"""

from __future__ import annotations

import re
from pathlib import Path

from model_zoo import FAMILIES, described

from engine.models.registry import about, supported_architectures

DOCUMENT = Path(__file__).parents[2] / "docs" / "MODELS.md"
_BEGIN, _END = "<!-- native: made by tests/support/model_table.py -->", "<!-- end -->"


def native_rows() -> list[str]:
    """One row per architecture of the decoder, by name."""
    cases: dict[str, list[str]] = {}
    for family in FAMILIES:
        config = described(family)
        cases.setdefault(config.architecture, []).append(family)
    rows = []
    for name in sorted(supported_architectures(), key=str.lower):
        configs = [described(family) for family in cases[name]]
        limits = []
        if any(config.has_sinks for config in configs):
            limits.append("no: sinks")
        if any(size for config in configs for size in config.chunk_sizes):
            limits.append("within one chunk")
        compared = ", ".join(f"`{family}`" for family in cases[name])
        rows.append(f"| `{name}` | {about(name)} | {' '.join(limits) or 'yes'} | {compared} |")
    return rows


def document() -> str:
    """The whole document with a fresh table."""
    head = "| architecture | models | GPU | compared with transformers as |"
    table = "\n".join([_BEGIN, head, "|---|---|---|---|", *native_rows(), _END])
    pattern = re.escape(_BEGIN) + ".*?" + re.escape(_END)
    return re.sub(pattern, lambda _: table, DOCUMENT.read_text(), flags=re.DOTALL)


if __name__ == "__main__":
    DOCUMENT.write_text(document())
