"""The checks as tests; collected by `pytest --pyargs llm_connectors.testing.llama_index`."""

from __future__ import annotations

import pytest

from llm_connectors.testing.llama_index.checks import CHECKS
from llm_connectors.testing.llama_index.subject import Subject


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LlamaIndex's own
def test_llm(name: str, subject: Subject) -> None:
    """One check."""
    CHECKS[name](subject)
