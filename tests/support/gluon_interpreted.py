"""A kernel in Gluon run by Triton's interpreter, which knows Triton alone.

What Gluon adds is where a number is: layouts, and their changes. What is computed is said by
operations that both have by the same names, so a module's source runs with a `gl` that forgets
layouts. Kernels that use shared memory, barriers or machine code cannot run so.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
import triton.language as tl


class Forgetful:
    """`triton.experimental.gluon.language` without layouts."""

    static_range = range
    float32, int64 = tl.float32, tl.int64

    def __getattr__(self, name: str) -> Any:
        # Looked up late: the interpreter exchanges the functions of `tl` while a kernel runs.
        return getattr(tl, name)

    def BlockedLayout(self, *_: Any) -> None:
        """No layout."""

    def SliceLayout(self, *_: Any) -> None:
        """No layout."""

    def convert_layout(self, value: Any, _layout: None) -> Any:
        """The same numbers."""
        return value

    def arange(self, start: Any, end: Any, _layout: None = None) -> Any:
        """As `tl.arange`."""
        return tl.arange(_constant(start), _constant(end))

    def zeros(self, shape: list[Any], dtype: Any, _layout: None = None) -> Any:
        """As `tl.zeros`."""
        return tl.zeros([_constant(size) for size in shape], dtype)


def _constant(value: Any) -> Any:
    return value if isinstance(value, tl.constexpr) else tl.constexpr(value)


def interpreted(name: str, folder: Path) -> ModuleType:
    """The module `engine.kernels.<name>` for the interpreter, written to `folder`."""
    found = importlib.util.find_spec(f"engine.kernels.{name}")
    assert found is not None
    assert found.origin is not None
    source = Path(found.origin).read_text()
    for old, new in (
        ("from triton.experimental import gluon\n", ""),
        (
            "from triton.experimental.gluon import language as gl\n",
            "import triton.language as tl\nfrom gluon_interpreted import Forgetful\n\n"
            "gl = Forgetful()\n",
        ),
        ("@gluon.jit", "@triton.jit"),
        ("gl.constexpr", "tl.constexpr"),
        (".type.layout", ".type and None"),
        ("values.type.shape", "list(values.shape)"),
        ("values.reshape(", "tl.reshape(values, "),
        ("y.reshape(", "tl.reshape(y, "),
    ):
        assert old in source, f"{name} has no {old!r} any more"
        source = source.replace(old, new)
    path = folder / f"interpreted_{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    assert triton.knobs.runtime.interpret, (
        "TRITON_INTERPRET=1 must be set before triton is imported"
    )
    spec.loader.exec_module(module)
    return module
