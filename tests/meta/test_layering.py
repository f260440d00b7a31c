"""Imports point one way, package imports are cheap, and nothing global changes."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import engine

SRC = Path(engine.__file__).resolve().parents[1]

# What each room of the engine may import from; rooms not listed (errors, outputs, config, …) are
# leaves at the top level that anybody may import.
ALLOWED: dict[str, set[str]] = {
    "kernels": set(),
    "layers": {"kernels"},
    "models": {"layers", "kernels"},
    "text": set(),
    "loader": {"layers"},
    "constraints": {"text"},
    "core": {"text", "constraints"},
    "runner": {"core", "constraints", "models", "kernels", "loader"},
}
ROOMS = set(ALLOWED)
QUANTISED_DATA = {"quantised_codes", "quantised_eight", "quantised_factory"}
TOP_ONLY = {
    "engine",
    "llm",
    "build",
    "ending",
    "loop",
    "shared",
    "progress",
    "prompts",
    "placement",
    "model_text",
    "pooling_build",
    "pooling_face",
    "pooling_handle",
    "pooling_texts",
    "relevance",
    "task",
}


def imported_modules(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.append(node.module)
    return names


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_rooms_of_the_engine_import_one_way(room: str) -> None:
    files = list((SRC / "engine" / room).rglob("*.py"))
    assert files
    for path in files:
        for name in imported_modules(path):
            if not name.startswith("engine."):
                continue
            target = name.split(".")[1]
            if room == "loader" and target == "layers":
                # What files are read into, which is data; nothing that computes.
                assert name.removeprefix("engine.layers.") in QUANTISED_DATA, f"{path}: {name}"
            assert target not in TOP_ONLY, f"{path} imports {name}"
            if target in ROOMS and target != room:
                assert target in ALLOWED[room], f"{path} imports {name}"


def test_core_does_not_import_torch() -> None:
    for path in (SRC / "engine" / "core").rglob("*.py"):
        assert not any(name.split(".")[0] == "torch" for name in imported_modules(path)), path


def test_engine_knows_no_framework() -> None:
    for path in (SRC / "engine").rglob("*.py"):
        for name in imported_modules(path):
            assert name.split(".")[0] not in {
                "langchain_core",
                "langchain",
                "llama_index",
                "llm_connectors",
            }, f"{path} imports {name}"


def test_connectors_use_only_what_the_engine_exports() -> None:
    exported = set(engine.__all__)
    for path in (SRC / "llm_connectors").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not node.module.startswith("engine."), f"{path} imports {node.module}"
                if node.module == "engine":
                    names = {alias.name for alias in node.names}
                    assert names <= exported, f"{path} imports {names - exported}"


def test_the_packages_under_test_are_ours() -> None:
    assert Path(engine.__file__).name == "__init__.py"
    assert (SRC / "engine" / "kernels").is_dir()


_PROBE = """
import json, sys, time
started = time.perf_counter()
import {package}
elapsed = time.perf_counter() - started
heavy = [name for name in ("torch", "transformers", "triton", "langchain_core", "llama_index",
                           "tiktoken", "tokenizers", "jinja2") if name in sys.modules]
print(json.dumps([elapsed, heavy]))
"""


@pytest.mark.parametrize("package", ["engine", "llm_connectors"])
def test_importing_a_package_is_cheap(package: str) -> None:
    """Budget 0.3 s, measured 0.06 s. The best of five shuts out a busy machine."""
    times = []
    for _ in range(5):
        output = subprocess.run(
            [sys.executable, "-c", _PROBE.format(package=package)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        elapsed, heavy = json.loads(output)
        assert heavy == []
        times.append(elapsed)
    assert min(times) < 0.3


_GLOBAL_STATE = """
import json, logging, os, signal, sys, threading
import torch
def snapshot():
    return {
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "seed": torch.initial_seed(),
        "rng": int(torch.get_rng_state().sum()),
        "environment": dict(os.environ),
        "handlers": [repr(type(handler)) for handler in logging.getLogger().handlers],
        "level": logging.getLogger().level,
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "switch_interval": sys.getswitchinterval(),
        "excepthook": repr(sys.excepthook),
        "thread_hook": repr(threading.excepthook),
        "recursion": sys.getrecursionlimit(),
    }
before = snapshot()
sys.path.insert(0, sys.argv[1])
from tiny_checkpoints import write_tiny_llama
import tempfile
from engine import Engine, SamplingParams
with tempfile.TemporaryDirectory() as folder:
    write_tiny_llama(folder)
    torch.set_rng_state(torch.get_rng_state())
    middle = snapshot()
    with Engine(folder, num_threads=1, max_model_len=64, max_num_seqs=4) as eng:
        eng.generate([1, 2, 3], SamplingParams(max_tokens=4))
        during = snapshot()
    after = snapshot()
print(json.dumps([[key, str(middle[key]), str(other[key])] for other in (during, after)
                  for key in middle if middle[key] != other[key]]))
"""


def test_using_the_engine_changes_nothing_global(support_dir: Path) -> None:
    output = subprocess.run(
        [sys.executable, "-c", _GLOBAL_STATE, str(support_dir)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert json.loads(output.strip().splitlines()[-1]) == []


def test_a_cpu_engine_does_without_triton() -> None:
    """It is 66 MiB and a tenth of a second; a CUDA device brings it in."""
    code = (
        f"import sys; sys.path.insert(0, {str(SRC)!r}); import engine.build, engine.engine; "
        "print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
