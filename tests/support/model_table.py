"""The table of docs/MODELS.md, made from what the tests compare.

`python tests/support/model_table.py` writes it; a test keeps the two equal.
"""

from __future__ import annotations

import re
from pathlib import Path

import transformers
from model_zoo import FAMILIES, described
from other_models import OTHERS

from engine.loader.gguf_architectures import ARCHITECTURES
from engine.models.registry import about, supported_architectures

DOCUMENT = Path(__file__).parents[2] / "docs" / "MODELS.md"
_MARKS = {
    name: f"<!-- {name}: made by tests/support/model_table.py -->"
    for name in ("native", "others", "gguf")
}
_END = "<!-- end -->"


def native_rows() -> list[str]:
    """One row per architecture of the decoder, by name."""
    cases: dict[str, list[str]] = {}
    for family in FAMILIES:
        config = described(family)
        cases.setdefault(config.architecture, []).append(family)
    rows = []
    for name in sorted(supported_architectures(), key=str.lower):
        compared = ", ".join(f"`{family}`" for family in cases[name])
        rows.append(f"| `{name}` | {about(name)} | {compared} |")
    return rows


def other_names() -> list[str]:
    """Architectures that run in transformers' own code, as a list in prose."""
    classes = {
        transformers.AutoModelForCausalLM._model_mapping[getattr(transformers, config)].__name__
        for config, _ in OTHERS.values()
    }
    return [", ".join(f"`{name}`" for name in sorted(classes)) + "."]


def gguf_names() -> list[str]:
    """GGUF's names of architectures, with what they become."""
    found = []
    for name, row in ARCHITECTURES.items():
        rows = [row, row.with_window, row.with_experts]
        targets = ", ".join(f"`{row.hf_architecture}`" for row in rows if row is not None)
        found.append(f"* `{name}`: {targets}")
    return found


def document() -> str:
    """The whole document with fresh tables."""
    head = ["| architecture | models | compared with transformers as |", "|---|---|---|"]
    text = DOCUMENT.read_text()
    for name, lines in (
        ("native", [*head, *native_rows()]),
        ("others", other_names()),
        ("gguf", gguf_names()),
    ):
        made = "\n".join([_MARKS[name], *lines, _END])
        pattern = re.escape(_MARKS[name]) + ".*?" + re.escape(_END)
        text = re.sub(pattern, lambda _, made=made: made, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(document())
