"""Every public op has a plain twin, a CPU path, a Triton kernel, tests of each, and a bench row."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

from engine.kernels import (
    cpu,
    dispatch,
    fused_reference,
    quantised_dispatch,
    quantised_reference,
    reference,
)

ROOT = Path(__file__).parents[2]
KERNEL_MODULE = {
    "add_rms_norm": "rms_norm",
    "paged_attention": "attention",
    "normed_linear": "few_row_linear",
    "normed_qkv": "few_row_qkv",
    "add_linear": "few_row_linear",
    "scaled_linear": "fused_linear",
    "scaled_qkv": "fused_qkv",
    "add_weighed_linear": "fused_linear",
    "embed_weighed": "embed_rows",
    "quantised_rows": "quantised_linear",
}


def parameters(function: object) -> list[tuple[str, object, object]]:
    return [
        (parameter.name, parameter.kind, parameter.default)
        for parameter in inspect.signature(function).parameters.values()
    ]


@pytest.mark.parametrize("op", dispatch.PUBLIC_OPS)
def test_op_has_twins_with_its_signature(op: str) -> None:
    want = parameters(getattr(dispatch, op))
    modules = (reference, fused_reference, quantised_reference)
    twins = next(module for module in modules if hasattr(module, op))
    assert parameters(getattr(twins, op)) == want
    assert parameters(getattr(cpu, op)) == want
    if importlib.util.find_spec("triton") is not None:
        module = importlib.import_module(f"engine.kernels.{KERNEL_MODULE.get(op, op)}")
        assert parameters(getattr(module, op)) == want


def test_public_ops_are_all_there_are() -> None:
    defined = {
        name
        for name, value in vars(dispatch).items()
        if inspect.isfunction(value)
        and value.__module__ in (dispatch.__name__, quantised_dispatch.__name__)
    }
    assert defined == {*dispatch.PUBLIC_OPS, "begin_step"}


@pytest.mark.parametrize("op", dispatch.PUBLIC_OPS)
@pytest.mark.parametrize(
    "files", ["test_kernel_reference.py", "test_cpu_kernels.py", "test_triton_*.py"]
)
def test_op_is_tested(op: str, files: str) -> None:
    sources = [path.read_text() for path in Path(__file__).parent.glob(files)]
    assert any(re.search(rf"\b{op}\b", source) for source in sources), f"{files}: no {op}"


def test_every_op_has_a_bench_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(
        "bench_kernels", ROOT / "benchmarks" / "bench_kernels.py"
    )
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_kernels", bench)
    spec.loader.exec_module(bench)
    device = torch.device("cpu")
    shape = bench.SHAPES[0]
    rows = bench.layer_rows(shape, 2, device, torch.float32)
    rows += bench.few_row_rows(shape, 2, device, torch.float32)
    rows += bench.fused_rows(shape, 2, device, torch.float32)
    rows.append(bench.prompt_row(shape, 2, device, torch.float32))
    rows += bench.quantised_rows(bench.Row, 2, (256, 512), bench.FORMATS[0], device, torch.float32)
    rows += bench.quantised_expert_rows(
        bench.Row, bench.SMALL_EXPERTS, 2, bench.FORMATS[1], device, torch.float32
    )
    rows += bench.expert_rows(bench.SMALL_EXPERTS, 2, device, torch.float32)
    rows.append(bench.attention_row(shape, [(20, 1)] * 2, "", device, torch.float32))
    rows.append(bench.attention_row(shape, [(0, 20)], "", device, torch.float32))
    assert {row.op for row in rows} == set(dispatch.PUBLIC_OPS)
    for row in rows:
        row.run(0)
        if row.baseline:
            row.baseline(0)


def test_every_kernel_that_is_launched_can_be_compiled_ahead() -> None:
    compile_ahead = pytest.importorskip("engine.kernels.compile_ahead")
    launched = [
        (path.stem, name)
        for path in sorted((ROOT / "src/engine/kernels").glob("*.py"))
        for name in re.findall(r"^ +(\w+)\[.*\]\($", path.read_text(), re.MULTILINE)
    ]
    assert len(launched) > 15
    for module, name in launched:
        kernel = getattr(importlib.import_module(f"engine.kernels.{module}"), name)
        assert isinstance(kernel, compile_ahead.Launchable), f"{module}.{name}"
