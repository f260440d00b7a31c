"""Real documents that every Python brings along: the module docstrings of its standard library.

Source: the .py files below `sysconfig.get_path("stdlib")`, read, never imported. Licence: Python
Software Foundation License Version 2 (https://docs.python.org/3/license.html). Nothing is copied
into this project. Which modules there are, and their texts, differ a little between versions.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sysconfig
from pathlib import Path

SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
MIN_CHARS = 80
MAX_FILE_BYTES = 40_000  # larger sources take seconds to parse
LICENCE = "PSF-2.0"


@functools.cache
def python_documents(count: int | None = None) -> dict[str, str]:
    """Dotted module name -> docstrings of the module and of what it defines.

    Args:
        count: How many, in the order of their names; None for all, which are more than 200.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED.intersection(parts) or any(part.startswith("_") for part in parts[:-1]):
            continue
        if len(documents) == count:
            break
        text = _document(path)
        if len(text) >= MIN_CHARS:
            documents[".".join(part for part in parts if part != "__init__")] = text
    return documents


def _document(path: Path) -> str:
    if path.stat().st_size > MAX_FILE_BYTES:
        return ""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return ""
    texts = [ast.get_docstring(tree) or ""]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            text = ast.get_docstring(node)
            if text:
                texts.append(f"{node.name}\n{inspect.cleandoc(text)}")
    return "\n\n".join(filter(None, texts))
